"""Block sizes: what decides the order of a sum depends on nothing but widths, ranks and the dtype."""

from __future__ import annotations

import pytest

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


@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_number_of_few_tokens_decides_no_order_of_a_sum(itemsize):
    one, many = (tuning.dense_config(4096, 128, 1024, itemsize, tokens) for tokens in (1, 512))
    assert (one.splits, one.bk, one.br_out) == (many.splits, many.bk, many.br_out)


@pytest.mark.parametrize("width", [16, 24, 100, 4096, 14336])
def test_parts_cover_the_width(width):
    rows = tuning.rows_config(width, 64, 16, 1)
    dense = tuning.dense_config(width, 64, 64, 2, 8)
    for splits, bk in ((rows.splits, rows.bk), (dense.splits, dense.bk)):
        assert tuning.cdiv(width, splits * bk) * splits * bk >= width


def test_a_power_of_two_is_at_least_the_smallest_block():
    assert [tuning.power_of_two(size) for size in (1, 16, 17, 100, 128)] == [16, 16, 32, 128, 128]
