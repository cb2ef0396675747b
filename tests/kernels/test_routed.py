"""Layouts of sorted pairs, factors of equal rank, and the products on them."""

from __future__ import annotations

import pytest
import torch

from compose.kernels.grouped_lora.plan import plan_groups
from compose.kernels.routed import (
    aligned_rank,
    copies_factors,
    equal_factors,
    grouped_mm_refuses,
    laid_out,
    routed_lowrank,
    sort_tokens,
)
from compose.kernels.stack import LoraStack

RANKS = (2, 0, 1)


def test_pairs_are_sorted_by_adapter_and_those_without_one_share_the_last_line():
    layout = sort_tokens(plan_groups(torch.tensor([2, -1, 0, 1, 2])), RANKS)
    assert layout.adapters == (0, 2)
    assert layout.bounds == (0, 1, 3)
    assert layout.ends_U.tolist() == [1, 3]
    assert layout.source_Q.tolist()[:3] == [2, 0, 4]
    assert layout.place_TK.tolist() == [[1], [3], [0], [3], [2]]


def test_a_padded_layout_gives_every_adapter_the_lines_of_the_longest():
    layout = sort_tokens(plan_groups(torch.tensor([2, 2, 0, 2])), RANKS, padded=True)
    assert layout.length == 3
    assert layout.bounds == (0, 3, 6)
    assert layout.place_TK.flatten().tolist() == [3, 4, 0, 5]
    assert layout.source_Q[[0, 3, 4, 5]].tolist() == [2, 0, 1, 3]
    assert layout.spread(torch.tensor([1.0, 2.0, 3.0, 4.0])).flatten().tolist() == [3.0, 0.0, 0.0, 1.0, 2.0, 4.0]


def test_an_id_per_row_places_all_tokens_of_the_row():
    layout = sort_tokens(plan_groups(torch.tensor([2, 0])), RANKS, tokens=2)
    assert layout.bounds == (0, 2, 4)
    assert layout.source_Q.tolist() == [2, 3, 0, 1]
    assert layout.place_TK.flatten().tolist() == [2, 3, 0, 1]


def test_several_adapters_per_token_and_one_named_twice():
    layout = sort_tokens(plan_groups(torch.tensor([2, 2, 0, 2])), RANKS, chosen=2)
    assert layout.source_Q.tolist() == [1, 0, 0, 1]
    assert layout.place_TK.tolist() == [[1, 2], [0, 3]]


def test_adapters_between_those_that_occur_are_laid_out_where_that_saves_copies():
    assert laid_out((0, 1, 3), (4, 4, 4, 4)) == (0, 1, 2, 3)
    assert laid_out((0, 1, 3), (4, 4, 0, 4)) == (0, 1, 3)
    assert laid_out((0, 3), (4, 4, 4, 4)) == (0, 3)
    assert laid_out((2,), (4, 4, 4, 4)) == (2,)
    assert laid_out((), (4,)) == ()
    layout = sort_tokens(plan_groups(torch.tensor([3, 0, 1, 1])), (4, 4, 4, 4), padded=True)
    assert layout.adapters == (0, 1, 2, 3)
    assert layout.bounds == (0, 2, 4, 6, 8)
    assert layout.place_TK.flatten().tolist() == [6, 0, 2, 3]


@pytest.mark.parametrize(
    ("ids", "padded", "expected"),
    [
        ([0, 0, 1, 2], False, True),
        ([0, 0, 1, 2], True, False),
        ([0, 0, 1, 1], True, True),
        ([0, 1, 0, 2], False, False),
        ([-1, 0, 1, 2], False, False),
    ],
    ids=str,
)
def test_tokens_that_lie_as_their_lines_do_are_noticed(ids, padded, expected):
    assert sort_tokens(plan_groups(torch.tensor(ids)), (2, 2, 2), padded=padded).in_order is expected
    assert not sort_tokens(plan_groups(torch.tensor([0, 0, 1, 1])), (2, 2), chosen=2).in_order


def test_factors_of_neighbours_with_equal_ranks_are_views(make_stack):
    stack = make_stack((4, 4, 4, 2))
    a, b = equal_factors(stack, (1, 2), aligned=False)
    assert a.shape == (2, 4, 13)
    assert a.data_ptr() == stack.a_RD[4].data_ptr()
    torch.testing.assert_close(b[1], stack.factors(2)[1])
    assert not copies_factors(stack, (1, 2), 4)
    assert copies_factors(stack, (0, 2), 4)
    assert copies_factors(stack, (2, 3), 4)


@pytest.mark.parametrize("aligned", [False, True], ids=["as they are", "aligned"])
def test_missing_rank_rows_are_zeros(make_stack, aligned):
    stack = make_stack((3, 0, 1), dtype=torch.float32)
    a, b = equal_factors(stack, (0, 2), aligned=aligned)
    assert a.shape == (2, 4 if aligned else 3, 13)
    assert b.shape == (2, 4 if aligned else 3, 7)
    torch.testing.assert_close(a[0, :3], stack.factors(0)[0])
    torch.testing.assert_close(b[1, :1], stack.factors(2)[1])
    assert not a[0, 3:].any()
    assert not a[1, 1:].any()
    assert not b[1, 1:].any()


def test_ranks_are_rounded_up_to_sixteen_bytes():
    assert [aligned_rank(rank, torch.float32) for rank in (1, 3, 4, 5)] == [4, 4, 4, 8]
    assert [aligned_rank(rank, torch.bfloat16) for rank in (1, 8, 9)] == [8, 8, 16]


def test_grouped_mm_is_refused_with_the_reason(make_stack):
    assert grouped_mm_refuses(make_stack((3, 3), 16, 8, dtype=torch.float32)) is None
    assert "float64" in str(grouped_mm_refuses(make_stack((3, 3), 16, 8)))
    assert "rows of 130" in str(grouped_mm_refuses(make_stack((8, 8), 130, 8, dtype=torch.float32)))
    assert "rows of 130" in str(grouped_mm_refuses(make_stack((8, 8), 16, 130, dtype=torch.bfloat16)))
    shifted = torch.zeros(1 + 16 * 16)[1:].view(16, 16)
    stack = LoraStack(shifted, torch.zeros(16, 8), torch.ones(2), (8, 8))
    assert "memory" in str(grouped_mm_refuses(stack))


@pytest.mark.parametrize("trained", ["x", "a", "b", "c", "xc", "ab", "xabcy"])
@pytest.mark.parametrize("padded", [False, True], ids=["segments", "padded"])
def test_gradients_equal_numerical_ones_for_every_set_of_trained_operands(padded, trained):
    layout = sort_tokens(plan_groups(torch.tensor([1, -1, 0, 1, 0, 0])), (2, 2), chosen=2, padded=padded)
    shapes = {"x": (3, 3), "a": (4, 3), "b": (4, 2), "c": (6,), "y": (3, 2)}
    operands = [torch.randn(size, dtype=torch.float64, requires_grad=n in trained) for n, size in shapes.items()]

    def run(x, a, b, c, base):
        spans = () if padded else ((0, 2), (2, 4))
        factors = (a.view(2, 2, 3), b.view(2, 2, 2)) if padded else (a, b)
        return routed_lowrank(x, factors, layout.spread(c), base, layout, spans)

    assert torch.autograd.gradcheck(run, operands)


@pytest.mark.parametrize(("trained", "saves_x"), [("xc", False), ("xa", True)], ids=["frozen", "trained"])
def test_the_input_is_saved_only_for_the_gradient_of_a(trained, saves_x):
    layout = sort_tokens(plan_groups(torch.tensor([1, 0, 1, 0, 0])), (2, 2))
    shapes = {"x": (5, 3), "a": (4, 3), "b": (4, 2), "c": (5,)}
    x, a, b, c = (torch.randn(size, requires_grad=name in trained) for name, size in shapes.items())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        routed_lowrank(x, (a, b), layout.spread(c), None, layout, ((0, 2), (2, 4)))
    assert ((5, 3) in saved) == saves_x
    assert (5, 2) in saved or trained == "xa"  # h; the outputs (5, 2) are not saved
