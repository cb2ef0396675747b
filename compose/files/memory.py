"""Files that need more memory than the process may have: an error that names the file, not one of the allocator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from compose.errors import AdapterFormatError

_TORCH = "DefaultCPUAllocator"  # torch raises a plain RuntimeError


@contextlib.contextmanager
def enough_memory(where: object) -> Iterator[None]:
    """Turn what numpy, torch and Python raise without memory into an error about ``where``.

    Raises:
        AdapterFormatError: Memory ran out inside.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _TORCH not in str(error):
            raise
        raise AdapterFormatError(
            f"{where}: it needs more memory than this process can have; give it more, or use a smaller adapter"
        ) from error
