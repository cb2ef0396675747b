"""Updates that float32 cannot hold: finite factors whose product is not would turn every output into NaN."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compose.adapter import LowRank
from compose.errors import AdapterFormatError

_MOST = torch.finfo(torch.float32).max


def check_updates(targets: Mapping[str, LowRank], where: object) -> None:
    """Raise where factors or an update may exceed float32, in which adapters are composed.

    The bound on an entry of the update is ``|scaling| * R * max|A| * max|B|``; no trained adapter comes near it.

    Raises:
        AdapterFormatError: Names the target.
    """
    for path, update in targets.items():
        a, b = (float(torch.linalg.vector_norm(factor, torch.inf)) for factor in (update.a, update.b))
        if max(a, b, abs(update.scaling) * update.rank * a * b) > _MOST:
            raise AdapterFormatError(
                f"{where}: target {path}: entries up to {a:.3g} in A and {b:.3g} in B give an update that float32 "
                "cannot hold; the file is unusable, train or save the adapter again"
            )
