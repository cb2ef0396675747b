"""Whether a call of a module is only its forward, so that a fast path may compute that without the call."""

from __future__ import annotations

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
