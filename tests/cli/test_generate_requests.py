"""``compose generate --requests``: each with its own adapter or weights; all checked first, a line as each is done."""

import io
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compose.cli.generate_requests import _write
from compose.cli.main import build_app

PROMPTS = ["say a b:", "c", "say d e f g h:", "i j"]
RECORDS = [
    {"prompt": PROMPTS[0], "adapter": "one", "id": "first"},
    {"prompt": PROMPTS[1], "weights": {"one": 0.5, "two": -1}, "max_new_tokens": 3},
    {"prompt": PROMPTS[2], "adapter": None, "id": 2},
    {"prompt": PROMPTS[3]},
    {"prompt": PROMPTS[3], "weights": {}},
]


def generate(workspace, bank: Path, *arguments: object, stdin: str | None = None):
    options = ["generate", "--base", str(workspace.base), "--bank", str(bank), "--max-new-tokens", "6"]
    return CliRunner().invoke(build_app(), [*options, *map(str, arguments)], input=stdin, env={"COLUMNS": "200"})


def lines_of(records: list[object]) -> str:
    return "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "requests.jsonl"
    path.write_text(lines_of([RECORDS[0], "", *RECORDS[1:]]))
    return path


def alone(workspace, bank: Path, record: dict) -> str:
    """The same text by the command's other way: one prompt, one selection."""
    choice = ["--adapter", "two"] if not {"adapter", "weights"} & set(record) else []
    if record.get("adapter"):
        choice = ["--adapter", record["adapter"]]
    if record.get("weights"):
        choice = ["--weights", json.dumps(record["weights"])]
    limit = ["--max-new-tokens", record.get("max_new_tokens", 6)]
    result = generate(workspace, bank, "--prompt", record["prompt"], *choice, *limit, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["outputs"][0]["text"]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_every_request_gets_what_it_gets_alone(workspace, strong, file, batch_size) -> None:
    result = generate(workspace, strong, "--requests", file, "--adapter", "two", "--batch-size", batch_size)
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert sorted(item["index"] for item in found) == [0, 1, 2, 3, 4]
    if batch_size == 1:
        assert [item["index"] for item in found] == [0, 1, 2, 3, 4]
    for item in found:
        record = RECORDS[item["index"]]
        assert item["text"] == alone(workspace, strong, record)
        assert item.get("id") == record.get("id")
        assert item["new_tokens"] <= record.get("max_new_tokens", 6)
        assert item["reason"] in ("stop", "length")
    texts = {item["index"]: item["text"] for item in found}
    assert texts[3] != texts[4]
    assert "5 requests" in result.stderr


def test_a_line_is_written_and_flushed_as_its_request_finishes(workspace, strong, file, monkeypatch) -> None:
    seen = []

    def watched(batch, *given):
        class Stream(io.StringIO):
            def flush(self) -> None:
                seen.append((self.getvalue().count("\n"), len(batch.running)))

        _write(batch, *given[:-1], Stream())

    monkeypatch.setattr("compose.cli.generate_requests._write", watched)
    result = generate(workspace, strong, "--requests", file)
    assert result.exit_code == 0, result.output
    assert [lines for lines, _ in seen] == [1, 2, 3, 4, 5]
    assert seen[0][1] > 0
    assert seen[-1][1] == 0


def test_requests_come_from_standard_input_and_go_to_a_file(workspace, strong, file, tmp_path) -> None:
    out = tmp_path / "answers.jsonl"
    printed = generate(workspace, strong, "--requests", file)
    written = generate(workspace, strong, "--requests", "-", "--out", out, stdin=file.read_text())
    assert (written.exit_code, written.stdout) == (0, "")
    assert out.read_text() == printed.stdout
    again = generate(workspace, strong, "--requests", file, "--out", out)
    assert (again.exit_code, "--force" in again.stderr) == (2, True)
    assert out.read_text() == printed.stdout
    out.write_text("old")
    assert generate(workspace, strong, "--requests", file, "--out", out, "--force").exit_code == 0
    assert out.read_text() == printed.stdout
    assert generate(workspace, strong, "--requests", file, "--out", tmp_path, "--force").exit_code == 2


def test_without_a_default_the_base_model_answers(workspace, strong, tmp_path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text(lines_of([{"prompt": "say a b:"}, {"prompt": "say a b:", "adapter": None}]))
    result = generate(workspace, strong, "--requests", file)
    texts = {json.loads(line)["text"] for line in result.stdout.splitlines()}
    assert texts == {alone(workspace, strong, {"prompt": "say a b:", "adapter": None})}


def test_all_bad_records_are_named_at_once_before_anything_runs(workspace, strong, tmp_path) -> None:
    bad = {
        2: ("{", "not valid JSON"),
        3: ("[1]", "must be a JSON object"),
        5: ({"adapter": "one"}, "'prompt' must be a text"),
        6: ({"prompt": " "}, "'prompt' must be a text"),
        7: ({"prompt": "a", "adapter": "onee"}, "unknown adapter 'onee'; did you mean 'one'"),
        8: ({"prompt": "a", "weights": {"three": 1}}, "unknown adapter 'three'"),
        9: ({"prompt": "a", "weights": {"one": "x"}}, "weight of 'one' must be a finite number"),
        10: ('{"prompt": "a", "weights": {"one": NaN}}', "NaN"),
        11: ({"prompt": "a", "weights": [1]}, "'weights' must be an object"),
        12: ({"prompt": "a", "weights": {"one": 1}, "adapter": "one"}, "exclude each other"),
        13: ({"prompt": "a", "adapter": 3}, "'adapter' must be a name"),
        14: ({"prompt": "a", "max_new_tokens": 0}, "'max_new_tokens' must be a whole number of at least 1, got 0"),
        15: ({"prompt": "a", "max_new_tokens": True}, "got True"),
        16: ({"prompt": "a", "id": 1.5}, "'id' must be"),
        17: ({"prompt": "a", "id": "x"}, "the id 'x' is taken by line 1"),
        18: ({"prompt": "a", "promt": "b"}, "unknown field 'promt'"),
    }
    records = [{"prompt": "a", "id": "x"}, *["{}"] * 2, "", *["{}"] * 14]
    for line, (record, _) in bad.items():
        records[line - 1] = record
    file, out = tmp_path / "requests.jsonl", tmp_path / "out.jsonl"
    file.write_text(lines_of(records))
    result = generate(workspace, strong, "--requests", file, "--out", out)
    assert (result.exit_code, result.stdout, out.exists()) == (2, "", False)
    assert f"{len(bad)} bad, nothing was generated" in result.stderr
    reported = {int(line.split(":")[1]): line for line in result.stderr.splitlines() if line.startswith(str(file))}
    assert sorted(reported) == sorted(bad)
    for line, (_, words) in bad.items():
        assert words in reported[line]


def test_prompts_that_the_model_cannot_take_are_named_too(workspace, strong, tmp_path) -> None:
    file = tmp_path / "requests.jsonl"
    records = [{"prompt": "a"}, {"prompt": "a " * 300}, {"prompt": "a", "max_new_tokens": 1000}]
    file.write_text(lines_of(records))
    result = generate(workspace, strong, "--requests", file)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "2 bad" in result.stderr
    for line in (2, 3):
        assert f"{file}:{line}: " in result.stderr
    assert "the model has 512" in result.stderr


def test_many_problems_are_counted(workspace, strong, tmp_path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text("x\n" * 30)
    result = generate(workspace, strong, "--requests", file)
    assert "30 bad" in result.stderr
    assert "... and 10 more" in result.stderr


def test_weights_of_a_run_are_a_default_only_where_they_can_be(workspace, strong, tmp_path) -> None:
    def run(values: list[list[float]], combine: str, records: list[dict]):
        (tmp_path / "report.json").write_text(json.dumps({
            "schema_version": 1, "settings": {"combine": combine}, "bank": {"adapters": []},
            "weights": {"adapters": ["one", "two"], "values": values},
        }))  # fmt: skip
        (tmp_path / "r.jsonl").write_text(lines_of(records))
        return generate(workspace, strong, "--requests", tmp_path / "r.jsonl", "--weights", tmp_path)

    plain, own = {"prompt": "say a b:"}, {"prompt": "say a b:", "weights": {"one": 0.5, "two": 0.5}}
    for combine in ("outputs", "parameters"):
        result = run([[0.5, 0.4]], combine, [plain, {"prompt": "c", "adapter": "two"}])
        assert result.exit_code == 0, result.output
        text = json.loads(result.stdout.splitlines()[0])["text"]
        other = generate(workspace, strong, "--prompt", "say a b:", "--weights", tmp_path, "--json")
        assert text == json.loads(other.stdout)["outputs"][0]["text"]
    assert run([[0.5, 0.4]], "outputs", [plain, own]).exit_code == 0
    refused = run([[0.5, 0.4]], "parameters", [plain, own])
    assert (refused.exit_code, "r.jsonl:2" in refused.stderr) == (2, True)
    refused = run([[0.5, 0.4], [0.1, 0.2]], "outputs", [plain])
    assert (refused.exit_code, "2 groups of layers" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--requests", "/nowhere.jsonl"], "no such file /nowhere.jsonl"),
        (["--requests", "-"], "no requests"),
        (["--requests", "-", "--prompt", "a"], "brings its own prompts"),
        (["--requests", "-", "--json"], "leave out --json"),
        (["--prompt", "a", "--out", "x.jsonl"], "--out goes with --requests"),
        (["--requests", "-", "--adapter", "alpha"], "unknown adapter 'alpha'"),
    ],
)
def test_bad_calls_are_refused(workspace, strong, arguments: list[str], words: str) -> None:
    result = generate(workspace, strong, *arguments, stdin="")
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr


def test_requests_need_a_bank(workspace) -> None:
    words = ["generate", "--base", str(workspace.base), "--requests", "-"]
    result = CliRunner().invoke(build_app(), words, input='{"prompt": "a"}')
    assert (result.exit_code, "--bank" in result.stderr) == (2, True)


def test_the_demo(call) -> None:
    records = [
        {"prompt": "Do it: stone river lamp", "adapter": "capitals"},
        {"prompt": "Do it: stone river lamp", "weights": {"capitals": 1.0, "dashes": 1.0}},
        {"prompt": "Do it: stone river lamp", "adapter": "reverse_order"},
    ]
    done = call("generate", "--demo", "--requests", "-", stdin=lines_of(records))
    assert done.returncode == 0, done.stderr
    found = {item["index"]: item["text"] for item in map(json.loads, done.stdout.splitlines())}
    assert found == {0: "STONE RIVER LAMP", 1: "STONE-RIVER-LAMP", 2: "lamp river stone"}
