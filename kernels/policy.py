"""A cost model of the torch strategies: nanoseconds of one CPU core, float32, fitted to the tables in the READMEs.

The figures only rank strategies against each other; all of them compute the same thing. ``width`` is ``D + O``, what
every rank row costs once in the product with ``x`` and once in the product with ``B``.
"""

from __future__ import annotations

_PRODUCT = 0.021  # per multiply-add of one large matrix product
_SMALL_PRODUCT = 0.03  # per multiply-add of many small products (bmm)
_READ = 0.13  # per gathered factor entry, from the level-2 cache
_READ_FAR = 0.45  # the same once the gathered factors outgrow that cache
_COPY = 0.35  # per factor entry gathered anew
_SEGMENT = 18_000.0  # per adapter: slices, two products and bookkeeping
_MOVE = 1.2  # per entry of x and y sorted and sorted back
_CACHE_ENTRIES = 1 << 21
MAX_GATHERED = 1 << 22
"""Most factor entries worth gathering per call and keeping (16 MiB in float32)."""


def stacked_cost(tokens: int, rows: int, width: int) -> float:
    """One product of all tokens with ``rows`` rank rows."""
    return _PRODUCT * tokens * rows * width


def gather_cost(entries: int, tokens: int, rank: int, width: int, *, cached: bool) -> float:
    """``entries`` small products with ``rank`` rows each, over ``tokens`` in all; infinite beyond ``MAX_GATHERED``."""
    gathered = entries * rank * width
    if gathered > MAX_GATHERED:
        return float("inf")
    read = _READ if gathered <= _CACHE_ENTRIES else _READ_FAR
    return gathered * (read if cached else read + _COPY) + _SMALL_PRODUCT * tokens * rank * width


def segments_cost(tokens: int, adapters: int, width: int) -> float:
    """Sort ``tokens`` by adapter, one pair of products for each of ``adapters``, sort back."""
    return _SEGMENT * adapters + _MOVE * tokens * width
