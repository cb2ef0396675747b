"""The whole search: what it finds, what it writes, what it refuses, and that it resumes to the bit after kill -9."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import compose
from compose.bank import Bank
from compose.errors import ComposeError, RunFolderError
from compose.fewshot.run import few_shot_search, plan_search
from compose.fewshot.settings import SearchSettings
from compose.text.examples import Example

QUICK = SearchSettings(strategy="gradient", budget=40, controls=("base", "best_single"))


def test_it_finds_the_adapter_that_solves_the_task(loaded, bank, task, tmp_path) -> None:
    run = few_shot_search(loaded, bank, task[:5], test=task[5:], out=tmp_path / "out")
    weights = dict(
        zip(run.report["weights"]["adapters"], zip(*run.report["weights"]["values"], strict=True), strict=True)
    )
    assert max(weights, key=lambda name: sum(map(abs, weights[name]))) == "skill-2"
    controls = {row["name"]: row for row in run.report["controls"]}
    assert list(controls) == ["composed", "base", "constant", "uniform", "best_single", "random_bank", "trained_lora"]
    assert controls["best_single"]["note"].startswith("skill-2")
    assert controls["composed"]["shots_loss"] < controls["random_bank"]["shots_loss"] < controls["base"]["shots_loss"]
    assert controls["composed"]["test"]["n"] == 7
    files = sorted(path.name for path in run.folder.iterdir())
    assert files == ["README.md", "adapter_config.json", "adapter_model.safetensors", "events.jsonl", "report.json"]
    assert json.loads((run.folder / "report.json").read_text()) == json.loads(json.dumps(run.report))
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("layers", [1, "each"])
@pytest.mark.parametrize("combine", ["outputs", "parameters"])
def test_the_written_adapter_computes_what_the_search_computed(
    loaded, bank, task, tmp_path, run_model, layers, combine
) -> None:
    settings = SearchSettings(strategy="random", budget=30, layers=layers, combine=combine, controls=(), candidates=3)
    run = few_shot_search(loaded, bank, task[:3], settings=settings, out=tmp_path / "out")
    ids = torch.randint(2, 30, (2, 9))
    with compose.attach(loaded.model, bank.select(run.report["weights"]["adapters"])) as attached:
        attached.set(run.coefficients)
        wanted = loaded.model(ids).logits
    with compose.attach(loaded.model, Bank.open(run.folder)) as attached:
        attached.set(attached.bank.names[0])
        assert_close(loaded.model(ids).logits, wanted, atol=1e-4, rtol=1e-4)


def test_recompression_reports_its_error(loaded, bank, task) -> None:
    settings = SearchSettings(strategy="random", budget=20, rank=2, controls=())
    output = few_shot_search(loaded, bank, task[:3], settings=settings).report["output"]
    assert output["rank_max"] == 2
    assert 0 < output["recompressed"]["relative_error"] < 1


def test_the_base_is_the_answer_when_nothing_beats_it(loaded, bank, tmp_path) -> None:
    """The outputs are what the base itself finds likely, so every adapter makes them worse."""
    from compose.engine.generate import generate_tokens

    prompts = ["say oak", "say elm", "say ash", "say fir", "say yew"]
    ids = [loaded.tokenizer(f"{prompt}\n").input_ids for prompt in prompts]
    texts = [loaded.tokenizer.decode(r) for r in generate_tokens(loaded.model, ids, max_new_tokens=8, stop_ids=[1])]
    examples = [Example(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    run = few_shot_search(loaded, bank, examples, out=tmp_path / "out", settings=SearchSettings(controls=("base",)))
    assert run.report["search"]["choice"] == "base"
    assert run.adapter is None
    assert run.report["output"] is None
    assert not (run.folder / "adapter_config.json").exists()
    assert "holds no adapter" in (run.folder / "README.md").read_text()


def test_test_items_never_change_the_choice(loaded, bank, task) -> None:
    with_test = few_shot_search(loaded, bank, task[:4], test=task[4:], settings=QUICK)
    without = few_shot_search(loaded, bank, task[:4], settings=QUICK)
    assert with_test.report["weights"] == without.report["weights"]


def test_the_same_seed_gives_the_same_weights_whatever_the_chunks(loaded, bank, task) -> None:
    first = few_shot_search(loaded, bank, task[:4], settings=QUICK).report["weights"]
    assert first == few_shot_search(loaded, bank, task[:4], settings=QUICK).report["weights"]


def test_a_large_bank_is_preselected(loaded, bank, task) -> None:
    settings = SearchSettings(strategy="random", budget=8, candidates=2, controls=())
    report = few_shot_search(loaded, bank, task[:4], settings=settings).report
    assert len(report["weights"]["adapters"]) == 2
    assert "skill-2" in report["weights"]["adapters"]
    assert [row["name"] for row in report["bank"]["adapters"] if row["candidate"]] == report["weights"]["adapters"]
    assert report["search"]["preselection_cost"] > 0


def test_folders_are_never_overwritten_or_resumed_by_accident(loaded, bank, task, tmp_path) -> None:
    out = tmp_path / "out"
    few_shot_search(loaded, bank, task[:3], settings=QUICK, out=out)
    with pytest.raises(RunFolderError, match="--force"):
        few_shot_search(loaded, bank, task[:3], settings=QUICK, out=out)
    few_shot_search(loaded, bank, task[:3], settings=QUICK, out=out, force=True)
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(RunFolderError, match="--resume continues"):
        few_shot_search(loaded, bank, task[:3], settings=QUICK, out=tmp_path / "new")


def test_bad_settings_are_reported_together() -> None:
    with pytest.raises(ComposeError) as error:
        SearchSettings(candidates=0, combine="sum", controls=("best",), layers=0)  # type: ignore[arg-type]
    for part in ("candidates", "combine", "unknown controls ['best']", "layers"):
        assert part in str(error.value)


def test_the_plan_searches_nothing_and_says_what_it_would_do(loaded, bank, task) -> None:
    plan = plan_search(loaded, bank, task[:3], settings=SearchSettings(candidates=4))
    assert plan["candidates"] == 4
    assert plan["coefficients"] == 12
    assert len(plan["adapters"]) == 6
    assert plan["budget_forward_equivalents"] == 1000
    assert plan["minutes_at_most"] >= 0


DRIVER = """
import importlib.util, sys
from compose.fewshot.run import few_shot_search
from compose.fewshot.settings import SearchSettings
spec = importlib.util.spec_from_file_location("fixtures", sys.argv[1])
fixtures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fixtures)
loaded = fixtures.loaded.__wrapped__()
bank = fixtures.bank.__wrapped__(loaded)
task = fixtures.task.__wrapped__(loaded, bank)
settings = SearchSettings(strategy="cma", evaluations=240, l1=0.01, controls=("base",))
print("ready", flush=True)
few_shot_search(loaded, bank, task[:4], settings=settings, out=sys.argv[2], resume=sys.argv[3] == "resume")
"""


@pytest.fixture
def start(warm_python):
    """Start the search in a process of its own: ``start(out, "fresh")``, or ``"resume"``; "ready" when it begins."""
    fixtures = Path(__file__).with_name("conftest.py")
    return lambda out, mode: warm_python.start(DRIVER, fixtures, out, mode)


def outcome(out: Path) -> dict:
    report = json.loads((out / "report.json").read_text())
    del report["created"], report["search"]["seconds"]
    return report


@pytest.mark.slow
def test_ten_kills_end_bit_identical_to_an_uninterrupted_run(tmp_path, start, loaded, bank, task) -> None:
    settings = SearchSettings(strategy="cma", evaluations=240, l1=0.01, controls=("base",))
    few_shot_search(loaded, bank, task[:4], settings=settings, out=tmp_path / "whole")  # under another hash seed
    generator = random.Random(0)
    kills = 0
    for attempt in range(30):
        process = start(tmp_path / "killed", "fresh" if attempt == 0 else "resume")
        while process.stdout.strip() != "ready":
            assert process.poll() is None, process.stderr
            time.sleep(0.005)
        if kills < 10:
            time.sleep(0.05 + 0.12 * generator.random())
            process.send_signal(signal.SIGKILL)
        code = process.wait(300)
        kills += code == -signal.SIGKILL
        if code == 0:
            break
        if attempt == 0 and not (tmp_path / "killed.partial").exists():
            (tmp_path / "killed.partial").mkdir()
    assert kills >= 5
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "killed" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
