"""The table of sorted tokens against a plain sort."""

from __future__ import annotations

import pytest
import torch

from compose.kernels.packed.table import tile_table


def _expected_tiles(ids_M: torch.Tensor, num_adapters: int, block: int) -> list[tuple[int, list[int]]]:
    """Adapter and tokens of every tile, tokens without an adapter first; loops over adapters."""
    known = torch.where((ids_M >= 0) & (ids_M < num_adapters), ids_M, -1).tolist()
    tiles = []
    for adapter in range(-1, num_adapters):
        tokens = [token for token, own in enumerate(known) if own == adapter]
        tiles += [(adapter, tokens[first : first + block]) for first in range(0, len(tokens), block)]
    return tiles


@pytest.mark.parametrize(
    ("tokens", "slots", "num_adapters", "block"),
    [
        (1, 1, 1, 16),
        (5, 3, 2, 16),
        (256, 1, 4, 64),  # one whole block of the sort
        (257, 2, 7, 64),
        (700, 2, 30, 16),
        (1500, 1, 3, 64),
        (90, 1, 300, 32),  # more adapters than tokens
        (64, 2, 62, 64),  # groups fill their block
        (64, 2, 63, 64),
    ],
)
@pytest.mark.parametrize("kind", ["any", "none", "one", "outside"])
def test_tiles_hold_the_tokens_of_one_adapter_in_order(tokens, slots, num_adapters, block, kind):
    ids = torch.randint(-1, num_adapters, (tokens, slots))
    if kind in ("none", "one"):
        ids.fill_(-1 if kind == "none" else num_adapters - 1)
    if kind == "outside":
        ids[::3], ids[1::3] = num_adapters, -(10**12)
    table = tile_table(ids, num_adapters, block)
    assert table.block == block
    assert table.max_tiles >= max(len(_expected_tiles(ids[:, slot], num_adapters, block)) for slot in range(slots))
    for slot in range(slots):
        order, bounds = table.order[slot].tolist(), table.bounds[slot].tolist()
        found, tiles = [], (one[slot].tolist() for one in (table.adapter, table.first, table.last))
        for adapter, first, last in zip(*tiles, strict=True):
            if first < last:
                found.append((adapter, order[first : min(first + block, last)]))
            else:
                assert adapter == -1
        assert found == _expected_tiles(ids[:, slot], num_adapters, block)
        for adapter in range(num_adapters):
            own = (ids[:, slot] == adapter).nonzero().flatten().tolist()
            assert order[bounds[adapter + 1] : bounds[adapter + 2]] == own


def test_ids_with_gaps_in_memory_are_sorted_alike():
    ids = torch.randint(-1, 5, (40, 4))
    gaps = ids[:, ::2]
    table, plain = tile_table(gaps, 5, 16), tile_table(gaps.contiguous(), 5, 16)
    assert torch.equal(table.order, plain.order)
    assert torch.equal(table.adapter, plain.adapter)


def test_its_size_follows_from_sizes_alone():
    """So a graph that was captured with some ids can be replayed with others."""
    shapes = {
        tuple(one.shape for one in (table.order, table.bounds, table.adapter, table.first, table.last))
        for table in (tile_table(torch.full((100, 2), fill), 9, 16) for fill in (-1, 0, 8))
    }
    assert len(shapes) == 1
