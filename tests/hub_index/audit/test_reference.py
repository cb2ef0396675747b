"""Groups of siblings: robust z-scores, two steps, and why there is no absolute threshold."""

import numpy as np
import pytest

from compose.adapter import Adapter, LowRank
from compose.hub_index.audit.reference import FEWEST, LIMIT, Feature, Group, Member, Reference


def change(adapter: Adapter, name: str, *, size: float = 1.0, only: str = "") -> Adapter:
    targets = {
        module: LowRank(one.a, one.b * (size if only in module else 1.0), one.scaling)
        for module, one in adapter.targets.items()
    }
    return Adapter(name, adapter.base, targets)


def rank_one(adapter: Adapter, name: str, scale: float = 1.0) -> Adapter:
    """Leave one direction in every target."""
    targets = {}
    for module, one in adapter.targets.items():
        b = one.b.clone()
        b[:, 1:] *= 1e-3
        targets[module] = LowRank(one.a, b * scale, one.scaling)
    return Adapter(name, adapter.base, targets)


def test_a_sibling_is_not_unusual(sibling, siblings) -> None:
    reference = Reference.of(siblings)
    scores = [reference.compare(Member.of(sibling(f"new-{seed}", 100 + seed)))[0].score for seed in range(20)]
    assert sum(score > LIMIT for score in scores) <= 2
    assert np.median(scores) < LIMIT / 2


def test_ten_times_the_norm_is_seen_as_a_shift_of_size_alone(sibling, siblings) -> None:
    found = Reference.of(siblings).compare(Member.of(change(sibling("x", 100), "x", size=10.0)))
    beyond = {(one.feature, one.kind) for one in found if one.score > LIMIT}
    assert {("fro", "shift"), ("sigma1", "shift")} <= beyond
    assert not beyond & {("energy1", "shift"), ("spec_entropy", "shift"), ("kurtosis", "shift")}
    assert next(one for one in found if one.feature == "fro" and one.kind == "shift").z > 5


def test_one_target_that_is_off_is_named(sibling, siblings) -> None:
    odd = "model.layers.1.self_attn.v_proj"
    found = Reference.of(siblings).compare(Member.of(change(sibling("x", 100), "x", size=30.0, only=odd)))
    best = found[0]
    assert (best.kind, best.module) == ("peak", odd)
    assert best.score > LIMIT
    assert all(one.score < LIMIT for one in found if one.kind == "shift")


def test_benign_adapters_of_nearly_rank_one_are_not_flagged_by_that_alone(sibling, siblings) -> None:
    """Of 17 benign real adapters "any module with energy1 > 0.9" flags 13: only the company it keeps says anything."""
    narrow = [rank_one(one, f"narrow-{at}") for at, one in enumerate(siblings)]
    newcomer = Member.of(rank_one(sibling("x", 100), "x"))
    assert min(one.energy1 for one in newcomer.statistics.values()) > 0.9
    among_its_kind = Reference.of(narrow).compare(newcomer)
    assert among_its_kind[0].score < LIMIT
    among_others = Reference.of(siblings).compare(newcomer)
    assert max(one.score for one in among_others if one.feature in ("energy1", "spec_entropy")) > LIMIT


def test_fewer_than_twenty_siblings_are_no_reference(sibling, siblings) -> None:
    odd = Member.of(change(sibling("x", 100), "x", size=1000.0))
    assert Reference.of(siblings[: FEWEST - 1]).compare(odd) == []
    assert Reference.of(siblings[:FEWEST]).compare(odd)[0].score > LIMIT


def test_only_the_same_base_targets_and_ranks_are_siblings(sibling, siblings) -> None:
    reference = Reference.of(siblings)
    assert len(reference.siblings(Member.of(sibling("x", 100)))) == 30
    assert reference.siblings(Member.of(sibling("x", 100, base="owner/other"))) == []
    whole = sibling("x", 100)
    part = Adapter("part", whole.base, dict(list(whole.targets.items())[1:]))
    assert reference.siblings(Member.of(part)) == []
    cut = {path: LowRank(one.a[:2], one.b[:, :2], one.scaling) for path, one in whole.targets.items()}
    assert reference.siblings(Member.of(Adapter("cut", whole.base, cut))) == []


def test_copies_count_once(sibling) -> None:
    one = sibling("x", 0)
    assert Reference.of([change(one, f"copy-{at}") for at in range(40)]).compare(Member.of(sibling("y", 1))) == []


def test_a_member_is_compared_with_the_others_alone(siblings) -> None:
    loud = change(siblings[0], "loud", size=20.0)
    with_it = Reference.of([*siblings, loud])
    without = Reference.of(siblings)
    inside, outside = with_it.compare(Member.of(loud)), without.compare(Member.of(loud))
    assert inside[0].z == pytest.approx(outside[0].z)
    assert inside[0].score > LIMIT


def test_z_scores_by_hand() -> None:
    table = np.array([1.0, 2.0, 3.0, 4.0, 100.0]).reshape(5, 1, 1)
    group = Group(["m"], [Feature("x", 0.001)], table)
    shift = next(one for one in group.compare(np.array([[9.0]])) if one.kind == "shift")
    assert shift.z == pytest.approx((9 - 3) / 1.4826)  # median 3, MAD of (2, 1, 0, 1, 97) is 1
    narrow = Group(["m"], [Feature("x", 0.5)], np.full((5, 1, 1), 3.0))
    shift = next(one for one in narrow.compare(np.array([[4.0]])) if one.kind == "shift")
    assert shift.z == pytest.approx(2.0)  # the floor


def test_an_adapter_of_zeros_is_far_off_and_spoils_no_group(sibling, siblings) -> None:
    zero = change(siblings[0], "zero", size=0.0)
    reference = Reference.of([*siblings, zero])
    assert reference.compare(Member.of(zero))[0].score > LIMIT
    assert np.isfinite([one.score for one in reference.compare(Member.of(sibling("x", 100)))]).all()


def test_the_summaries_of_a_member_are_compared_with_those_of_the_others() -> None:
    generator = np.random.default_rng(0)
    table = generator.normal(size=(6, 3, 1))
    group = Group(["a", "b", "c"], [Feature("x", 1e-9)], table)
    shifts = []
    for number in range(6):
        others = np.delete(table, number, axis=0)
        centre = np.median(others, axis=0)
        spread = 1.4826 * np.median(np.abs(others - centre), axis=0)
        shifts.append(float(np.median((table[number] - centre) / spread)))
    rest = np.array(shifts[1:])
    expected = abs(shifts[0] - np.median(rest)) / max(1.4826 * np.median(np.abs(rest - np.median(rest))), 0.5)
    found = next(one for one in group.compare_member(0) if one.kind == "shift")
    assert found.z == pytest.approx(shifts[0])
    assert found.score == pytest.approx(expected)


def test_p_values_are_ranks_among_the_scores_of_siblings(sibling, siblings) -> None:
    reference = Reference.of(siblings)
    inside = {one.name: reference.p_value(Member.of(one)) for one in siblings}
    assert sorted(inside.values()) == pytest.approx([rank / 30 for rank in range(1, 31)])
    outside = [reference.p_value(Member.of(sibling(f"new-{seed}", 200 + seed))) for seed in range(40)]
    assert np.mean([p <= 0.05 for p in outside]) <= 0.15
    assert reference.p_value(Member.of(change(sibling("x", 100), "x", size=10.0))) == pytest.approx(1 / 31)
    assert Reference.of(siblings[:5]).p_value(Member.of(sibling("x", 100))) is None
