"""diagnose against dense arithmetic over whole adapters; what it warns of, and what it does not."""

import json

import pytest
import torch

import compose
from compose.adapter import Adapter, LowRank
from compose.bank import Bank
from compose.engine.diagnostics import diagnose
from compose.errors import IncompatibleError, UnknownNameError

TARGETS = ["m.layers.0.q", "m.layers.0.up", "m.layers.1.q"]
SIZES = {"m.layers.0.q": (40, 48), "m.layers.0.up": (64, 48), "m.layers.1.q": (40, 48)}
NAMES = ("math", "code", "law")
WEIGHTS = {"math": {"*": 0.7, "*.1.*": -2.0}, "code": 0.5, "law": 1.0}


def adapter(name: str, seed: int, *, rank: int = 3, a_seed: int | None = None, skip: str = "-", size: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.Generator().manual_seed(seed + 1000 if a_seed is None else a_seed)
    targets = {}
    for target, (out, width) in SIZES.items():
        a = torch.randn(rank, width, generator=shared, dtype=torch.float64)
        b = torch.randn(out, rank, generator=generator, dtype=torch.float64)
        if skip not in target:
            targets[target] = LowRank(a, b, 0.5 * size)
    return Adapter(name, "base", targets)


@pytest.fixture
def adapters() -> list[Adapter]:
    return [adapter("math", 1), adapter("code", 2, rank=5, skip=".1."), adapter("law", 3, rank=2)]


def dense(adapters, target) -> torch.Tensor:
    out, width = SIZES[target]
    none = torch.zeros(out, width, dtype=torch.float64)
    return torch.stack([one.targets[target].delta() if target in one.targets else none for one in adapters])


def weights_at(target) -> torch.Tensor:
    return torch.tensor([-2.0 if ".1." in target else 0.7, 0.5, 1.0], dtype=torch.float64)


def close(found, expected, tolerance: float = 1e-10) -> None:
    assert found == pytest.approx(expected, abs=tolerance, rel=tolerance)


def test_figures_of_adapters_equal_dense_ones(adapters) -> None:
    found = diagnose(adapters, WEIGHTS)
    flat = torch.cat([dense(adapters, target).flatten(1) for target in TARGETS], dim=1)
    sizes = flat.norm(dim=1)
    weighted = torch.cat(
        [weights_at(target)[:, None] * dense(adapters, target).flatten(1) for target in TARGETS], dim=1
    )
    for number, one in enumerate(found.adapters):
        assert one.name == NAMES[number]
        close(one.norm, float(sizes[number]))
        close(one.weighted_norm, float(weighted[number].norm()))
        assert one.merged_cosine is None
    assert [one.weight for one in found.adapters] == [None, 0.5, 1.0]
    assert [one.targets for one in found.adapters] == [3, 2, 3]
    close(list(found.cosines[0]), (flat @ flat.T / sizes[:, None] / sizes)[0].tolist())
    spectra = [torch.linalg.svdvals(dense(adapters, target)[0]).square() for target in TARGETS]
    close(found.adapters[0].stable_rank, sum(float(s.sum() / s[0]) for s in spectra) / 3)
    close(found.adapters[0].top_energy, sum(float(s[0] / s.sum()) for s in spectra) / 3)
    close(found.total.norm, float(weighted.sum(dim=0).norm()))
    close(found.total.interference, float(weighted.sum(dim=0).norm() ** 2 / weighted.norm() ** 2))


def test_figures_of_targets_equal_dense_ones(adapters) -> None:
    found = diagnose(adapters, WEIGHTS)
    assert found.pairs == ((0, 1), (0, 2), (1, 2))
    for one in found.targets:
        all_of_it = dense(adapters, one.name)
        weighted = weights_at(one.name)[:, None, None] * all_of_it
        missing = ".1." in one.name
        assert (one.out_features, one.in_features) == SIZES[one.name]
        assert one.norms[1] is None if missing else one.norms[1] == pytest.approx(float(all_of_it[1].norm()))
        close(one.norms[0], float(all_of_it[0].norm()))
        close(one.sum_norm, float(weighted.sum(dim=0).norm()))
        close(one.interference, float(weighted.sum(dim=0).norm() ** 2 / weighted.norm() ** 2))
        cosine = (all_of_it[0] * all_of_it[2]).sum() / all_of_it[0].norm() / all_of_it[2].norm()
        close(one.cosines[1], float(cosine))
        assert (one.cosines[0] is None) == missing
        close(one.cancelled, float(1 - weighted.sum(dim=0).abs().sum() / weighted.abs().sum()))
        assert one.merged_norm is None
        assert one.lost is None


def test_overlaps_are_means_over_the_targets_that_both_have(adapters) -> None:
    found = diagnose(adapters, WEIGHTS)
    for i, j, targets in ((0, 1, TARGETS[:2]), (0, 2, TARGETS)):
        rows, columns = [], []
        for target in targets:
            bases = [torch.linalg.qr(adapters[one].targets[target].a.T)[0] for one in (i, j)]
            rows.append(float((bases[0].T @ bases[1]).square().sum()) / min(bases[0].shape[1], bases[1].shape[1]))
            bases = [torch.linalg.qr(adapters[one].targets[target].b)[0] for one in (i, j)]
            columns.append(float((bases[0].T @ bases[1]).square().sum()) / min(bases[0].shape[1], bases[1].shape[1]))
        close(found.row_overlap[i][j], sum(rows) / len(rows))
        close(found.column_overlap[i][j], sum(columns) / len(columns))
        close(found.column_chance[i][j], sum(max(3, (3, 5, 2)[j]) / SIZES[one][0] for one in targets) / len(targets))


def test_energy_kept_by_ranks_equals_dense_svd(adapters) -> None:
    found = diagnose(adapters, WEIGHTS).total
    sums = {target: torch.einsum("n,noi->oi", weights_at(target), dense(adapters, target)) for target in TARGETS}
    energies = {target: torch.linalg.svdvals(matrix).square() for target, matrix in sums.items()}
    whole = sum(float(one.sum()) for one in energies.values())
    assert [one.rank for one in found.energy] == [1, 2, 4, 8, 10]
    assert found.rank == 10
    for one in found.energy:
        close(one.kept, sum(float(s[: one.rank].sum()) for s in energies.values()) / whole)
        shares = {target: float(s[: one.rank].sum() / s.sum()) for target, s in energies.items()}
        close(one.worst, min(shares.values()))
    kept = [sum(float(s[:rank].sum()) for s in energies.values()) / whole for rank in range(1, 11)]
    for share, rank in found.rank_for.items():
        assert kept[rank - 1] >= float(share) > ([0.0, *kept][rank - 1])


def test_a_recompressed_result_is_measured_against_what_went_in(adapters) -> None:
    merged = compose.merge(adapters, weights=WEIGHTS, rank=2)
    found = diagnose(adapters, merged=merged)
    flat = torch.cat([merged.targets[target].delta.dense().flatten() for target in TARGETS])
    weighted = torch.cat(
        [weights_at(target)[:, None] * dense(adapters, target).flatten(1) for target in TARGETS], dim=1
    )
    whole = weighted.sum(dim=0)
    assert found.merged is not None
    close(found.merged.norm, float(flat.norm()))
    close(found.merged.sum_cosine, float(flat @ whole / flat.norm() / whole.norm()))
    close(found.merged.sum_distance, float((flat - whole).norm() / whole.norm()))
    close(found.merged.lost, float((flat - whole).norm() / whole.norm()))
    close(found.merged.lost, merged.relative_error)
    for number, one in enumerate(found.adapters):
        close(one.merged_cosine, float(flat @ weighted[number] / flat.norm() / weighted[number].norm()))
    for one in found.targets:
        assert one.lost == merged.targets[one.name].error
    assert 2 in [one.rank for one in found.total.energy]
    kept = next(one.kept for one in found.total.energy if one.rank == 2)
    close(1 - kept, found.merged.lost**2)
    assert any("Recompression lost" in warning for warning in found.warnings)


def test_a_result_without_low_rank_is_read_line_by_line(adapters) -> None:
    merged = compose.merge(adapters, "ties", density=0.3)
    flat = torch.cat([merged.targets[target].delta.dense().flatten() for target in TARGETS])
    inputs = torch.cat([dense(adapters, target).flatten(1) for target in TARGETS], dim=1)
    exact = diagnose(adapters, merged=merged, lines=None)
    assert exact.merged is not None
    assert not exact.merged.estimated
    close(exact.merged.norm, float(flat.norm()))
    close(exact.adapters[0].merged_cosine, float(flat @ inputs[0] / flat.norm() / inputs[0].norm()))
    sampled = diagnose(adapters, merged=merged, lines=32)
    assert sampled.merged is not None
    assert sampled.merged.estimated
    assert sampled.merged.norm == pytest.approx(float(flat.norm()), rel=0.2)
    assert diagnose(adapters, merged=merged, lines=0).merged is None


def test_signs_are_those_of_weighted_deltas(adapters) -> None:
    found = diagnose(adapters, WEIGHTS, lines=None).signs
    products = torch.cat(
        [(weights_at(target)[:, None] * dense(adapters, target).flatten(1))[[0, 2]].prod(dim=0) for target in TARGETS]
    )
    assert found is not None
    assert found.lines == found.of == 144
    close(found.conflict[0][2], float((products < 0).double().mean()))
    close(found.weighted[0][2], float(products.clamp(max=0).abs().sum() / products.abs().sum()))
    sampled = diagnose(adapters, WEIGHTS, lines=16).signs
    assert sampled is not None
    assert 24 <= sampled.lines <= 48
    assert diagnose(adapters, WEIGHTS, lines=16, seed=1).signs != sampled
    assert diagnose(adapters, lines=0).signs is None


def test_the_split_into_factors_does_not_matter(adapters) -> None:
    generator = torch.Generator().manual_seed(9)
    turned = []
    for one in adapters:
        targets = {}
        for target, update in one.targets.items():
            turn = torch.randn(update.rank, update.rank, generator=generator, dtype=torch.float64)
            a, b = torch.linalg.solve(turn, update.a), update.b @ turn * update.scaling / 3
            targets[target] = LowRank(a, b, 3.0)
        turned.append(Adapter(one.name, one.base, targets))
    plain, other = (_numbers(diagnose(one, WEIGHTS).as_dict()) for one in (adapters, turned))
    close(other, plain, 1e-9)


def _numbers(value) -> list[float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in _numbers(item)]
    if isinstance(value, list | tuple):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, float) else []


def test_adapters_of_one_seed_are_named_and_others_are_not() -> None:
    others = [adapter("x", 7), adapter("y", 8)]
    found = diagnose([adapter("math", 1, a_seed=5), adapter("code", 2, a_seed=5), *others])
    assert len(found.warnings) == 1
    assert found.warnings[0].startswith("math and code: these read almost the same input directions")
    assert "row spaces overlap by 100 %, chance would give 6 %" in found.warnings[0]
    close(found.row_overlap[0][1], 1.0)
    assert found.column_overlap[0][1] < 0.3
    close(found.row_chance[0][1], 3 / 48)
    assert diagnose(others).warnings == ()


def test_a_whole_bank_of_one_seed_is_named_as_a_group() -> None:
    found = diagnose([adapter(f"a{number}", number, a_seed=5) for number in range(6)])
    assert len(found.warnings) == 1
    assert found.warnings[0].startswith("a0, a1, a2, a3, and 2 more: these read")


def test_many_pairs_of_a_larger_bank_are_counted() -> None:
    bank = [adapter(f"{name}{number}", 10 * seed + number, a_seed=seed) for name, seed in (("a", 5), ("b", 6))
            for number in range(4)]  # fmt: skip
    found = diagnose(bank).warnings
    assert len(found) == 1
    assert found[0].startswith("12 of the 28 pairs among a0, a1, a2, a3, and 4 more: these read")


def test_a_same_seed_bank_that_was_trained_on_is_still_seen() -> None:
    """Principal cosines of .98, as an audit of public same-seed banks measured."""
    trained = []
    for number in range(2):
        one = adapter(f"a{number}", number, a_seed=5)
        generator = torch.Generator().manual_seed(70 + number)
        moved = {
            target: LowRank(
                update.a + 0.1 * torch.randn(update.a.shape, generator=generator, dtype=torch.float64), update.b, 1.0
            )
            for target, update in one.targets.items()
        }
        trained.append(Adapter(one.name, one.base, moved))
    assert any("one seed" in warning for warning in diagnose(trained).warnings)


def test_an_adapter_that_is_there_twice_and_one_that_cancels() -> None:
    one = adapter("math", 1)
    twin = Adapter("twin", "base", one.targets)
    found = diagnose([one, twin])
    close(found.cosines[0][1], 1.0)
    close(found.row_overlap[0][1], 1.0)
    close(found.column_overlap[0][1], 1.0)
    close(found.total.interference, 2.0)
    assert [warning[:45] for warning in found.warnings] == ["math and twin: practically the same adapter ("]
    against = diagnose([one, twin], [1.0, -1.0])
    assert against.total.norm == 0.0
    assert against.total.interference == 0.0
    assert against.total.energy == ()
    assert against.signs is not None
    close(against.signs.cancelled, 1.0)
    assert against.warnings[0].startswith("The weighted adapters cancel: their sum has 0 %")


def test_zero_adapters_and_missing_targets_give_none_and_are_said(adapters) -> None:
    nothing = Adapter(
        "empty", "base", {target: LowRank(x.a, 0 * x.b, 1.0) for target, x in adapters[0].targets.items()}
    )
    found = diagnose([*adapters, nothing], merged=compose.merge([*adapters, nothing]))
    assert found.adapters[3].norm == 0
    assert found.adapters[3].stable_rank is None
    assert found.adapters[3].merged_cosine is None
    assert found.targets[2].norms[1] is None
    assert found.targets[2].norms[3] == 0.0
    assert found.cosines[3] == (None,) * 4
    assert found.row_overlap[0][3] is None
    assert found.signs is not None
    assert found.signs.conflict[0][3] is None
    assert found.warnings[0].startswith("empty: every delta is 0")
    assert "code (2 of 3): without some of the targets" in found.warnings[-1]
    text = json.dumps(found.as_dict(), allow_nan=False)
    assert json.loads(text)["schema_version"] == 1
    alone = diagnose([nothing])
    assert alone.total.norm == 0.0
    assert alone.total.interference is None
    json.dumps(alone.as_dict(), allow_nan=False)


def test_adapters_without_a_common_target() -> None:
    found = diagnose([adapter("a", 1, skip=".0."), adapter("b", 2, skip=".1.")])
    assert found.row_overlap[0][1] is None
    assert found.cosines[0][1] == 0.0
    close(found.total.interference, 1.0)


def test_one_that_drowns_the_others_is_named() -> None:
    found = diagnose([adapter("loud", 1, size=30.0), adapter("calm", 2)], merged=None)
    assert len(found.warnings) == 1
    assert found.warnings[0].startswith("loud is ")
    assert "norm_match" in found.warnings[0]
    assert diagnose([adapter("loud", 1, size=30.0), adapter("calm", 2)], [1.0, 30.0]).warnings == ()


def test_an_adapter_the_result_leaves_aside_is_named() -> None:
    adapters = [adapter("kept", 1), adapter("lost", 2, size=0.2)]
    found = diagnose(adapters, merged=compose.merge(adapters, rank=1))
    assert any(warning.startswith("Little is left in the result of lost (") for warning in found.warnings)
    alike = [Adapter(name, "base", adapter("x", 1).targets) for name in "abcdef"] + [adapter("far", 9)]
    assert not any("far" in warning for warning in diagnose(alike, merged=compose.merge(alike)).warnings)
    many = [adapter(f"a{number}", number) for number in range(12)]
    assert diagnose(many, merged=compose.merge(many)).warnings == ()


def test_targets_can_be_drawn_and_weights_leave_some_out(adapters) -> None:
    found = diagnose(adapters, max_targets=2)
    assert (len(found.targets), found.num_targets) == (2, 3)
    assert found == diagnose(adapters, max_targets=2)
    drawn = {tuple(one.name for one in diagnose(adapters, max_targets=1, seed=seed).targets) for seed in range(8)}
    assert len(drawn) > 1
    only = diagnose(adapters, {"math": {"*.1.*": 1.0}, "code": {"*.0.q": 2.0}})
    assert [one.name for one in only.targets] == ["m.layers.0.q", "m.layers.1.q"]
    assert only.num_targets == 2
    assert len(only.adapters) == 2


def test_a_merge_knows_its_diagnostics(adapters) -> None:
    merged = compose.merge(Bank.from_adapters(adapters), "norm_match", WEIGHTS, rank=4)
    found = merged.diagnostics
    assert found is merged.diagnostics
    assert found == diagnose(adapters, WEIGHTS, merged)
    assert found.merged is not None
    assert (found.merged.method, found.merged.rank) == ("norm_match", 4)


def test_what_cannot_be_examined_is_refused(adapters) -> None:
    with pytest.raises(UnknownNameError, match="'nobody'"):
        diagnose(adapters, {"nobody": 1.0})
    with pytest.raises(IncompatibleError, match="nothing to examine"):
        diagnose(adapters, {"math": 0.0})
    with pytest.raises(IncompatibleError, match="max_targets"):
        diagnose(adapters, max_targets=0)
    with pytest.raises(IncompatibleError, match="lines"):
        diagnose(adapters, lines=-1)


def test_the_input_is_not_changed(adapters) -> None:
    before = [{target: (x.a.clone(), x.b.clone()) for target, x in one.targets.items()} for one in adapters]
    diagnose(adapters, WEIGHTS)
    for one, kept in zip(adapters, before, strict=True):
        for target, (a, b) in kept.items():
            assert torch.equal(one.targets[target].a, a)
            assert torch.equal(one.targets[target].b, b)


def test_a_limit_of_work_draws_targets(adapters) -> None:
    assert diagnose(adapters, max_work=1e30) == diagnose(adapters)
    assert len(diagnose(adapters, max_work=1.0).targets) == 1
    part = diagnose(adapters, max_work=1.5e8)
    assert (len(part.targets), part.num_targets) == (2, 3)
    assert len(diagnose(adapters, max_work=1.5e8, max_targets=1).targets) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["sum", "ties"])
def test_another_device_finds_the_same(adapters, method) -> None:
    merged = compose.merge(adapters, method, WEIGHTS)
    here, there = (diagnose(adapters, merged=merged, device=device) for device in ("cpu", "cuda"))
    assert there.warnings == here.warnings
    # an error that is 0 is the root of a difference that vanishes in float64: up to 1.5e-8 per entry
    close(_numbers(there.as_dict()), _numbers(here.as_dict()), 1e-7)
