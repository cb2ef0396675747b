import numpy as np
import pytest
import torch

from compose.adapter import LowRank
from compose.errors import ComposeError, IncompatibleError
from compose.retriever.embeddings.weights import WeightEncoder, delta_svd
from compose.retriever.retriever import Retriever


def adapter(seed: int, targets: int = 6, rank: int = 4) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {f"layer.{n}": LowRank(draw(rank, 20 + n), draw(30, rank), 0.5) for n in range(targets)}


def rotated(targets: dict[str, LowRank], seed: int = 5) -> dict[str, LowRank]:
    """Other factors with the same deltas: an invertible matrix of the rank space, and the scaling moved into A."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, update in targets.items():
        mix = torch.linalg.qr(torch.randn(update.rank, update.rank, generator=generator))[0] * 3.0
        found[name] = LowRank(update.scaling * torch.linalg.solve(mix, update.a), update.b @ mix, 1.0)
    return found


def cosine(left: dict[str, LowRank], right: dict[str, LowRank]) -> float:
    """Of the dense deltas; targets that one lacks count as zero."""
    inner = sum(float((left[name].delta() * right[name].delta()).sum()) for name in left.keys() & right.keys())
    lengths = [sum(float((update.delta() ** 2).sum()) for update in one.values()) ** 0.5 for one in (left, right)]
    return inner / (lengths[0] * lengths[1])


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_rotated_factors_have_the_same_vector(power) -> None:
    encoder = WeightEncoder(power=power)
    vectors = encoder.encode_adapters([adapter(0), rotated(adapter(0)), adapter(1)])
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)
    assert abs(float(vectors[0] @ vectors[2])) < 0.3


def test_cosines_are_those_of_the_deltas() -> None:
    base, other = adapter(0), adapter(1)
    mixed = {
        name: LowRank(torch.cat([base[name].a, other[name].a]), torch.cat([base[name].b, 0.7 * other[name].b], 1), 0.5)
        for name in base
    }
    partly = {name: update for name, update in base.items() if name != "layer.0"}
    vectors = WeightEncoder(width=64).encode_adapters([base, other, mixed, partly])
    expected = [[cosine(left, right) for right in (base, other, mixed, partly)] for left in (base, mixed)]
    np.testing.assert_allclose(vectors[[0, 2]] @ vectors.T, expected, atol=0.1)  # 1 / sqrt(64 * 6 * 4) is 0.03


def test_a_vector_does_not_depend_on_what_else_is_embedded() -> None:
    together = WeightEncoder().encode_adapters([adapter(0), adapter(1, targets=3)])
    np.testing.assert_array_equal(WeightEncoder().encode_adapters([adapter(1, targets=3)])[0], together[1])


def test_power_zero_compares_subspaces() -> None:
    update = adapter(0, targets=1)["layer.0"]
    stretched = LowRank(update.a, update.b @ torch.diag(torch.tensor([1.0, 20.0, 1.0, 0.05])), update.scaling)
    u, _, v = delta_svd(update)
    su, _, sv = delta_svd(stretched)
    expected = float(np.sum((u.T @ su) * (v.T @ sv))) / 4
    flat = WeightEncoder(power=0.0, width=256).encode_adapters([{"layer.0": update}, {"layer.0": stretched}])
    assert float(flat[0] @ flat[1]) == pytest.approx(expected, abs=0.1)


def test_the_decomposition_is_that_of_the_delta() -> None:
    update = adapter(3)["layer.2"]
    u, s, v = delta_svd(update)
    np.testing.assert_allclose(u * s @ v.T, update.delta().double().numpy(), atol=1e-5)
    np.testing.assert_allclose(s, np.linalg.svd(update.delta().double().numpy())[1][:4], rtol=1e-5)


def test_adapters_like_this_one_are_found(tmp_path) -> None:
    encoder = WeightEncoder()
    bank = {f"adapter-{seed}": adapter(seed) for seed in range(8)}
    vectors = encoder.encode_adapters(list(bank.values()))
    retriever = Retriever.from_vectors(encoder, list(bank), vectors, np.arange(8), "weights")
    again = Retriever.load(retriever.save(tmp_path / "r"), WeightEncoder())
    found = again.top_vectors(encoder.encode_adapters([rotated(bank["adapter-5"])]), 2, exclude=[None])
    assert found.names[0][0] == "adapter-5"
    assert found.scores[0, 0] == pytest.approx(1, abs=1e-4)
    with pytest.raises(ComposeError, match="not texts"):
        again.top(["a text"])
    with pytest.raises(IncompatibleError, match="fingerprint"):
        Retriever.load(tmp_path / "r", WeightEncoder(seed=1))


def test_what_has_no_direction_is_refused() -> None:
    zero = {"layer.0": LowRank(torch.randn(4, 20), torch.zeros(30, 4), 1.0)}
    with pytest.raises(IncompatibleError, match="adapter 2 has no direction"):
        WeightEncoder().encode_adapters([adapter(0), zero])
    with pytest.raises(IncompatibleError, match="adapter 1 has no direction"):
        WeightEncoder().encode_adapters([{}])
    with pytest.raises(IncompatibleError, match=r"'layer\.0' has shapes"):
        WeightEncoder().encode_adapters([adapter(0), {"layer.0": LowRank(torch.randn(2, 9), torch.randn(30, 2), 1.0)}])
    with pytest.raises(ComposeError, match="width must be at least 1"):
        WeightEncoder(width=0)
