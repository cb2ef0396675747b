"""An append-only record of every evaluation, one fsynced JSON line each, from which a search resumes bit for bit.

Line 1 is the header with the fingerprint of the run. Every further line is one call of the objective. Weights,
gradients and example weights are the base64 of their little-endian float64 bytes; losses are readable numbers
(``repr`` round-trips; NaN and infinities are strings). A resumed search runs its strategies again from the seed and is
answered from the journal while it asks for the same weights; nothing else of its state is stored.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import os
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from compose.errors import RunFolderError
from compose.search.objective import Evaluation

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from compose.search.objective import Objective

logger = logging.getLogger(__name__)

FORMAT = 1
_HEADER = '{"compose_search_journal":'
SAME = 1e-9
"""Largest difference of a coefficient at which a journalled evaluation still answers a request."""


@dataclass(frozen=True, kw_only=True)
class JournalFile:
    """Where a search records itself.

    Attributes:
        path: The file; it must not exist unless ``resume``.
        fingerprint: JSON-able identity of what the objective computes (hashes of adapters, model, data). The search
            adds its own options, space, budget and seed.
        resume: Continue the file; a missing one is begun.
    """

    path: Path
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    resume: bool = False


class Journal:
    """An open journal; use as a context manager. Locked against a second process where the system can.

    Args:
        path: The file. It must not exist unless ``resume``.
        fingerprint: JSON-able description of everything that decides the result (data and adapter hashes, options,
            seed). A resumed run must bring an equal one.
        resume: Continue an existing file; a missing one is begun.

    Attributes:
        replayed: Evaluations answered from the file so far.

    Raises:
        RunFolderError: The file exists without ``resume``, is another run's, is damaged, or is in use.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any], *, resume: bool = False) -> None:
        self.path = path
        self.replayed = 0
        if path.exists() and not resume:
            raise RunFolderError(f"{path} exists; resume it or choose another place")
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self._entries = self._read(json.loads(json.dumps(fingerprint)))
        except BaseException:
            os.close(self._fd)
            raise
        _sync_folder(path)
        self._next = 0

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def record(self, objective: Objective) -> JournalledObjective:
        """Return the objective, answered from this journal first and written to it after."""
        return JournalledObjective(objective, self)

    def replay(self, request: Mapping[str, Any]) -> Evaluation | None:
        """Return the next journalled evaluation, or None at the end of the journal.

        Raises:
            RunFolderError: The next line answers another request.
        """
        if self._next >= len(self._entries):
            return None
        entry = self._entries[self._next]
        problem = _difference(entry, request)
        if problem:
            raise RunFolderError(
                f"{self.path}, line {self._next + 2}: {problem}; the journal belongs to another run or other versions "
                "of the libraries, start again in a new place"
            )
        self._next += 1
        self.replayed += len(entry["losses"])
        return _evaluation(entry, request["weights"].shape)

    def write(self, request: Mapping[str, Any], evaluation: Evaluation, seconds: float) -> None:
        """Append one evaluation; it is on disk when this returns. A failed write leaves no torn line."""
        losses = np.asarray(evaluation.losses, dtype=np.float64)
        line = {
            "weights": _pack(request["weights"]),
            "gradient": request["gradient"],
            "example_weights": _pack(request["example_weights"]),
            "losses": [[_readable(loss) for loss in row] for row in losses.tolist()],
            "gradients": _pack(evaluation.gradients),
            "cost": float(evaluation.cost),
            "seconds": round(seconds, 6),
        }
        self._append(line)
        self._entries.append(line)
        self._next = len(self._entries)

    def _append(self, line: Mapping[str, Any]) -> None:
        data = (json.dumps(line, allow_nan=False, separators=(",", ":")) + "\n").encode()
        start = os.fstat(self._fd).st_size
        try:
            while data:
                data = data[os.write(self._fd, data) :]
            os.fsync(self._fd)
        except BaseException:
            os.ftruncate(self._fd, start)
            raise

    def _lock(self) -> None:
        if sys.platform == "win32":
            return
        import fcntl

        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFolderError(f"{self.path} is in use by another process") from error

    def _read(self, fingerprint: Any) -> list[dict[str, Any]]:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        opening = _HEADER.encode()[: len(data)]
        if not data.startswith(opening):
            raise RunFolderError(f"{self.path} is not a search journal; it is left as it is")
        lines = [self._parse(number, text) for number, text in enumerate(data[:whole].splitlines(), start=1)]
        if lines:
            _check(self.path, lines, fingerprint)
        if whole < len(data):
            logger.warning("%s: dropping a torn last line of %d bytes", self.path, len(data) - whole)
            os.ftruncate(self._fd, whole)
        if not lines:
            self._append({"compose_search_journal": FORMAT, "fingerprint": fingerprint})
        return lines[1:]

    def _parse(self, number: int, text: bytes) -> dict[str, Any]:
        try:
            parsed = json.loads(text)
        except ValueError as error:
            raise RunFolderError(f"{self.path}, line {number} is damaged: {error}") from error
        if not isinstance(parsed, dict):
            raise RunFolderError(f"{self.path}, line {number} is damaged: not an object")
        return parsed


class JournalledObjective:
    """An objective whose evaluations are replayed from, then written to, a journal."""

    def __init__(self, objective: Objective, journal: Journal) -> None:
        self._objective = objective
        self._journal = journal

    @property
    def example_weights(self) -> np.ndarray:
        """The wrapped objective's."""
        return self._objective.example_weights

    @property
    def differentiable(self) -> bool:
        """The wrapped objective's."""
        return self._objective.differentiable

    def __call__(
        self, weights: np.ndarray, *, gradient: bool = False, example_weights: np.ndarray | None = None
    ) -> Evaluation:
        """Answer from the journal, or evaluate and record."""
        request = {"weights": weights, "gradient": gradient, "example_weights": example_weights}
        known = self._journal.replay(request)
        if known is not None:
            return known
        began = time.perf_counter()
        evaluation = self._objective(weights, gradient=gradient, example_weights=example_weights)
        self._journal.write(request, evaluation, time.perf_counter() - began)
        return evaluation


def _check(path: Path, lines: list[dict[str, Any]], fingerprint: Any) -> None:
    header, *entries = lines
    if header.get("compose_search_journal") != FORMAT:
        raise RunFolderError(f"{path} has journal format {header['compose_search_journal']}, this is {FORMAT}")
    differing = _differing(header.get("fingerprint"), fingerprint)
    if differing:
        raise RunFolderError(f"{path} belongs to another run; these differ: {'; '.join(differing)}")
    required = {"weights", "gradient", "example_weights", "losses", "gradients", "cost"}
    for number, entry in enumerate(entries, start=2):
        if not required <= entry.keys():
            raise RunFolderError(f"{path}, line {number}: {sorted(required - entry.keys())} missing")


def _pack(array: np.ndarray | None) -> str | None:
    return None if array is None else base64.b64encode(np.asarray(array).astype("<f8").tobytes()).decode("ascii")


def _unpack(text: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the array, or None when the number of entries does not fit the shape."""
    data = base64.b64decode(text)
    if len(data) != 8 * math.prod(shape):
        return None
    return np.frombuffer(data, dtype="<f8").astype(np.float64).reshape(shape)


def _readable(loss: float) -> float | str:
    return loss if math.isfinite(loss) else repr(loss)


def _evaluation(entry: Mapping[str, Any], shape: tuple[int, ...]) -> Evaluation:
    losses = np.array([[float(loss) for loss in row] for row in entry["losses"]], dtype=np.float64)
    gradients = None if entry["gradients"] is None else _unpack(entry["gradients"], shape)
    return Evaluation(losses, gradients, float(entry["cost"]))


def _difference(entry: Mapping[str, Any], request: Mapping[str, Any]) -> str | None:
    if entry["gradient"] != request["gradient"]:
        return f"it holds gradient={entry['gradient']}, the search asks for gradient={request['gradient']}"
    for name in ("weights", "example_weights"):
        if (entry[name] is None) != (request[name] is None):
            return f"{name} are given on one side only"
        if request[name] is None:
            continue
        held = _unpack(entry[name], request[name].shape)
        if held is None:
            return f"its {name} are not of shape {request[name].shape}"
        distance = float(np.abs(held - request[name]).max(initial=0.0))
        if not distance <= SAME:
            return f"its {name} differ from the search's by up to {distance:.3g}"
    return None


def _differing(held: Any, given: Any, path: str = "") -> list[str]:
    if isinstance(held, dict) and isinstance(given, dict):
        keys = [*held, *(key for key in given if key not in held)]
        return [
            text for key in keys for text in _differing(held.get(key), given.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if held == given else [f"{path or 'fingerprint'} was {held!r}, now {given!r}"]


def _sync_folder(path: Path) -> None:
    if sys.platform == "win32":
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
