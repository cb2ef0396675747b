"""What a fast path has to know of the steps it stands for: whether anybody sees them, and whether they run again."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules import module as every_module
from torch.utils.hooks import RemovableHandle


def watched(module: nn.Module) -> bool:
    """Whether a call does more than the class's forward: hooks on it or on all modules, or another forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or every_module._global_forward_hooks
        or every_module._global_forward_pre_hooks
        or every_module._global_backward_hooks
        or every_module._global_backward_pre_hooks
    )


def runs_again() -> bool:
    """Whether what autograd saves now is dropped and computed again in ``backward``, not reentrant.

    Then the steps must be the same, whoever watches them the second time. Where torch does not tell, it is so.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    hooks = None if top is None else top(False)
    return top is None or (hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint")


class Unwatched:
    """Whether nobody watches a module or what is below it; looks again only where a hook was registered anywhere."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._free_at = -1

    def __call__(self) -> bool:
        """Whether it is so now."""
        registered = RemovableHandle.next_id
        if self._free_at == registered:
            return True
        free = not any(watched(module) for module in self._root.modules())
        self._free_at = registered if free else -1
        return free
