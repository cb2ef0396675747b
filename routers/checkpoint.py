"""Checkpoints of a training run: the mixture, the optimiser, the place in the data, the history; whole or not at all.

Random numbers need no saving: batches, dropout and noise of a step follow from the run's seed and the step's number.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import safetensors.torch
import torch

from compose.errors import AdapterFormatError, RunFolderError
from compose.files import safetensors_file
from compose.files.publish import publish_folder
from compose.files.strict_json import parse_object
from compose.routers.saved import mixture_files, refill

if TYPE_CHECKING:
    from compose.routers.optimiser import Optimiser
    from compose.routers.routed import RoutedModel

TRAINING, OPTIMISER = "training.json", "optimiser.safetensors"
FORMAT, VERSION = "compose-training", 1
_NAME = re.compile(r"step-(\d{9})")
_MAX_BYTES = 256 * 2**20


class Position(NamedTuple):
    """Where a run stands.

    Attributes:
        step: Steps that are done.
        stage: Number of the stage that the optimiser's state belongs to.
        history: Entries so far.
    """

    step: int
    stage: int
    history: list[dict[str, Any]]


def write_checkpoint(
    folder: Path, routed: RoutedModel, optimiser: Optimiser, position: Position, fingerprint: Mapping[str, Any]
) -> Path:
    """Write ``folder/step-<n>`` and remove older ones.

    Args:
        folder: Of the run's checkpoints.
        routed: The mixture.
        optimiser: Its state.
        position: Where the run stands.
        fingerprint: What has to be the same for the run to be continued.
    """
    described = {
        "format": FORMAT,
        "version": VERSION,
        "step": position.step,
        "stage": position.stage,
        "fingerprint": fingerprint,
        "history": position.history,
    }
    files = mixture_files(routed)
    files[TRAINING] = (json.dumps(described, allow_nan=False) + "\n").encode()
    state = optimiser.state()
    safetensors_file.check_finite(state, OPTIMISER)
    if state:
        files[OPTIMISER] = safetensors.torch.save(state)
    older = _steps(folder)
    path = publish_folder(files, folder / f"step-{position.step:09d}", overwrite=True)
    for step, one in older:
        if step != position.step:
            shutil.rmtree(one)
    return path


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step; None where there is none."""
    found = _steps(folder)
    return max(found)[1] if found else None


def read_position(path: Path, fingerprint: Mapping[str, Any]) -> Position:
    """Return where a checkpoint stands.

    Raises:
        RunFolderError: It is of another run; the message says what differs.
        AdapterFormatError: It is damaged.
    """
    where = path / TRAINING
    found = parse_object(safetensors_file.read_bytes(where, max_bytes=_MAX_BYTES), where)
    if found.get("format") != FORMAT or found.get("version") != VERSION:
        raise AdapterFormatError(f"{where}: not a checkpoint of this version ({FORMAT} {VERSION})")
    step, stage, history = (found.get(name) for name in ("step", "stage", "history"))
    if type(step) is not int or type(stage) is not int or not isinstance(history, list) or step < 0:
        raise AdapterFormatError(f"{where}: step, stage or history are not those of a run")
    different = _differences(found.get("fingerprint"), fingerprint)
    if different:
        raise RunFolderError(
            f"{path}: this run was begun otherwise: {'; '.join(different[:6])}; continue it as it was begun, "
            "or begin another"
        )
    return Position(step, stage, history)


def restore_checkpoint(path: Path, routed: RoutedModel, optimiser: Optimiser | None) -> None:
    """Put a checkpoint's tensors back.

    Args:
        path: The checkpoint.
        routed: The mixture, built as it was.
        optimiser: Of the checkpoint's stage; None where the stage is over.

    Raises:
        AdapterFormatError: It is damaged, or of another mixture.
    """
    refill(routed, path)
    if optimiser is not None:
        file = path / OPTIMISER
        state: Mapping[str, torch.Tensor] = safetensors_file.load(file).tensors if file.exists() else {}
        if state:
            optimiser.load_state(state, file)


def _steps(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    named = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return [(int(match[1]), path) for match, path in named if match and (path / TRAINING).is_file()]


def _differences(before: Any, now: Any, place: str = "") -> list[str]:
    """What differs between two plain values, in words."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = sorted({*before, *now})
        parts = [_differences(before.get(key), now.get(key), f"{place}.{key}" if place else key) for key in keys]
        return [line for part in parts for line in part]
    both = isinstance(before, Sequence) and isinstance(now, Sequence) and not isinstance(before, str)
    if both and not isinstance(now, str) and len(before) == len(now):
        parts = [
            _differences(*pair, f"{place}[{number}]") for number, pair in enumerate(zip(before, now, strict=True))
        ]
        return [line for part in parts for line in part]
    return [] if before == now else [f"{place} was {_short(before)}, is {_short(now)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
