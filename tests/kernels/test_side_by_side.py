"""Factors of targets that read one input lie one below the other, and are seen as one matrix only where they do."""

from __future__ import annotations

import torch

from compose.kernels.side_by_side import adjoining, empty_side_by_side

SHAPES = {
    "layers.0.attn.k_proj": (3, 8), "layers.0.attn.o_proj": (3, 8), "layers.0.attn.q_proj": (2, 8),
    "layers.0.attn.v_proj": (1, 8), "layers.0.mlp.gate_proj": (3, 8), "layers.0.mlp.up_proj": (3, 4),
    "layers.1.attn.k_proj": (1, 8), "head": (2, 8), "q": (1, 8),
}  # fmt: skip


def test_siblings_by_name_are_parts_of_one_tensor():
    made = empty_side_by_side(SHAPES, torch.float64, torch.device("cpu"))
    assert {target: tuple(matrix.shape) for target, matrix in made.items()} == SHAPES
    assert list(made) == list(SHAPES)
    assert all(matrix.dtype == torch.float64 and matrix.is_contiguous() for matrix in made.values())
    q, k, v = (made[f"layers.0.attn.{name}"] for name in ("q_proj", "k_proj", "v_proj"))
    whole = adjoining([q, k, v])
    assert whole.shape == (6, 8)
    whole.copy_(torch.arange(48).view(6, 8))
    torch.testing.assert_close(torch.cat([q, k, v]), whole, rtol=0, atol=0)
    assert q.untyped_storage().nbytes() == 6 * 8 * 8
    alone = {target for target in made if adjoining([made[target]]).untyped_storage().nbytes() ==
             made[target].numel() * 8}  # fmt: skip
    assert alone == SHAPES.keys() - {f"layers.0.attn.{name}" for name in ("q_proj", "k_proj", "v_proj")}


def test_elsewhere_every_matrix_has_memory_of_its_own():
    made = empty_side_by_side(SHAPES, torch.float32, torch.device("meta"))
    for target, matrix in made.items():
        assert matrix.untyped_storage().nbytes() == SHAPES[target][0] * SHAPES[target][1] * 4


def test_what_does_not_adjoin_is_not_one_matrix():
    whole = torch.randn(7, 3)
    parts = list(whole.split([2, 1, 4]))
    torch.testing.assert_close(adjoining(parts), whole, rtol=0, atol=0)
    torch.testing.assert_close(adjoining(parts[1:]), whole[2:], rtol=0, atol=0)
    wrong = (
        parts[::-1], [parts[0], parts[2]], [parts[0], parts[1].clone()], [parts[0], parts[1].double()],
        [parts[0], whole[2:, :2]], [whole[:2, :2], whole[2:, :2]],
    )  # fmt: skip
    assert [adjoining(each) for each in wrong] == [None] * len(wrong)
