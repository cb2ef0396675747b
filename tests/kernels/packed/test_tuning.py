"""Block sizes: what decides the order of a sum depends on nothing but widths, ranks and the dtype."""

from __future__ import annotations

import pytest
import torch

from compose.kernels.packed import tuning


@pytest.mark.parametrize(
    ("ranks", "block"),
    [
        ((16,) * 8, 16),
        ((8, 8), 16),
        ((64,) * 4, 64),
        ((256,), 64),
        ((4, 8, 16, 32, 64), 32),  # mean 24.8: few adapters fill a block of 64
        ((0, 0), 16),
    ],
    ids=str,
)
def test_a_block_of_rank_rows_fits_most_adapters(ranks, block):
    assert tuning.rank_block(ranks) == block


CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_number_of_few_tokens_decides_no_order_of_a_sum(dtype):
    one, many = (tuning.dense_config(dtype, CPU, 4096, 128, 1024, 128, tokens) for tokens in (1, 512))
    assert (one.splits, one.bk, one.br_out) == (many.splits, many.bk, many.br_out)


@pytest.mark.parametrize("width", [16, 24, 100, 4096, 14336])
def test_parts_cover_the_width(width):
    rows = tuning.rows_config(torch.float16, CPU, width, 64, 16, 16, 1)
    dense = tuning.dense_config(torch.float16, CPU, width, 64, 64, 64, 8)
    for splits, bk in ((rows.splits, rows.bk), (dense.splits, dense.bk)):
        assert tuning.cdiv(width, splits * bk) * splits * bk >= width


def test_a_power_of_two_is_at_least_the_smallest_block():
    assert [tuning.power_of_two(size) for size in (1, 16, 17, 100, 128)] == [16, 16, 32, 128, 128]
