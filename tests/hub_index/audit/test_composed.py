"""The composed delta: statistics of the sum through factors; colluding adapters show in it and not one by one."""

import pytest
import torch

from compose.adapter import Adapter, LowRank
from compose.errors import IncompatibleError
from compose.hub_index.audit.composed import compose_statistics, describe_composition
from compose.hub_index.audit.reference import LIMIT, Member, Reference
from compose.hub_index.audit.statistics import module_statistics


def colluding(first: Adapter, second: Adapter, share: float) -> tuple[Adapter, Adapter]:
    """Put one payload into both: this share of every target's energy, its norm and rank unchanged.

    The payload has the spectrum of what it stands for, so that each adapter alone looks as before.
    """
    made = []
    for one in (first, second):
        targets = {}
        for at, (module, update) in enumerate(one.targets.items()):
            generator = torch.Generator().manual_seed(at)  # the same payload in both
            payload = torch.randn(12, 3, generator=generator) * torch.tensor([1.0, 0.5, 0.25])
            read = torch.randn(3, 10, generator=generator)
            kept = (1 - share) ** 0.5
            b = torch.cat([kept * update.b, (share**0.5) * payload], dim=1)
            u, s, v = torch.linalg.svd(b @ torch.cat([update.a, read]), full_matrices=False)
            whole = LowRank(s[:3, None] * v[:3], u[:, :3], update.scaling)
            factor = update.norm() / whole.norm()
            targets[module] = LowRank(whole.a, whole.b * factor, update.scaling)
        made.append(Adapter(f"{one.name}-bad", one.base, targets))
    return made[0], made[1]


def test_statistics_are_those_of_the_dense_sum(sibling) -> None:
    one, other = sibling("a", 0), sibling("b", 1)
    found = compose_statistics([one, other], [0.6, -0.4])
    for module in one.targets:
        parts = [0.6 * one.targets[module].delta().double(), -0.4 * other.targets[module].delta().double()]
        whole = module_statistics(module, LowRank(sum(parts), torch.eye(12), 1.0))
        for name in ("sigma1", "fro", "energy1", "spec_entropy", "kurtosis"):
            assert getattr(found[module].whole, name) == pytest.approx(getattr(whole, name), rel=1e-5), name
        norms = [float(part.norm()) for part in parts]
        assert found[module].largest == pytest.approx(max(norms), rel=1e-6)
        assert found[module].gain == pytest.approx(whole.fro**2 / sum(norm**2 for norm in norms), rel=1e-5)
        assert found[module].ratio == pytest.approx(whole.fro / max(norms), rel=1e-5)


def test_gain_of_orthogonal_equal_and_cancelling_members(sibling) -> None:
    one = sibling("a", 0)
    same = compose_statistics([one, Adapter("b", one.base, one.targets)], [1.0, 1.0])
    opposite = compose_statistics([one, Adapter("b", one.base, one.targets)], [1.0, -1.0])
    for module in one.targets:
        assert same[module].gain == pytest.approx(2.0)
        assert same[module].ratio == pytest.approx(2.0)
        assert opposite[module].gain == pytest.approx(0.0, abs=1e-12)


def test_members_that_miss_a_target_count_as_zero_there(sibling) -> None:
    one, other = sibling("a", 0), sibling("b", 1)
    part = Adapter("part", one.base, dict(list(other.targets.items())[:1]))
    found = compose_statistics([one, part], [1.0, 1.0])
    last = list(one.targets)[-1]
    assert found[last].whole.fro == pytest.approx(one.targets[last].norm(), rel=1e-9)


def test_a_colluding_pair_passes_one_by_one_and_is_seen_in_the_sum(sibling, siblings) -> None:
    reference = Reference.of(siblings)
    pair = colluding(sibling("x", 100), sibling("y", 101), share=0.5)
    for one in pair:
        assert reference.compare(Member.of(one))[0].score < LIMIT
    found = describe_composition(pair, [1.0, 1.0], reference=reference)
    assert found.draws == 64
    assert found.outliers[0].feature in ("gain", "ratio")
    assert found.outliers[0].score > LIMIT
    benign = describe_composition([sibling("x", 100), sibling("y", 101)], [1.0, 1.0], reference=reference)
    assert benign.outliers[0].score < LIMIT


def test_draws_follow_the_seed_and_never_take_the_members(sibling, siblings) -> None:
    reference = Reference.of(siblings)
    members = [sibling("x", 100), sibling("y", 101)]
    again = [describe_composition(members, [0.6, 0.4], reference=reference, draws=8, seed=seed) for seed in (1, 1, 2)]
    assert again[0].outliers == again[1].outliers
    assert again[0].outliers != again[2].outliers
    own = describe_composition(siblings[:2], [0.6, 0.4], reference=Reference.of(siblings[:21]))
    assert own.draws == 0  # 19 others are left


def test_without_enough_siblings_the_sum_is_described_and_not_compared(sibling, siblings) -> None:
    found = describe_composition(
        [sibling("x", 100), sibling("y", 101)], [1.0, 1.0], reference=Reference.of(siblings[:5])
    )
    assert (found.draws, found.outliers) == (0, ())
    assert len(found.statistics) == 4


def test_layers_are_compared_with_the_largest_member(sibling) -> None:
    one, other = sibling("a", 0), sibling("b", 1)
    found = describe_composition([one, other], [2.0, 0.5], reference=Reference())
    assert [layer.layer for layer in found.layers] == ["0", "1"]
    modules = [module for module in one.targets if ".0." in module]
    whole = sum(float((2 * one.targets[m].delta() + 0.5 * other.targets[m].delta()).norm() ** 2) for m in modules)
    assert found.layers[0].norm == pytest.approx(whole**0.5, rel=1e-5)
    assert found.layers[0].member == "a"
    expected = sum((2 * one.targets[m].norm()) ** 2 for m in modules) ** 0.5
    assert found.layers[0].largest == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("weights", [[0.0, 0.0], [float("nan"), 1.0], [1.0]])
def test_weights_that_compose_nothing(sibling, weights: list[float]) -> None:
    with pytest.raises(IncompatibleError):
        describe_composition([sibling("a", 0), sibling("b", 1)], weights, reference=Reference())
