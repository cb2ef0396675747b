"""Products on sorted lines without gradients: memory used twice, tiles, tokens that need not be moved."""

from __future__ import annotations

import pytest
import torch

from compose.kernels import lines
from compose.kernels.grouped_lora.plan import plan_groups
from compose.kernels.lines import sorted_forward
from compose.kernels.routed import equal_factors, sort_tokens

KINDS = ["segments", "padded", "grouped_mm"]


def _expected(x, stack, ids, c):
    """Token by token in float64."""
    y = torch.zeros(len(x), stack.b_RO.shape[1], dtype=torch.float64)
    for token, adapter in enumerate(ids.tolist()):
        if adapter >= 0:
            a, b = stack.factors(adapter)
            y[token] = c[token].double() * (b.double().T @ (a.double() @ x[token].double()))
    return y


def _prepared(kind, stack, ids, c):
    layout = sort_tokens(plan_groups(ids), stack.ranks, padded=kind == "padded")
    if kind == "segments":
        spans = tuple((stack.offsets[adapter], stack.offsets[adapter + 1]) for adapter in layout.adapters)
        return sorted_forward(layout, (stack.a_RD, stack.b_RO), layout.spread(c), spans)
    factors = equal_factors(stack, layout.adapters, aligned=kind == "grouped_mm")
    return sorted_forward(layout, factors, layout.spread(c))


@pytest.mark.parametrize("out", [16, 24], ids=["one width", "two widths"])
@pytest.mark.parametrize("ranks", [(3, 0, 8, 1), (4, 4, 4, 4)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "ids",
    [[2, -1, 0, 3, 2, 1], [0, 0, 2, 2, 3, 3], [3, 0, 2, 0, 3, 2], [2, 2, 2, 0, 2, 2]],
    ids=["some without", "in order", "unsorted", "one takes most"],
)
def test_every_kind_equals_one_token_at_a_time_and_leaves_the_input_alone(make_stack, ids, kind, ranks, out):
    stack, ids, c = make_stack(ranks, 16, out, dtype=torch.float32), torch.tensor(ids), torch.rand(6) + 0.5
    x = torch.randn(6, 16)
    before, run = x.clone(), _prepared(kind, stack, ids, c)
    expected = _expected(x, stack, ids, c)
    for _ in range(2):
        y = run(x)
        assert (y - expected).norm() <= 2e-6 * expected.norm()
        torch.testing.assert_close(x, before, rtol=0, atol=0)
        assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_in_order_that_lie_apart_in_memory_are_taken_as_they_are(make_stack, kind):
    stack, ids, c = make_stack((4, 4), 16, 16, dtype=torch.float32), torch.tensor([0, 0, 1, 1]), torch.ones(4)
    x = torch.randn(4, 2, 17)[:, 1, 1:]
    expected = _expected(x, stack, ids, c)
    y = _prepared(kind, stack, ids, c)(x)
    assert (y - expected).norm() <= 2e-6 * expected.norm()


@pytest.mark.parametrize(("width", "out"), [(16, 16), (16, 24), (13, 13)], ids=["one", "two", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ids", [[2, -1, 0, 3, 2, 1] * 5, [0, 2, 3] * 9], ids=["some without", "all"])
def test_many_tiles_give_what_one_gives(make_stack, monkeypatch, ids, dtype, width, out):
    stack, ids = make_stack((3, 0, 8, 1), width, out, dtype=dtype), torch.tensor(ids)
    x, c = torch.randn(len(ids), width).to(dtype), torch.ones(len(ids), dtype=dtype)
    whole = _prepared("segments", stack, ids, c)
    monkeypatch.setattr(lines, "WHOLE_BYTES", 0)
    monkeypatch.setattr(lines, "TILE_BYTES", 4 * max(width, out) * dtype.itemsize)
    tiled = _prepared("segments", stack, ids, c)
    assert len(whole.tiles) == 1
    assert [sum(tile.sizes) for tile in tiled.tiles[:-1]] == [4] * (len(tiled.tiles) - 1)
    assert len(tiled.tiles) > 4
    torch.testing.assert_close(tiled(x), whole(x))


def test_nothing_is_cut_where_nothing_need_be_moved_or_tokens_have_several_adapters(make_stack, monkeypatch):
    monkeypatch.setattr(lines, "WHOLE_BYTES", 0)
    monkeypatch.setattr(lines, "TILE_BYTES", 1)
    stack, c = make_stack((4, 4), 16, 16, dtype=torch.float32), torch.ones(4)
    assert len(_prepared("segments", stack, torch.tensor([0, 0, 1, 1]), c).tiles) == 1
    assert len(_prepared("segments", stack, torch.tensor([0, 1, 0, 1]), c).tiles) == 4
    layout = sort_tokens(plan_groups(torch.tensor([0, 1, 0, 1])), stack.ranks, chosen=2)
    run = sorted_forward(layout, (stack.a_RD, stack.b_RO), layout.spread(c), ((0, 4), (4, 8)))
    assert len(run.tiles) == 1
    assert run(torch.randn(2, 16)).shape == (2, 16)
