"""A running batch: requests enter and leave between the model's calls, each with its own adapter, weights, or none."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from compose.engine.attach import AttachedModel
from compose.engine.coefficients import Combine, Selection
from compose.engine.generate import default_stop_ids
from compose.engine.rows import RowAdapter, RowWeights, row_weights, rows_selection
from compose.engine.running_rows import RunningRows, check_rows_can_move, most_positions, start_rows, step_rows
from compose.errors import IncompatibleError


@dataclass(frozen=True, eq=False)
class Request:
    """One row's work.

    Attributes:
        prompt: Token ids.
        adapter: An adapter's name, a mapping of names to weights, or ``None`` for the bare base model.
        max_new_tokens: Upper limit of new tokens.
        id: Anything the caller knows the request by.
    """

    prompt: Sequence[int]
    adapter: RowAdapter = None
    max_new_tokens: int = 64
    id: object = None


@dataclass(frozen=True, eq=False)
class Finished:
    """A request that is done.

    Attributes:
        request: The very object that was added.
        tokens: New token ids, without the stop token.
        reason: ``"stop"``: a stop token came; ``"length"``: ``max_new_tokens`` are there.
    """

    request: Request
    tokens: list[int]
    reason: Literal["stop", "length"]


@dataclass(eq=False)
class _Row:
    request: Request
    weights: RowWeights
    tokens: list[int] = field(default_factory=list)


class RunningBatch:
    """Greedy generation for requests that come at any time; every row gets the text it gets alone, up to rounding.

    A step is one call of the model for all running rows, and one more for the prompts that join in that step. A row
    leaves when it is done and a waiting one takes its place; the bank stays attached throughout, and outside of `step`
    the handle's own selection is in force. Decoder-only models that take positions, and the T5 family.

    Args:
        attached: The handle of the model.
        max_rows: How many rows run at a time; more wait, in order of arrival.
        stop_ids: Token ids that end a row; ``None``: the model's own.
        combine: How the adapters of a weighted set are combined (see ``Coefficients``).

    Raises:
        IncompatibleError: Rows of this model cannot join a running batch; the message says why.

    Example:
        batch = RunningBatch(attached)
        batch.add(Request([5, 9, 11], "reverse_order"))
        for finished in batch.run():
            print(finished.tokens)
    """

    def __init__(
        self,
        attached: AttachedModel,
        *,
        max_rows: int = 16,
        stop_ids: Sequence[int] | None = None,
        combine: Combine = "outputs",
    ) -> None:
        if max_rows < 1:
            raise IncompatibleError(f"max_rows must be at least 1, got {max_rows}")
        check_rows_can_move(attached.model)
        self.attached = attached
        self.max_rows = max_rows
        self._stop_ids = frozenset(default_stop_ids(attached.model) if stop_ids is None else stop_ids)
        self._combine: Combine = combine
        self._waiting: deque[_Row] = deque()
        self._running: list[_Row] = []
        self._done: list[Finished] = []
        self._state: RunningRows | None = None
        self._selection: Selection | None = None

    @property
    def running(self) -> tuple[Request, ...]:
        """Requests that are being generated."""
        return tuple(row.request for row in self._running)

    @property
    def waiting(self) -> tuple[Request, ...]:
        """Requests that wait for a place, the next one first."""
        return tuple(row.request for row in self._waiting)

    def check(self, request: Request) -> None:
        """Raise unless `add` would take ``request``.

        Raises:
            IncompatibleError: No tokens, a token outside the vocabulary, more tokens than the model has positions, a
                limit below 1, or a weight that is no finite number.
            UnknownNameError: An adapter is not in the bank.
        """
        row_weights(self.attached.bank, request.adapter)
        if request.max_new_tokens < 1:
            raise IncompatibleError(f"max_new_tokens must be at least 1, got {request.max_new_tokens}")
        if not request.prompt:
            raise IncompatibleError("the prompt has no tokens")
        model: Any = self.attached.model
        vocabulary = model.get_input_embeddings().num_embeddings
        outside = [token for token in request.prompt if not 0 <= token < vocabulary]
        if outside:
            raise IncompatibleError(f"token ids must lie in [0, {vocabulary}), got {outside[0]}")
        positions = most_positions(model)
        needed = len(request.prompt) + request.max_new_tokens - 1
        if positions is not None and needed > positions:
            raise IncompatibleError(
                f"{len(request.prompt)} prompt tokens and {request.max_new_tokens} new ones need {needed} positions, "
                f"the model has {positions}; shorten the prompt or lower max_new_tokens"
            )

    def add(self, request: Request) -> None:
        """Let ``request`` wait for a place; it joins in the next `step` that has one.

        Raises:
            IncompatibleError, UnknownNameError: As `check`.
        """
        self.check(request)
        self._waiting.append(_Row(request, row_weights(self.attached.bank, request.adapter)))

    def remove(self, request: Request) -> list[int]:
        """Take out a request that waits or runs; return its new tokens so far.

        Raises:
            IncompatibleError: It is not in this batch, or is done.
        """
        for row in (*self._waiting, *self._running):
            if row.request is request:
                if row in self._waiting:
                    self._waiting.remove(row)
                else:
                    self._keep([other for other in self._running if other is not row])
                return row.tokens
        raise IncompatibleError("this request neither waits nor runs here; it is done, or was never added")

    def step(self) -> list[Finished]:
        """Give every running row one more token, let rows that are done leave, and let waiting ones join.

        Should the model raise, no request is lost: rows in the middle of a step start again from their prompts.

        Returns:
            What finished, in order of the rows.
        """
        if self._running:
            self._advance()
        room = self.max_rows - len(self._running)
        if room and self._waiting:
            self._join([self._waiting[index] for index in range(min(room, len(self._waiting)))])
        done, self._done = self._done, []
        return done

    def run(self) -> Iterator[Finished]:
        """Step until nothing runs or waits, and yield what finishes; requests may be added meanwhile."""
        while self._running or self._waiting or self._done:
            yield from self.step()

    def _advance(self) -> None:
        state = self._state
        assert state is not None  # noqa: S101 - rows run, so they have a state
        newest = torch.tensor([row.tokens[-1] for row in self._running], device=state.mask_BT.device)
        try:
            with torch.no_grad(), self.attached.using(self._selection):
                scores = step_rows(self.attached.model, state, newest)
            self._take(self._running, scores)
            self._keep([row for row in self._running if not self._finish(row)])
        except BaseException:
            self._restart()
            raise

    def _join(self, rows: list[_Row]) -> None:
        with torch.no_grad(), self.attached.using(self._select(rows)):
            scores, state = start_rows(self.attached.model, [row.request.prompt for row in rows])
        self._take(rows, scores)
        for _ in rows:
            self._waiting.popleft()
        before, self._running = self._running, [*self._running, *rows]
        try:
            if self._state is None:
                self._state = state
            else:
                self._state.join(state)
            self._keep([*before, *(row for row in rows if not self._finish(row))], changed=True)
        except BaseException:
            self._restart()
            raise

    def _take(self, rows: list[_Row], scores_BV: torch.Tensor) -> None:
        for row, token in zip(rows, scores_BV.float().argmax(-1).tolist(), strict=True):
            row.tokens.append(token)

    def _finish(self, row: _Row) -> bool:
        """Whether ``row`` is done; if so, it is among the results."""
        if row.tokens[-1] in self._stop_ids:
            self._done.append(Finished(row.request, row.tokens[:-1], "stop"))
        elif len(row.tokens) == row.request.max_new_tokens:
            self._done.append(Finished(row.request, row.tokens, "length"))
        else:
            return False
        return True

    def _keep(self, rows: list[_Row], *, changed: bool = False) -> None:
        """Make ``rows``, some of the running ones, all that run."""
        if len(rows) < len(self._running):
            places = {id(row): place for place, row in enumerate(self._running)}
            if not rows:
                self._state = None
            elif self._state is not None:
                self._state.keep([places[id(row)] for row in rows])
            changed = True
        self._running = rows
        if changed:
            self._selection = self._select(rows)

    def _select(self, rows: list[_Row]) -> Selection | None:
        return rows_selection([row.weights for row in rows], combine=self._combine, device=self.attached.device)

    def _restart(self) -> None:
        done = {id(finished.request) for finished in self._done}
        again = [_Row(row.request, row.weights) for row in self._running if id(row.request) not in done]
        self._waiting.extendleft(reversed(again))
        self._running, self._state, self._selection = [], None, None
