"""Targets with one input are mixed together: the same as one by one, also after anything of theirs was changed."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

from compose.routers.builder import build
from compose.routers.gates.linear import LinearGate, LinearScores
from compose.routers.selectors.top_k import TopK
from compose.routers.siblings import _Pending
from compose.routers.spec import MixtureSpec

NORMAL = LinearGate(init="normal", std=1.0)
KINDS = {
    "all": MixtureSpec(gate=NORMAL),
    "bias": MixtureSpec(gate=LinearGate(init="normal", std=1.0, bias=True)),
    "top 2": MixtureSpec(gate=NORMAL, select=TopK(k=2), renormalise="sum"),
    "top 2, probabilities": MixtureSpec(gate=NORMAL, select=TopK(k=2)),
    "ties": MixtureSpec(gate=LinearGate(init="zeros"), select=TopK(k=2), renormalise="sum"),
    "block": MixtureSpec(gate=NORMAL, site="block", gate_input="block"),
    "group": MixtureSpec(gate=NORMAL, site="group"),
    "first pass": MixtureSpec(gate=NORMAL, site="model", gate_input="first_pass"),
    "sequence": MixtureSpec(gate=NORMAL, site="block", scope="sequence", gate_input="block", pooling="mean"),
}
BANKS = {
    "like ranks": {"ranks": (2, 2, 2, 2)},
    "like ranks and scalings": {"ranks": (2, 2, 2, 2), "scaling": 0.75},
    "other ranks": {"ranks": (3, 1, 8, 5)},
}
MODES = {"no gradients": torch.no_grad, "inference": torch.inference_mode}
CLOSE = {"rtol": 1e-4, "atol": 5e-5}  # float32 sums in another order, through all layers


@pytest.fixture
def taken(monkeypatch) -> list[str]:
    """Return the targets that were mixed together with others, call by call."""
    targets: list[str] = []
    original = _Pending.add

    def counted(self, x, call, place):
        targets.append(call.target)
        return original(self, x, call, place)

    monkeypatch.setattr(_Pending, "add", counted)
    return targets


@torch.no_grad()
def one_by_one(routed, inputs, monkeypatch) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(routed.session, "_quick", lambda x: False)
        return routed(**inputs).logits


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("bank", BANKS.values(), ids=BANKS)
@pytest.mark.parametrize("spec", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_together_is_one_by_one(name, spec, bank, mode, routed_over, batch, monkeypatch, taken):
    routed, inputs = routed_over(name, spec, **bank).eval(), batch(name)
    if name == "bert":
        del inputs["labels"]  # it classifies rows
    want = one_by_one(routed, inputs, monkeypatch)
    assert taken == []
    with mode():
        for _ in range(2):  # in the first forward siblings are seen
            torch.testing.assert_close(routed(**inputs).logits, want, **CLOSE)
    kinds = {target.rpartition(".")[2] for target in taken}
    assert kinds >= {"llama": {"q_proj", "k_proj", "v_proj"}, "t5": {"q", "k", "v"}, "bert": {"query", "key"}}[name]
    assert len(taken) == len(set(taken)) or name == "t5"


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 5e-6), (torch.bfloat16, 0.05)])  # gates are float32
@pytest.mark.parametrize("bank", BANKS.values(), ids=BANKS)
@pytest.mark.parametrize("spec", KINDS.values(), ids=KINDS)
def test_models_of_other_types_are_served(spec, bank, dtype, close, routed_over, batch, monkeypatch):
    routed, inputs = routed_over("llama", spec, **bank).eval().to(dtype), batch("llama")
    want = one_by_one(routed, inputs, monkeypatch)
    for _ in range(3):
        torch.testing.assert_close(routed(**inputs).logits, want, atol=close, rtol=close)


@torch.no_grad()
@pytest.mark.parametrize("which", ["all", "top 2", "first pass"])
def test_generation_is_that_of_steps_one_by_one(which, routed_over, monkeypatch, taken):
    routed = routed_over("llama", KINDS[which]).eval()
    prompts = [[5, 6, 7, 8], [9, 10]]
    found = routed.generate(prompts, max_new_tokens=6, stop_ids=[])
    assert taken
    monkeypatch.setattr(routed.session, "_quick", lambda x: False)
    assert routed.generate(prompts, max_new_tokens=6, stop_ids=[]) == found


def _gates_in_place(routed) -> None:
    for parameter in routed.router.parameters():
        parameter.add_(torch.randn_like(parameter))


def _gates_through_data(routed) -> None:
    for parameter in routed.router.parameters():
        parameter.data.mul_(-1.5)


def _gates_replaced(routed) -> None:
    for parameter in routed.router.parameters():
        parameter.data = torch.randn_like(parameter)


def _gates_loaded(routed) -> None:
    routed.router.load_state_dict({key: -value for key, value in routed.router.state_dict().items()})


def _gates_assigned(routed) -> None:
    state = {key: -value for key, value in routed.router.state_dict().items()}
    routed.router.load_state_dict(state, assign=True)


def _gate_modules_replaced(routed) -> None:
    for site in routed.router.gates.values():
        site.gate = LinearScores(torch.randn_like(site.gate.weight_ED), None, layer_norm=False)


def _gates_tied(routed) -> None:
    """One parameter for two siblings, changed in place."""
    q, k = (routed.router.site(f"model.layers.0.self_attn.{kind}").gate for kind in ("q_proj", "k_proj"))
    k.weight_ED = q.weight_ED
    q.weight_ED.mul_(-1)


def _factors_replaced(routed) -> None:
    for layer in routed.attached.layers.values():
        layer.a_RD.data = -layer.a_RD


def _factors_in_place(routed) -> None:
    for layer in routed.attached.layers.values():
        layer.a_RD.mul_(-0.7)


def _scalings_in_place(routed) -> None:
    for number, layer in enumerate(routed.attached.layers.values()):
        layer.scaling_E.mul_(0.5 + 0.1 * number)


def _moved(routed) -> None:
    routed.double()
    routed.float()


def _fewer_chosen(routed) -> None:
    for gate in routed.router.gates.values():
        gate.select.k = 1


def _another_router(routed) -> None:
    """A second router over the same bank moves the factors too."""
    second = build(routed.attached, KINDS["block"], seed=7)
    for _ in range(2):
        second(input_ids=torch.tensor([[5, 6, 7]]))
    second.remove()
    routed.enable()


CHANGES = {
    "gates in place": _gates_in_place,
    "gates through .data": _gates_through_data,
    "gates replaced": _gates_replaced,
    "gates loaded": _gates_loaded,
    "gates assigned": _gates_assigned,
    "gate modules replaced": _gate_modules_replaced,
    "gates tied": _gates_tied,
    "factors replaced": _factors_replaced,
    "factors in place": _factors_in_place,
    "scalings in place": _scalings_in_place,
    "moved": _moved,
    "fewer chosen": _fewer_chosen,
    "another router": _another_router,
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_counts_at_once(change, routed_over, batch, monkeypatch, taken):
    routed, inputs = routed_over("llama", KINDS["top 2"]), batch("llama")
    for _ in range(2):
        routed(**inputs)
    change(routed)
    want = one_by_one(routed, inputs, monkeypatch)
    for _ in range(3):
        taken.clear()
        torch.testing.assert_close(routed(**inputs).logits, want, **CLOSE)
    assert "model.layers.0.mlp.up_proj" in taken or change is _scalings_in_place  # which are no longer alike


def test_training_between_forwards_counts(routed_over, batch, monkeypatch, taken):
    routed, inputs = routed_over("llama", MixtureSpec(gate=NORMAL, train="router")), batch("llama")
    optimiser = torch.optim.Adam(routed.trained_parameters().values(), lr=0.1)
    for _ in range(3):
        with torch.no_grad():
            routed(**inputs)
        optimiser.zero_grad()
        routed(**inputs).loss.backward()
        optimiser.step()
    with torch.no_grad():
        taken.clear()
        torch.testing.assert_close(routed(**inputs).logits, one_by_one(routed, inputs, monkeypatch), **CLOSE)
    assert taken


@torch.no_grad()
def test_another_or_a_changed_input_is_not_taken_for_the_leader_s(routed_over, batch):
    routed, inputs = routed_over("llama", KINDS["all"]), batch("llama")
    for _ in range(2):
        routed(**inputs)
    q, k = (routed.attached.layers[f"model.layers.0.self_attn.{kind}"] for kind in ("q_proj", "k_proj"))
    x, other = (torch.randn(2, 3, q.in_features) for _ in range(2))
    want, want_changed = k(other), k(2 * x)
    q(x)
    torch.testing.assert_close(k(other), want)
    q(x)
    x.mul_(2)
    torch.testing.assert_close(k(x), want_changed)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_model_that_changes_the_input_between_two_calls_has_no_siblings_there(mode, routed_over, batch, monkeypatch):
    routed, inputs = routed_over("llama", KINDS["all"]), batch("llama")
    attention = routed.model.model.layers[0].self_attn

    def change(_, args):
        args[0].mul_(-0.5)

    attention.k_proj.register_forward_pre_hook(change)
    want = one_by_one(routed, inputs, monkeypatch)
    with mode():
        for _ in range(3):
            torch.testing.assert_close(routed(**inputs).logits, want, **CLOSE)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_hook_that_comes_later_and_changes_the_input_is_seen(mode, routed_over, batch, monkeypatch, taken):
    routed, inputs = routed_over("llama", KINDS["all"]), batch("llama")
    with mode():
        for _ in range(2):
            routed(**inputs)
    assert taken

    def change(_, args):
        args[0].mul_(-0.5)

    hook = routed.model.model.layers[0].self_attn.k_proj.register_forward_pre_hook(change)
    want = one_by_one(routed, inputs, monkeypatch)
    with mode():
        torch.testing.assert_close(routed(**inputs).logits, want, **CLOSE)
        hook.remove()
        taken.clear()
        routed(**inputs)
    assert taken


def test_inputs_without_versions_are_shared_in_forwards_of_the_model_alone(routed_over, batch):
    routed, inputs = routed_over("llama", KINDS["all"]), batch("llama")
    q, k = (routed.attached.layers[f"model.layers.0.self_attn.{kind}"] for kind in ("q_proj", "k_proj"))
    with torch.inference_mode():
        for _ in range(2):
            routed(**inputs)
        x = torch.randn(2, 3, q.in_features)
        want = k(2 * x)
        q(x)
        x.mul_(2)
        torch.testing.assert_close(k(x), want)


@torch.no_grad()
@pytest.mark.parametrize("which", ["all", "first pass"])
def test_known_targets_are_mixed_without_asking_again_what_a_forward_found(which, routed_over, batch, count_calls):
    routed, inputs = routed_over("llama", KINDS[which]), batch("llama")
    for _ in range(2):
        routed(**inputs)
    calls = count_calls(routed.session, "_quick")
    routed(**inputs)
    assert 0 < len(calls) < 5
    gate = next(iter(routed.router.gates.values())).gate
    seen = []
    block = routed.model.model.layers[0]
    hooks = []
    late = block.register_forward_pre_hook(
        lambda *_: hooks.append(gate.register_forward_hook(lambda *_: seen.append(1)))
    )
    routed(**inputs)  # a hook that comes in the middle of a forward
    assert seen or which == "first pass"  # whose gate has spoken by then
    for hook in (late, *hooks):
        hook.remove()


@torch.no_grad()
def test_what_is_learnt_in_one_mode_serves_the_others(routed_over, batch, monkeypatch, taken):
    routed, inputs = routed_over("llama", KINDS["top 2"]), batch("llama")
    want = one_by_one(routed, inputs, monkeypatch)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            for _ in range(2):
                torch.testing.assert_close(routed(**inputs).logits, want, **CLOSE)
        assert taken
        taken.clear()
    routed.requires_grad_(True)  # what inference mode made is not in the way of training
    with torch.enable_grad():
        routed(**inputs).loss.backward()
    assert all(parameter.grad is not None for parameter in routed.router.parameters())


@torch.no_grad()
def test_what_changes_between_siblings_is_seen(routed_over, batch):
    routed, inputs = routed_over("llama", KINDS["all"]), batch("llama")
    for _ in range(2):
        routed(**inputs)
    q, k = (routed.attached.layers[f"model.layers.0.self_attn.{kind}"] for kind in ("q_proj", "k_proj"))
    gate, x = routed.router.site("model.layers.0.self_attn.k_proj").gate, torch.randn(3, 9, q.in_features)
    for change in (lambda: gate.weight_ED.mul_(-1), lambda: k.a_RD.mul_(-1)):
        q(x)
        change()
        found = k(x)
        torch.testing.assert_close(found, k(x))
    q(x)
    with routed.transformed(lambda site, routing: routing._replace(gates=torch.zeros_like(routing.gates))):
        torch.testing.assert_close(k(x), k.base_layer(x))
    q(x)
    with routed.recording() as decisions:
        k(x)
    assert len(decisions) == 1


@torch.no_grad()
def test_every_thread_has_its_own_siblings(routed_over, taken):
    routed = routed_over("llama", KINDS["top 2"])
    batches = [torch.randint(3, 67, (2, 5), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    for ids in batches:
        routed(input_ids=ids)
    q, k = (routed.attached.layers[f"model.layers.0.self_attn.{kind}"] for kind in ("q_proj", "k_proj"))
    inputs = [torch.randn(2, 3, q.in_features, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    want = [(q(x).clone(), k(x).clone()) for x in inputs]
    wrong: list[str] = []
    taken.clear()

    @torch.no_grad()
    def ask(number: int) -> None:
        for _ in range(150):
            try:
                torch.testing.assert_close((q(inputs[number]), k(inputs[number])), want[number])
            except Exception as error:  # noqa: BLE001 - whatever it is, the test's own thread has to hear of it
                wrong.append(repr(error))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=ask, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert wrong == []
    assert len(taken) == 2 * 2 * 150


@torch.no_grad()
def test_nothing_is_kept_after_a_forward(routed_over, batch):
    routed, inputs = routed_over("llama", KINDS["all"]), batch("llama")
    for _ in range(2):
        routed(**inputs)
    layer = routed.attached.layers["model.layers.0.self_attn.k_proj"]
    hook = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        routed(**inputs)
    hook.remove()
    assert set(routed.session._families._of.values()) - {None}
    here = routed.session._families._here
    assert here.pending is None
    assert here.last is None


@torch.no_grad()
def test_records_and_ablations_see_every_site(routed_over, batch):
    routed, inputs = routed_over("llama", KINDS["top 2"]), batch("llama")
    for _ in range(2):
        routed(**inputs)
    with routed.recording() as decisions:
        routed(**inputs)
    assert {each.site for each in decisions} == set(routed.router.layout)
    with routed.transformed(lambda site, routing: routing._replace(gates=torch.zeros_like(routing.gates))):
        without = routed(**inputs).logits
    with routed.disable():
        torch.testing.assert_close(without, routed.model(**inputs).logits)


@torch.no_grad()
def test_a_router_is_saved_as_before(routed_over, batch, tmp_path):
    routed, inputs = routed_over("llama", KINDS["all"]), batch("llama")
    first = routed.save(tmp_path / "first")
    for _ in range(2):
        routed(**inputs)
    second = routed.save(tmp_path / "second")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
