"""merge on banks: exact sums, weights per pattern, saving, loading in PEFT, and adding to a model's weights."""

import inspect
import json
from dataclasses import fields

import pytest
import torch
from torch.testing import assert_close

import compose
from compose.adapter import Adapter, LowRank
from compose.bank import Bank
from compose.engine.merge import target_deltas
from compose.engine.merge_weights import parse_expression, resolve_weights
from compose.errors import IncompatibleError, UnknownNameError
from compose.merging.deltas import Streamed
from compose.merging.method import METHODS, Context, Contract, make_method

TARGETS = ["model.layers.0.q", "model.layers.0.v", "model.layers.1.q"]


@pytest.fixture
def adapters() -> list[Adapter]:
    generator = torch.Generator().manual_seed(3)

    def update(rank: int, scaling: float) -> LowRank:
        a, b = torch.randn(rank, 12, generator=generator), torch.randn(9, rank, generator=generator)
        return LowRank(a, b, scaling)

    return [
        Adapter("math", "base", {target: update(3, 0.5) for target in TARGETS}),
        Adapter("code", "base", {target: update(2, 2.0) for target in TARGETS[:2]}),
        Adapter("law", "base", {target: update(5, -1.0) for target in TARGETS}),
    ]


def dense(adapters, target, weights) -> torch.Tensor:
    return sum(
        weights[adapter.name] * adapter.targets[target].delta()
        for adapter in adapters
        if target in adapter.targets and adapter.name in weights
    )


def test_the_default_is_the_exact_sum_of_whoever_is_there(adapters) -> None:
    merged = compose.merge(adapters)
    assert merged.low_rank
    for target in TARGETS:
        assert_close(merged.adapter.targets[target].delta(), dense(adapters, target, {"math": 1, "code": 1, "law": 1}))
    assert merged.adapter.ranks == {TARGETS[0]: 10, TARGETS[1]: 10, TARGETS[2]: 8}


def test_weights_come_as_numbers_expressions_and_patterns(adapters) -> None:
    by_name = compose.merge(adapters, weights={"law": -0.3, "math": 0.6})
    by_text = compose.merge(adapters, weights="0.6*math - 0.3*law")
    in_order = compose.merge(adapters, weights=[0.6, 0.0, -0.3])
    by_pattern = compose.merge(adapters, weights={"math": {"*": 0.6, "*.1.*": 2.0}, "law": -0.3})
    for target in TARGETS:
        expected = dense(adapters, target, {"math": 0.6, "law": -0.3})
        for merged in (by_name, by_text, in_order):
            assert_close(merged.adapter.targets[target].delta(), expected)
        number = 2.0 if ".1." in target else 0.6
        assert_close(
            by_pattern.adapter.targets[target].delta(), dense(adapters, target, {"math": number, "law": -0.3})
        )
    assert [parent["name"] for parent in by_name.recipe["parents"]] == ["math", "law"]
    assert by_pattern.recipe["parents"][0]["weight"] == {TARGETS[0]: 0.6, TARGETS[1]: 0.6, TARGETS[2]: 2.0}


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("0.6*math + 0.4*code - 0.3*toxic", {"math": 0.6, "code": 0.4, "toxic": -0.3}),
        ("math", {"math": 1.0}),
        ("-2 * a-b/c.d + .5*x", {"a-b/c.d": -2.0, "x": 0.5}),
        ("  1e-2*x  ", {"x": 0.01}),
    ],
)
def test_an_expression_is_read(text, weights) -> None:
    assert parse_expression(text) == weights


@pytest.mark.parametrize("text", ["", "0.5*", "a b", "a + + b", "a + a", "*a"])
def test_what_is_no_expression_is_refused(text) -> None:
    with pytest.raises(IncompatibleError, match="expression"):
        parse_expression(text)


def test_weights_that_fit_nothing_are_refused() -> None:
    names, targets = ("a", "b"), ["x.q"]
    with pytest.raises(UnknownNameError, match="'c'"):
        resolve_weights({"c": 1.0}, names, targets)
    with pytest.raises(IncompatibleError, match=r"'\*k' of 'a' matches no target"):
        resolve_weights({"a": {"*k": 1.0}}, names, targets)
    with pytest.raises(IncompatibleError, match="finite"):
        resolve_weights({"a": float("nan")}, names, targets)
    with pytest.raises(IncompatibleError, match="one weight per adapter"):
        resolve_weights([1.0], names, targets)
    with pytest.raises(IncompatibleError, match="no adapter"):
        resolve_weights({}, names, targets)


def test_recompression_is_optimal_and_its_error_is_told(adapters) -> None:
    merged = compose.merge(adapters, rank=4)
    lost = total = 0.0
    for target in TARGETS:
        whole = dense(adapters, target, {"math": 1, "code": 1, "law": 1})
        s = torch.linalg.svdvals(whole.double()).square()
        lost, total = lost + float(s[4:].sum()), total + float(s.sum())
        assert merged.adapter.targets[target].rank == 4
        error = (merged.adapter.targets[target].delta() - whole).norm() / whole.norm()
        assert merged.targets[target].error == pytest.approx(float(error), rel=1e-3)
    assert merged.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    with pytest.raises(IncompatibleError, match="rank must be at least 1"):
        compose.merge(adapters, rank=0)
    with pytest.raises(IncompatibleError, match="energy"):
        compose.merge(adapters, energy=1.5)


class _EveryOtherEntry:
    """A rule without a low-rank form: every other entry of the sum."""

    contract = Contract(summary="test", paper="none", low_rank=False)

    def merge(self, deltas, context):
        whole = deltas.combine(deltas.weights).dense()
        whole[:, ::2] = 0
        return Streamed(lambda low, high: whole[low:high], deltas.shape)


@pytest.fixture
def sparse_rule(monkeypatch):
    from dataclasses import dataclass

    kind = dataclass(frozen=True, kw_only=True)(_EveryOtherEntry)
    assert "sum" in METHODS
    monkeypatch.setitem(METHODS._entries, "every_other", kind)
    return "every_other"


def test_a_rule_without_a_low_rank_form_says_so_and_offers_ways_on(adapters, sparse_rule) -> None:
    merged = compose.merge(adapters, sparse_rule)
    with pytest.raises(IncompatibleError, match=r"rank=.*merge_into"):
        _ = merged.adapter
    small = compose.merge(adapters, sparse_rule, rank=3)
    for target in TARGETS:
        whole = merged.targets[target].delta.dense()
        u, s, v = torch.linalg.svd(whole, full_matrices=False)
        assert_close(small.adapter.targets[target].delta(), u[:, :3] * s[:3] @ v[:3], atol=1e-4, rtol=1e-4)
        assert small.targets[target].error == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-3)


def test_methods_spaces_and_counts_are_checked_before_any_work(adapters) -> None:
    with pytest.raises(UnknownNameError, match="unknown merge method 'summ'; did you mean 'sum'"):
        compose.merge(adapters, "summ")
    with pytest.raises(IncompatibleError, match="no option 'density'"):
        compose.merge(adapters, density=0.5)
    with pytest.raises(IncompatibleError, match="no variant in the core space"):
        compose.merge(adapters, "sum", space="core")


def test_save_writes_what_loads_and_computes_the_same(tiny_model, make_bank, tmp_path) -> None:
    model = tiny_model("llama")
    bank = make_bank(model)
    merged = compose.merge(bank, weights=[0.5, -0.3, 0.2, 0.1])
    folder = merged.save(tmp_path / "merged")
    recipe = json.loads((folder / "merge.json").read_text())
    assert (recipe["method"], len(recipe["parents"])) == ("sum", 4)
    ids = torch.tensor([[5, 9, 11, 3]])
    with compose.attach(model, bank) as attached, torch.no_grad():
        attached.set(compose.Coefficients(torch.tensor([0.5, -0.3, 0.2, 0.1])))
        wanted = model(ids).logits
    with compose.attach(model, Bank.open(folder)) as attached, torch.no_grad():
        attached.set("merged")
        assert_close(model(ids).logits, wanted, atol=1e-5, rtol=1e-5)
    peft = pytest.importorskip("peft", reason="PEFT reads what we write")
    with torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(model, str(folder)).eval()
        assert_close(loaded(ids).logits, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merge_into_adds_the_deltas_and_can_be_undone_to_the_bit(tiny_model, make_bank, name) -> None:
    model, ids = tiny_model(name), torch.tensor([[5, 9, 11, 3]])
    bank = make_bank(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with compose.attach(model, bank) as attached, torch.no_grad():
        attached.set(compose.Coefficients(torch.tensor([0.5, -0.3, 0.2, 0.1])))
        wanted = model(ids).logits
    merged = compose.merge(bank, weights=[0.5, -0.3, 0.2, 0.1])
    undo = merged.merge_into(model)
    with torch.no_grad():
        assert_close(model(ids).logits, wanted, atol=1e-4, rtol=1e-4)
    undo()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_an_attached_square_conv1d_gets_its_delta_the_right_way_round(tiny_model, make_bank) -> None:
    model = tiny_model("gpt2")
    bank = make_bank(model)
    target = "transformer.h.0.attn.c_proj"
    before = model.get_submodule(target).weight.detach().clone()
    merged = compose.merge(bank, weights=[1.0, 0.0, 0.0, 0.0])
    with compose.attach(model, bank):
        undo = merged.merge_into(model)
    after = model.get_submodule(target).weight.detach()
    assert_close(after - before, bank["expert-0"].targets[target].delta().T, atol=1e-5, rtol=1e-4)
    undo()


def test_a_tied_weight_is_refused(tiny_model, make_bank) -> None:
    model = tiny_model("gpt2")
    merged = compose.merge(make_bank(model, embeddings=True))
    before = model.transformer.wte.weight.detach().clone()
    with pytest.raises(IncompatibleError, match="is tied"):
        merged.merge_into(model)
    assert torch.equal(model.transformer.wte.weight, before)


def test_half_precision_adapters_are_merged_in_float32(tiny_model, make_bank) -> None:
    """The product of the factors as they are, not of rounded ones or in half precision."""
    model = tiny_model("llama")
    half = [
        Adapter(
            one.name, one.base, {t: LowRank(u.a.bfloat16(), u.b.bfloat16(), u.scaling) for t, u in one.targets.items()}
        )
        for one in (make_bank(model)[name] for name in ("expert-0", "expert-2"))
    ]
    merged = compose.merge(half, weights=[0.3, 0.7])
    assert {update.a.dtype for update in merged.adapter.targets.values()} == {torch.bfloat16}
    target = "model.layers.0.self_attn.q_proj"
    before = model.get_submodule(target).weight.detach().clone()
    merged.merge_into(model)
    pairs = zip((0.3, 0.7), half, strict=True)
    exact = sum(w * u.scaling * u.b.double() @ u.a.double() for w, u in ((w, one.targets[target]) for w, one in pairs))
    change = model.get_submodule(target).weight.detach().double() - before.double()
    assert float((change - exact).norm() / exact.norm()) < 1e-6


def test_infinite_deltas_and_whole_modules_are_refused_and_nothing_changes(tiny_model, make_bank) -> None:
    model = tiny_model("llama")
    target = "model.layers.0.self_attn.q_proj"
    huge = Adapter("x", "", {target: LowRank(torch.full((1, 32), 1e30), torch.full((32, 1), 1e30), 1.0)})
    before = model.get_submodule(target).weight.detach().clone()
    with pytest.raises(IncompatibleError, match="can overflow"):
        compose.merge([huge])
    large = Adapter("x", "", {target: LowRank(torch.full((1, 32), 1e18), torch.full((32, 1), 1e18), 1.0)})
    with pytest.raises(IncompatibleError, match="not finite"):
        compose.merge([large], weights=[1e5]).merge_into(model)
    assert torch.equal(model.get_submodule(target).weight, before)
    one = make_bank(model)["expert-0"]
    classifier = Adapter("head", "", one.targets, full_modules={"score.weight": torch.ones(2, 2)})
    with pytest.raises(IncompatibleError, match="modules_to_save"):
        compose.merge([classifier])


def test_a_merge_that_does_not_fit_changes_nothing(tiny_model, make_bank, adapters) -> None:
    model = tiny_model("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(IncompatibleError, match="no module"):
        compose.merge(adapters).merge_into(model)
    real = next(iter(make_bank(model).targets))
    misfit = Adapter("x", "", {real: LowRank(torch.ones(2, 7), torch.ones(5, 2), 1.0)})
    with pytest.raises(IncompatibleError, match="the delta is"):
        compose.merge([misfit]).merge_into(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_sum_that_cancels_is_no_adapter(adapters) -> None:
    merged = compose.merge([adapters[0], Adapter("twin", "base", adapters[0].targets)], weights=[1.0, -1.0])
    assert max(float(update.delta().abs().max()) for update in merged.adapter.targets.values()) < 1e-5
    with pytest.raises(IncompatibleError, match="zero everywhere"):
        _ = compose.merge(adapters, weights={"math": 0.0}).adapter


@pytest.mark.parametrize("name", sorted(METHODS))
def test_no_option_of_a_method_hides_behind_an_argument_of_merge(name) -> None:
    arguments = set(inspect.signature(compose.merge).parameters)
    options = {field.name for field in fields(METHODS[name])}
    assert options & arguments == ({"rank"} if METHODS[name].contract.own_rank else set())


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].contract.own_rank])
def test_methods_of_a_rank_of_their_own_make_it_at_the_rank_asked_for(adapters, name) -> None:
    merged = compose.merge(adapters, name, rank=3)
    assert max(merged.adapter.ranks.values()) == 3
    assert merged.recipe["rank"] == 3
    assert "rank" not in merged.recipe["options"]
    target = next(iter(merged.targets))
    deltas = target_deltas(adapters, target, [1.0] * 3, torch.device("cpu"))
    expected = make_method(name, {"rank": 3}).merge(deltas, Context()).dense()
    torch.testing.assert_close(merged.targets[target].delta.dense(), expected, rtol=1e-4, atol=1e-5)
    larger = compose.merge(adapters, name).targets[target].delta.dense()
    assert float((larger - expected).norm()) > 0.01 * float(larger.norm())


@pytest.mark.parametrize("method", ["ties", "tsvm", "wudi"])
def test_an_update_that_is_not_finite_is_refused_by_target(method):
    generator = torch.Generator().manual_seed(0)
    adapters = [
        Adapter(
            name,
            "base",
            {"q": LowRank(torch.randn(2, 6, generator=generator), torch.randn(5, 2, generator=generator), 1.0)},
        )
        for name in ("one", "two")
    ]
    with pytest.raises(IncompatibleError, match=r"target q: the merged update is not finite in torch\.float32"):
        compose.merge(adapters, method, rank=2, scale=1e300)
