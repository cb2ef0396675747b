"""Loading a base model for a command: Transformers' own progress bars and reminders stay off the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from compose.fewshot.loading import LoadedModel


def load_base(path_or_id: str | Path, *, device: str = "cpu", dtype: str = "auto") -> LoadedModel:
    """Load a base model quietly.

    Raises:
        ComposeError: There is no such model, no such device, or it is of a kind that cannot be searched.
    """
    from transformers.utils import logging

    from compose.fewshot.loading import load_model

    checked_device(device)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return load_model(path_or_id, device=device, dtype=dtype)


def checked_device(name: str) -> torch.device:
    """Return the device of ``--device``.

    Raises:
        ComposeError: It is not a device, or not here.
    """
    import torch

    from compose.errors import ComposeError

    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ComposeError(f"--device {name!r} is not a device; give cpu, cuda or cuda:0 (compose doctor)")
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise ComposeError(f"--device {name}: no such GPU is available here; 'compose doctor' shows what is")
    return device
