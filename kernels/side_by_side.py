"""Matrices one below the other in memory, so that one product can serve several targets.

Shape letters: ``R`` rows, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

_SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"), ("q", "k", "v"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"),
)  # fmt: skip
"""Last names of layers that read the same input in most models; elsewhere memory is laid out apart."""


def empty_side_by_side(
    shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return an empty matrix per target; on a CPU those of siblings are parts of one tensor.

    Args:
        shapes: Target -> ``(R, D)``.
        dtype: Of all.
        device: Of all.
    """
    made: dict[str, torch.Tensor] = {}
    for target, (_, width) in shapes.items():
        if target in made:
            continue
        parent, _, name = target.rpartition(".")
        known = _SAME_INPUT if device.type == "cpu" else ()  # on a GPU every matrix begins at an aligned place
        names = next((names for names in known if name in names), (name,))
        paths = [f"{parent}.{one}" if parent else one for one in names]
        together = [path for path in paths if path in shapes and shapes[path][1] == width]
        sizes = [shapes[path][0] for path in together]
        whole_RD = torch.empty(sum(sizes), width, dtype=dtype, device=device)
        made |= dict(zip(together, whole_RD.split(sizes), strict=True))
    return {target: made[target] for target in shapes}


def adjoining(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return matrices of one width as one, a view, where they lie one below the other in memory; else None.

    None too where one has no rows.
    """
    first = parts[0]
    width, place, rows = first.shape[1], first.data_ptr(), 0
    for part in parts:
        if (
            not part.numel()
            or part.data_ptr() != place
            or part.shape[1] != width
            or part.dtype != first.dtype
            or not part.is_contiguous()
        ):
            return None
        place += part.numel() * part.element_size()
        rows += part.shape[0]
    if place > first.untyped_storage().data_ptr() + first.untyped_storage().nbytes():
        return None  # neighbours by chance: memory of another tensor
    return first.detach().as_strided((rows, width), (width, 1))
