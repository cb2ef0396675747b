"""The process that `compose.hub_index.unpickle` starts: a pickle on standard input, safetensors on standard output.

Arguments: most bytes of all tensors, most additional memory, most seconds of processor time. Exits with 3 and one line
on standard error for a file that is refused.
"""

from __future__ import annotations

import io
import pickle
import sys
import warnings
from typing import Any

import safetensors.torch
import torch

from compose.errors import AdapterFormatError
from compose.files.safetensors_file import DTYPES, MAX_TENSORS, check_tensor_names

REFUSED = 3


def convert(data: bytes, max_bytes: int) -> bytes:
    """Return the safetensors bytes of a pickled state dict.

    Raises:
        AdapterFormatError: Damaged, more than plain tensors, or more than ``max_bytes``.
    """
    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True, mmap=False)
        return safetensors.torch.save(tensors_of(found, max_bytes), metadata={"format": "pt"})
    except AdapterFormatError:
        raise
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, EOFError) as error:
        raise AdapterFormatError(_first_line(error)) from error
    except (AttributeError, AssertionError, ArithmeticError, MemoryError, OSError, ImportError) as error:
        raise AdapterFormatError(_first_line(error)) from error


def tensors_of(found: Any, max_bytes: int) -> dict[str, torch.Tensor]:
    """Return a loaded state dict as tensors that own their memory.

    Every size is checked against the storage before an entry is touched: a tensor of stride 0, or one that says it is
    larger than its storage, would grow on being copied.

    Raises:
        AdapterFormatError: Anything but plain tensors by name, or more than ``max_bytes``.
    """
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise AdapterFormatError(f"not a state dict but {type(found).__name__}; only tensors by name are taken")
    if not 0 < len(found) <= MAX_TENSORS:
        raise AdapterFormatError(f"{len(found):,} tensors; allowed are 1 to {MAX_TENSORS:,}")
    check_tensor_names(found)
    total = 0
    for name, tensor in found.items():
        total += _checked_size(name, tensor)
        if total > max_bytes:
            raise AdapterFormatError(f"tensors of more than {max_bytes:,} bytes")
    return {name: tensor.detach().contiguous().clone() for name, tensor in found.items()}


def _checked_size(name: str, tensor: Any) -> int:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise AdapterFormatError(f"{name} is {type(tensor).__name__} and no tensor")
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or tensor.is_nested or tensor.dtype not in DTYPES.values():
        kind = f"{tensor.layout}, {tensor.dtype} on {tensor.device}"
        raise AdapterFormatError(f"{name} is {kind}; only dense tensors of floating numbers are taken")
    size, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    spans = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((length - 1) * stride for length, stride in spans) + 1
    if tensor.numel() and max(size, last * tensor.element_size()) > stored:
        raise AdapterFormatError(f"{name} says it has {size:,} bytes, its storage has {stored:,}")
    return int(size)


def _bound(memory: int, seconds: int) -> None:
    """Bound this process; called when everything is imported, so that the memory is on top of what that took."""
    import resource
    from pathlib import Path

    statm = Path("/proc/self/statm")
    used = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 0
    wanted = [(resource.RLIMIT_CPU, seconds), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)]
    if used:
        wanted.append((resource.RLIMIT_AS, used + memory))
    for limit, most in wanted:
        hard = resource.getrlimit(limit)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))


def main() -> int:
    """Convert and return the exit code."""
    max_bytes, memory, seconds = map(int, sys.argv[1:4])
    data = sys.stdin.buffer.read()
    _bound(memory, seconds)
    warnings.simplefilter("ignore")
    try:
        result = convert(data, max_bytes)
    except AdapterFormatError as error:
        sys.stderr.write(f"{error}\n")
        return REFUSED
    sys.stdout.buffer.write(result)
    return 0


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"not plain weights ({lines[0] if lines else type(error).__name__})"


if __name__ == "__main__":
    sys.exit(main())
