"""General knowledge subtracted from copies: exact deltas, PEFT's factors, nothing changed in place."""

import pytest
import torch

from compose.adapter import Adapter, LowRank
from compose.errors import IncompatibleError
from compose.routers.general_knowledge import subtract_general


def adapter(name, ranks, seed):
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        name,
        "tiny",
        {
            target: LowRank(
                torch.randn(rank, 5, generator=generator, dtype=torch.float64),
                torch.randn(4, rank, generator=generator, dtype=torch.float64),
                0.5 + seed,
            )
            for target, rank in ranks.items()
        },
    )


def test_deltas_are_subtracted_exactly() -> None:
    expert = adapter("expert", {"x": 3, "y": 2}, 0)
    general = [adapter("one", {"x": 1, "y": 4}, 1), adapter("two", {"x": 2}, 2)]
    copies = {target: (update.a.clone(), update.b.clone()) for target, update in expert.targets.items()}
    (result,) = subtract_general([expert], general)
    mean_x = (general[0].targets["x"].delta() + general[1].targets["x"].delta()) / 2
    torch.testing.assert_close(result.targets["x"].delta(), expert.targets["x"].delta() - mean_x)
    mean_y = general[0].targets["y"].delta() / 2  # the other counts as zero
    torch.testing.assert_close(result.targets["y"].delta(), expert.targets["y"].delta() - mean_y)
    for target, (a, b) in copies.items():
        assert torch.equal(expert.targets[target].a, a)
        assert torch.equal(expert.targets[target].b, b)


def test_a_target_that_an_expert_misses_stays_missing() -> None:
    (result,) = subtract_general([adapter("expert", {"x": 3}, 0)], [adapter("one", {"x": 1, "y": 4}, 1)])
    assert set(result.targets) == {"x"}


def test_factors_are_another_function() -> None:
    expert, general = adapter("expert", {"x": 2}, 0), [adapter("one", {"x": 2}, 1), adapter("two", {"x": 2}, 2)]
    (result,) = subtract_general([expert], general, space="factors")
    a, b = ((one + other) / 2 for one, other in zip(
        (general[0].targets["x"].a, general[0].targets["x"].b),
        (general[1].targets["x"].a, general[1].targets["x"].b), strict=True))  # fmt: skip
    wanted = 0.5 * (expert.targets["x"].b - b) @ (expert.targets["x"].a - a)
    torch.testing.assert_close(result.targets["x"].delta(), wanted)
    (exact,) = subtract_general([expert], general)
    assert (exact.targets["x"].delta() - wanted).abs().max() > 0.1


def test_what_cannot_be_subtracted_is_refused() -> None:
    expert = adapter("expert", {"x": 2}, 0)
    with pytest.raises(IncompatibleError, match="general adapters"):
        subtract_general([expert], [])
    with pytest.raises(IncompatibleError, match=r"expert: x: .*space='deltas'"):
        subtract_general([expert], [adapter("one", {"x": 3}, 1)], space="factors")
