"""A repair of Triton's interpreter (TRITON_INTERPRET=1, tests without a GPU).

Triton 3.6 turns a loop's bound into an integer by ``int(array)`` on an array of shape ``(1,)``, which NumPy 2.4
refuses.
"""

from __future__ import annotations

import os
from typing import Any


def repair() -> None:
    """Let loops have bounds known at run time; does nothing where kernels are compiled, or the second time."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor
    if getattr(original, "repaired", False):
        return

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patched.repaired = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patched
