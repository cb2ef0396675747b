"""Copies and near-copies in factor form, whatever the split into factors."""

import pytest
import torch

from compose.adapter import Adapter, LowRank
from compose.errors import AdapterFormatError
from compose.hub_index.audit.duplicates import candidates, copies_of, delta_cosine, find_copies, inner_product
from compose.hub_index.audit.reference import Member


def rotated(adapter: Adapter, name: str, noise: float = 0.0, size: float = 1.0) -> Adapter:
    """The same deltas in other factors, with noise of this share and another size."""
    targets = {}
    for module, one in adapter.targets.items():
        mixing = torch.randn(one.rank, one.rank).double()
        a, b = torch.linalg.solve(mixing, one.a.double()), one.b.double() @ mixing
        b = b + noise * torch.randn(b.shape).double() * b.norm() / b.numel() ** 0.5
        targets[module] = LowRank(a, b, one.scaling * size)
    return Adapter(name, adapter.base, targets)


def dense(adapter: Adapter) -> torch.Tensor:
    return torch.cat([(one.scaling * one.b.double() @ one.a.double()).flatten() for one in adapter.targets.values()])


def test_inner_products_are_those_of_dense_deltas(sibling) -> None:
    one, other = sibling("a", 0), sibling("b", 1)
    for path, update in one.targets.items():
        expected = float((update.delta().double() * other.targets[path].delta().double()).sum())
        assert inner_product(update, other.targets[path]) == pytest.approx(expected, rel=1e-5)
    expected = float(torch.nn.functional.cosine_similarity(dense(one), dense(other), dim=0))
    assert delta_cosine(one.targets, other.targets) == pytest.approx(expected, rel=1e-9)


def test_factors_of_other_gauge_and_rank_are_the_same_adapter(sibling) -> None:
    one = sibling("a", 0)
    assert delta_cosine(one.targets, rotated(one, "b", size=7.0).targets) == pytest.approx(1.0, abs=1e-9)
    assert delta_cosine(one.targets, rotated(one, "b", size=-1.0).targets) == pytest.approx(-1.0, abs=1e-9)
    padded = {
        path: LowRank(torch.cat([u.a, torch.zeros(2, 10)]), torch.cat([u.b, torch.randn(12, 2)], 1), u.scaling)
        for path, u in one.targets.items()
    }
    assert delta_cosine(one.targets, padded) == pytest.approx(1.0, abs=1e-9)


def test_missing_targets_count_as_zero(sibling) -> None:
    one = sibling("a", 0)
    part = dict(list(one.targets.items())[:2])
    expected = (sum(u.norm() ** 2 for u in part.values()) / sum(u.norm() ** 2 for u in one.targets.values())) ** 0.5
    assert delta_cosine(one.targets, part) == pytest.approx(expected, rel=1e-9)
    assert delta_cosine(one.targets, {}) == 0.0


def test_near_copies_are_found_and_siblings_are_not(siblings) -> None:
    near, far = rotated(siblings[3], "near", noise=0.05), rotated(siblings[4], "far", noise=0.6)
    found = find_copies([Member.of(one) for one in (*siblings, near, far)])
    assert [(pair.first, pair.second, pair.exact) for pair in found.pairs] == [("sibling-3", "near", False)]
    assert 0.99 < found.pairs[0].cosine < 1.0
    assert found.unread == {}


def test_files_of_one_hash_are_copies_and_read_no_factor(sibling) -> None:
    one = Member.of(sibling("a", 0))
    first = Member("first", one.key, one.statistics, "a" * 64)
    second = Member("second", one.key, one.statistics, "a" * 64)
    assert find_copies([first, second]).pairs == ((("first", "second", 1.0, True)),)
    assert copies_of(first, [second]).pairs[0].exact


def test_candidates_leave_out_no_pair_that_is_near(sibling) -> None:
    made = [sibling(str(seed), seed) for seed in range(4)]
    made += [rotated(one, f"{one.name}-{noise}", noise=noise) for one in made for noise in (0.01, 0.1, 0.3, 1.0)]
    members = [Member.of(one) for one in made]
    allowed = set(candidates(members, members, 0.9))
    near = {
        (i, j)
        for i in range(len(made))
        for j in range(len(made))
        if delta_cosine(made[i].targets, made[j].targets) > 0.9
    }
    assert near <= allowed
    assert len(near) > len(made)
    assert len(allowed) < len(made) ** 2


def test_an_adapter_that_cannot_be_read_is_told(sibling) -> None:
    def fail() -> Adapter:
        raise AdapterFormatError("gone")

    one = Member.of(sibling("a", 0))
    gone = Member("gone", one.key, one.statistics, "b" * 64, fail)
    found = copies_of(one, [gone])
    assert found.pairs == ()
    assert found.unread == {"gone": "gone"}


def test_other_bases_are_not_compared(sibling) -> None:
    one, other = sibling("a", 0), sibling("b", 0, base="owner/other")
    assert find_copies([Member.of(one), Member.of(other)]).pairs == ()
