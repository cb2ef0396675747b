"""What single experts make of an input, for gates that judge outputs: one ``(E, O)`` block per input, so few inputs.

Shape letters: ``D`` in, ``O`` out, ``E`` experts.
"""

from __future__ import annotations

import torch

from compose.errors import IncompatibleError
from compose.kernels.stack import LoraStack


def expert_outputs(x: torch.Tensor, stack: LoraStack) -> torch.Tensor:
    """Return ``s_e B_e A_e x``: ``x (..., D)`` -> ``(..., E, O)`` in the dtype of x, at least float32; 0 for rank 0.

    The memory is ``E O`` numbers per input: meant for one vector per sequence, never for every token.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    outputs = []
    for expert in range(stack.num_adapters):
        a_rD, b_rO = stack.factors(expert)
        y = x.to(dtype) @ a_rD.to(dtype).T @ b_rO.to(dtype)
        outputs.append(y * stack.scaling_E[expert].to(dtype))
    return torch.stack(outputs, dim=-2)


def one_vector_per_sequence(x: torch.Tensor | None, gate: str) -> torch.Tensor:
    """``x`` where it is ``(B, D)``.

    Raises:
        IncompatibleError: It has a dimension of tokens: ``gate`` would need ``E O`` numbers for each of them.
    """
    if x is None or x.dim() != 2:
        raise IncompatibleError(
            f"the gate {gate!r} compares whole outputs of all experts, which is too much for every token; "
            "use scope='sequence' with pooling 'mean' or 'last'"
        )
    return x
