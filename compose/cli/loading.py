"""Loading a base model for a command: Transformers' own progress bars and reminders stay off the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compose.fewshot.loading import LoadedModel


def load_base(path_or_id: str | Path, *, device: str = "cpu", dtype: str = "auto") -> LoadedModel:
    """Load a base model quietly.

    Raises:
        ComposeError: There is no such model, no such device, or it is of a kind that cannot be searched.
    """
    import torch
    from transformers.utils import logging

    from compose.errors import ComposeError
    from compose.fewshot.loading import load_model

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ComposeError(f"--device {device!r} is not a device; give cpu, cuda or cuda:0 (compose doctor)") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ComposeError(f"--device {device}: no GPU is available here; 'compose doctor' shows what is")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return load_model(path_or_id, device=device, dtype=dtype)
