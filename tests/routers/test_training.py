"""Training: deterministic, continued to the bit, the same however a step is cut."""

import itertools
import math

import pytest
import torch

from compose.errors import ExamplesError, IncompatibleError, RunFolderError
from compose.routers.gates.linear import LinearGate
from compose.routers.losses.load_balance import SwitchLoadBalance
from compose.routers.sampling import Sampling
from compose.routers.selectors.top_k import TopK
from compose.routers.spec import MixtureSpec
from compose.routers.stages import Stage
from compose.routers.training import train
from tests.routers.train_cases import SPECS, LetterTokenizer, attached_bank, records

TOKENIZER = LetterTokenizer()


class InterruptionError(Exception):
    """Stands for a process that dies."""


def run(model, spec, *, trainable=True, **options):
    """One run over a new bank; the trained tensors, then everything detached again."""
    attached = attached_bank(model, trainable=trainable)
    options = {"steps": 4, "learning_rate": 0.02, "batch_size": 6, "data": records(), **options}
    data = options.pop("data")
    try:
        result = train(attached, spec, data, tokenizer=TOKENIZER, **options)
        weights = {name: value.detach().clone() for name, value in result.routed.state_dict().items()}
        return weights, result.history
    finally:
        attached.detach()


def assert_equal(one, other) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def changed(one, other) -> set[str]:
    return {name for name, value in one.items() if not torch.equal(value, other[name])}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_training_lowers_the_loss_and_changes_what_trains(name, spec, tiny_model) -> None:
    model = tiny_model(name)
    start, _ = run(model, SPECS[spec], steps=1, learning_rate=1e-12, trainable=spec != "router")
    weights, history = run(model, SPECS[spec], steps=25, learning_rate=0.02, trainable=spec != "router")
    losses = [entry["loss"] for entry in history]
    assert sum(losses[-5:]) < sum(losses[:5]) - (0 if spec == "router" else 0.25)
    names = changed(start, weights)
    assert any(one.startswith("router.") for one in names)
    assert any(one.endswith("a_RD") for one in names) == (spec != "router")
    assert not any("base_layer" in one or "embed" in one for one in names)


def test_equal_seeds_give_equal_weights_and_others_do_not(tiny_model) -> None:
    model = tiny_model("llama")
    torch.manual_seed(1)
    one, history = run(model, SPECS["noisy"], seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again, same = run(model, SPECS["noisy"], seed=3)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn from the caller's generator
    assert_equal(one, again)
    assert history == same
    other, _ = run(model, SPECS["noisy"], seed=4)
    assert changed(one, other)


@pytest.mark.parametrize("interrupted_at", [1, 3, 5])
def test_a_continued_run_ends_where_an_uninterrupted_one_does(interrupted_at, tiny_model, tmp_path) -> None:
    model = tiny_model("llama")
    stages = (
        Stage(name="experts", train="experts", steps=2, learning_rate=0.01),
        Stage(name="both", train="both", steps=4, learning_rate=0.02, schedule="cosine", warmup=1),
    )
    options = {"steps": None, "stages": stages, "checkpoint_every": 1, "accumulation": 2}
    whole, history = run(model, SPECS["noisy"], **options)

    def stop(routed, step):
        if step == interrupted_at + 1:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        run(model, SPECS["noisy"], checkpoint_dir=tmp_path, after_step=stop, **options)
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{interrupted_at:09d}"]
    with pytest.raises(RunFolderError, match="resume it"):
        run(model, SPECS["noisy"], checkpoint_dir=tmp_path, **options)
    weights, continued = run(model, SPECS["noisy"], checkpoint_dir=tmp_path, resume=True, **options)
    assert_equal(weights, whole)
    assert continued == history
    assert len(history) == 6
    finished, _ = run(model, SPECS["noisy"], checkpoint_dir=tmp_path, resume=True, **options)
    assert_equal(finished, whole)


def test_a_run_begun_otherwise_is_not_continued(tiny_model, tmp_path) -> None:
    model = tiny_model("llama")
    run(model, SPECS["both"], checkpoint_dir=tmp_path)
    with pytest.raises(RunFolderError, match=r"settings.batch_size was 6, is 12"):
        run(model, SPECS["both"], checkpoint_dir=tmp_path, resume=True, batch_size=12)
    with pytest.raises(RunFolderError, match="data was"):
        run(model, SPECS["both"], checkpoint_dir=tmp_path, resume=True, data=records(23))


def test_micro_batches_add_up_to_the_large_batch(tiny_model) -> None:
    model = tiny_model("llama")
    spec = MixtureSpec(gate=LinearGate(init="normal", std=0.5), train="both")
    whole, history = run(model, spec, accumulation=1)
    parts, cut = run(model, spec, accumulation=3)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=2e-5)
    for one, other in zip(history, cut, strict=True):
        assert math.isclose(one["loss"], other["loss"], rel_tol=1e-5)
        assert math.isclose(one["gradient_norm"], other["gradient_norm"], rel_tol=1e-4)
        assert one["tokens"] == other["tokens"]


def test_checkpointed_layers_give_the_same_run(tiny_model) -> None:
    model = tiny_model("llama")
    plain, history = run(model, SPECS["both"])
    saving, same = run(model, SPECS["both"], gradient_checkpointing=True)
    for name, value in plain.items():
        torch.testing.assert_close(saving[name], value, rtol=1e-5, atol=1e-6)
    for one, other in zip(history, same, strict=True):
        assert math.isclose(one["aux_loss"], other["aux_loss"], rel_tol=1e-5)
    assert not model.is_gradient_checkpointing
    noisy, _ = run(model, SPECS["noisy"])
    again, _ = run(model, SPECS["noisy"], gradient_checkpointing=True)
    for name, value in noisy.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_trains_with_float32_gates_and_masters(dtype, tiny_model, tmp_path) -> None:
    model = tiny_model("llama").to(dtype)
    options = {"steps": 12, "precision": "bf16" if dtype == torch.float32 else "model", "checkpoint_every": 1}
    weights, history = run(model, SPECS["both"], **options)
    assert history[-1]["loss"] < history[0]["loss"]
    assert {value.dtype for name, value in weights.items() if name.startswith("router.")} == {torch.float32}
    assert {value.dtype for name, value in weights.items() if name.endswith("a_RD")} == {dtype}

    def stop(routed, step):
        if step == 7:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        run(model, SPECS["both"], checkpoint_dir=tmp_path, after_step=stop, **options)
    continued, same = run(model, SPECS["both"], checkpoint_dir=tmp_path, resume=True, **options)
    assert_equal(continued, weights)
    assert same == history


def test_a_loss_that_is_not_finite_raises_with_the_step(tiny_model) -> None:
    def spoil(routed, step):
        if step == 2:
            next(routed.router.parameters()).data.fill_(float("nan"))

    with pytest.raises(IncompatibleError, match=r"not finite in step 3 .stage 'train'."):
        run(tiny_model("llama"), SPECS["both"], after_step=spoil)


def test_reports_tell_loss_entropy_load_and_tasks(tiny_model) -> None:
    reports = []
    _, history = run(
        tiny_model("llama"),
        SPECS["both"],
        progress=reports.append,
        sampling=Sampling(by="equal"),
        log_every=3,
        steps=5,
    )
    assert [report.step for report in reports] == [1, 2, 3, 4, 5]
    assert [entry["step"] for entry in history] == [3, 5]
    last = reports[-1]
    assert 0 < last.entropy < math.log(3)
    assert math.isclose(sum(last.load), 1, rel_tol=1e-6)
    assert last.aux.keys() == {"switch_lb"}
    assert math.isclose(last.aux_loss, 0.1 * next(iter(last.aux.values())), rel_tol=1e-5)
    assert sum(last.tasks.values()) == 5 * 6
    assert abs(last.tasks["say"] - last.tasks["turn"]) <= 2
    assert last.rates == (0.02, 0.02)


def test_stages_train_what_they_say_on_their_records(tiny_model) -> None:
    model = tiny_model("llama")
    weights = {}

    def keep(routed, step):
        weights[step] = {name: value.detach().clone() for name, value in routed.state_dict().items()}

    stages = (
        Stage(name="one", train="experts", steps=2, tasks=("say",)),
        Stage(name="two", train="router", steps=1, learning_rate=0.01),
        Stage(name="three", steps=1, learning_rate=0.01),
    )
    _, history = run(model, SPECS["noisy"], steps=None, stages=stages, after_step=keep)
    kinds = [{name.split(".")[0] for name in changed(weights[i], weights[i + 1])} for i in (1, 2, 3)]
    assert kinds == [{"model"}, {"router"}, {"model", "router"}]
    assert history[1]["tasks"] == {"say": 12}
    assert [entry["stage"] for entry in history] == ["one", "one", "two", "three"]


def test_a_selection_bias_moves_with_the_load(tiny_model) -> None:
    spec = MixtureSpec(gate=LinearGate(init="normal", std=2.0), select=TopK(k=1, selection_bias=True), train="both")
    weights, _ = run(tiny_model("llama"), spec, balance_rate=0.05, steps=3)
    biases = {name: value for name, value in weights.items() if name.endswith("selection_bias_E")}
    assert biases
    moved = torch.stack(list(biases.values())) / 0.05
    torch.testing.assert_close(moved, moved.round())  # steps of the rate
    assert moved.abs().max() == 3  # one expert was too much, or too little, in use three times


def test_what_gates_and_losses_read_has_to_be_there(tiny_model) -> None:
    model = tiny_model("llama")
    text = MixtureSpec(scope="sequence", gate_input="text", site="model")
    with pytest.raises(IncompatibleError, match="text_embedding"):
        run(model, text)
    clusters = MixtureSpec(scope="sequence", gate_input="cluster_id", gate=SPECS["router"].gate)
    with pytest.raises(IncompatibleError, match=r"24 records have none .first: mixed.jsonl:1."):
        run(model, clusters)
    with pytest.raises(IncompatibleError, match="trains nothing"):
        run(model, MixtureSpec(train="none"))
    with pytest.raises(IncompatibleError, match="no option 'lr'"):
        run(model, SPECS["router"], lr=1)


def test_text_embeddings_reach_the_gates(tiny_model) -> None:
    spec = MixtureSpec(scope="sequence", gate_input="text", site="model", gate=LinearGate(init="zeros"))
    asked = []

    def embed(texts):
        asked.extend(texts)
        return torch.tensor([[float(text.startswith("turn")), 1.0] for text in texts])

    weights, history = run(tiny_model("llama"), spec, text_embedding=embed, steps=30, learning_rate=0.1)
    assert asked == [each.example.input for each in records()]
    assert history[-1]["entropy"] < history[0]["entropy"]
    assert {value.shape for name, value in weights.items() if name.startswith("router.")} == {torch.Size([3, 2])}


def test_every_record_is_named_that_cannot_be_encoded(tiny_model) -> None:
    with pytest.raises(ExamplesError) as error:
        run(tiny_model("llama"), SPECS["router"], max_length=13)
    lines = str(error.value).splitlines()
    assert len(lines) > 2
    assert all(line.startswith("mixed.jsonl:") for line in lines)


def test_specs_with_the_same_balance_loss_in_any_cut_are_finite(tiny_model) -> None:
    for accumulation, train_what in itertools.product((1, 2), ("router", "both")):
        spec = MixtureSpec(train=train_what, losses=(SwitchLoadBalance(coefficient=1.0),))
        _, history = run(tiny_model("llama"), spec, accumulation=accumulation, steps=2)
        assert all(math.isfinite(entry["aux_loss"]) for entry in history)


def test_a_run_that_fails_takes_its_router_off_the_model(tiny_model) -> None:
    model = tiny_model("llama")
    attached = attached_bank(model, trainable=True)

    def fail(routed, step) -> None:
        raise InterruptionError

    with pytest.raises(InterruptionError):
        train(attached, SPECS["both"], records(), tokenizer=TOKENIZER, steps=2, batch_size=6, after_step=fail)
    assert attached.active is None
    assert not model._forward_hooks
