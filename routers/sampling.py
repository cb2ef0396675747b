"""Sampling from mixed tasks: how often each task comes, what a batch is made of; a pure function of seed and step.

Draws are laid out in rounds of ``L`` slots. A slot is one record, or with homogeneous batches one micro-batch. By the
end of round ``r`` task ``t`` has had ``floor(r L P_t + u) - floor(r L P_{t-1} + u)`` slots, with ``P`` the running sum
of the tasks' shares: less than one slot from ``r L p_t``, in closed form, so no earlier round has to be replayed. A
seeded permutation orders the slots of a round. The records of a task come in cycles: with equal weights every cycle
holds each record once, in a new order; otherwise it holds a record ``floor`` or ``ceil`` of its expected number of
times (systematic sampling).

With shares in proportion to the records and batches mixed, a round is therefore one epoch: every record once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch

from compose.errors import IncompatibleError
from compose.routers.records import MixedExample

Shares = Literal["proportional", "sqrt", "equal", "temperature"]
BatchKind = Literal["mixed", "homogeneous", "balanced"]

MAX_ROUND = 2**24
"""Most slots of a round; a share below one in this many is refused."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How often tasks come, and what a micro-batch is made of.

    Attributes:
        by: Share of a task with ``n`` records (the sum of their weights): in proportion to ``n``, to ``sqrt(n)``, to
            ``n ** (1 / temperature)``, or equal. None: equal for balanced batches, else proportional.
        temperature: 1 is proportional, 2 the square root; large values near equal shares.
        batch: ``"mixed"``; ``"homogeneous"``: one task per micro-batch; ``"balanced"``: every task equally often in
            every micro-batch (of every process).
    """

    by: Shares | None = None
    temperature: float | None = None
    batch: BatchKind = "mixed"

    def __post_init__(self) -> None:
        problems = []
        if self.by is not None and self.by not in get_args(Shares):
            problems.append(f"by must be one of {', '.join(get_args(Shares))}; got {self.by!r}")
        if self.batch not in get_args(BatchKind):
            problems.append(f"batch must be one of {', '.join(get_args(BatchKind))}; got {self.batch!r}")
        if (self.temperature is not None) != (self.by == "temperature"):
            problems.append("temperature goes with by 'temperature', which needs it")
        if self.temperature is not None and not (math.isfinite(self.temperature) and self.temperature > 0):
            problems.append(f"temperature must be a number > 0, got {self.temperature}")
        if self.batch == "balanced" and self.by not in (None, "equal"):
            problems.append(f"balanced batches take every task equally often; leave out by, which is {self.by!r}")
        if problems:
            raise IncompatibleError("; ".join(problems))

    def shares(self, sizes: Sequence[float]) -> list[float]:
        """Share of each task, adding up to 1.

        Args:
            sizes: Sum of the weights of each task's records, > 0.
        """
        by = self.by or ("equal" if self.batch == "balanced" else "proportional")
        power = {"proportional": 1.0, "sqrt": 0.5, "equal": 0.0}.get(by)
        if power is None:
            power = 1 / float(self.temperature or 1)
        largest = max(sizes)
        raised = [(size / largest) ** power for size in sizes]
        return [one / math.fsum(raised) for one in raised]


class _Task(NamedTuple):
    """A task's records, as positions in the data."""

    name: str
    records: torch.Tensor
    weights: torch.Tensor
    equal: bool


class TaskSampler:
    """Batches of record numbers; the same for a step whenever and in whatever order it is asked for.

    A step takes ``batch_size`` records, cut into ``accumulation`` micro-batches. With ``world`` processes each takes
    an equal part of every micro-batch, so that together they see what one process sees.

    Args:
        examples: The records. Only task and weight are read; records of weight 0 are never drawn.
        sampling: See `Sampling`.
        batch_size: Records per step, of all processes.
        accumulation: Micro-batches per step.
        seed: Any integer.
        keep: Positions of the records that take part; None: all.

    Attributes:
        shares: Task -> part of the draws, by name.
        num_records: Records that are ever drawn.
        micro_batch: Records of a micro-batch, of all processes.
        round_slots: Slots of a round; see the module.

    Raises:
        IncompatibleError: There are no records, a task has no record with a weight, or the settings do not fit.
    """

    def __init__(
        self,
        examples: Sequence[MixedExample],
        sampling: Sampling,
        *,
        batch_size: int,
        accumulation: int = 1,
        seed: int = 0,
        keep: Sequence[int] | None = None,
    ) -> None:
        self.sampling = sampling
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.seed = seed
        self._tasks = _by_task(examples, range(len(examples)) if keep is None else keep)
        self.num_records = sum(len(task.records) for task in self._tasks)
        _check_sizes(batch_size, accumulation, sampling, len(self._tasks))
        self.micro_batch = batch_size // accumulation
        sizes = [float(task.weights.sum()) for task in self._tasks]
        self.shares = dict(zip(self.tasks, sampling.shares(sizes), strict=True))
        self._slot = self.micro_batch if sampling.batch == "homogeneous" else 1
        self._bounds = torch.tensor([0.0, *self.shares.values()], dtype=torch.float64).cumsum(0)
        self._bounds[-1] = 1.0
        self.round_slots = _round_slots(self.num_records, self._slot, self.shares)
        self._offset = 0.25 + 0.5 * float(torch.rand((), generator=self._generator("offset"), dtype=torch.float64))
        self._rounds: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._cycles: dict[int, tuple[int, torch.Tensor]] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, sorted."""
        return tuple(task.name for task in self._tasks)

    def num_steps(self, epochs: float) -> int:
        """Steps in which ``epochs`` times as many records are drawn as there are, rounded up.

        Raises:
            IncompatibleError: ``epochs`` is not > 0.
        """
        if not (math.isfinite(epochs) and epochs > 0):
            raise IncompatibleError(f"epochs must be a number > 0, got {epochs}")
        return max(1, math.ceil(round(epochs * self.num_records / self.batch_size, 9)))

    def batch(self, step: int, *, rank: int = 0, world: int = 1) -> tuple[tuple[int, ...], ...]:
        """Return the micro-batches of a step, as positions in ``examples``.

        Args:
            step: From 0.
            rank: Process, from 0.
            world: Processes. Their parts of a micro-batch, in order, are the micro-batch of one process.

        Raises:
            IncompatibleError: ``step`` or ``rank`` is out of range, or a micro-batch cannot be cut into so many parts.
        """
        self._check_world(step, rank, world)
        part = self.micro_batch // world
        start = step * self.accumulation
        whole = [self._micro_batch(number) for number in range(start, start + self.accumulation)]
        return tuple(tuple(records[rank * part : (rank + 1) * part]) for records in whole)

    def counts(self, start: int, stop: int) -> dict[str, int]:
        """Task -> records drawn in the steps ``start`` to ``stop - 1``, of all processes; without drawing them.

        Raises:
            IncompatibleError: ``start`` or ``stop`` is negative.
        """
        if start < 0 or stop < start:
            raise IncompatibleError(f"steps must be 0 <= start <= stop, got {start} and {stop}")
        if self.sampling.batch == "balanced":
            each = (stop - start) * self.batch_size // len(self._tasks)
            return dict.fromkeys(self.tasks, each)
        per_step = self.batch_size // self._slot
        drawn = self._slots_before(stop * per_step) - self._slots_before(start * per_step)
        return dict(zip(self.tasks, (drawn * self._slot).tolist(), strict=True))

    def _check_world(self, step: int, rank: int, world: int) -> None:
        if step < 0:
            raise IncompatibleError(f"step must be >= 0, got {step}")
        if world < 1 or not 0 <= rank < world:
            raise IncompatibleError(f"rank must lie in 0..world - 1, got rank {rank} of {world}")
        tasks = len(self._tasks) if self.sampling.batch == "balanced" else 1
        if self.micro_batch % (world * tasks):
            among = f" with each of {tasks} tasks equally often" if tasks > 1 else ""
            raise IncompatibleError(
                f"a micro-batch of {self.micro_batch} records cannot be shared by {world} processes{among}; "
                f"make batch_size a multiple of {world * tasks * self.accumulation}"
            )

    def _micro_batch(self, number: int) -> list[int]:
        """Records of micro-batch ``number``, counted from the first step."""
        if self.sampling.batch == "balanced":
            each = self.micro_batch // len(self._tasks)
            places = [(task, number * each + turn) for turn in range(each) for task in range(len(self._tasks))]
        elif self.sampling.batch == "homogeneous":
            task, place = self._slot_at(number)
            places = [(task, place * self._slot + turn) for turn in range(self._slot)]
        else:
            start = number * self.micro_batch
            places = [self._slot_at(slot) for slot in range(start, start + self.micro_batch)]
        return [self._record(task, place) for task, place in places]

    def _slot_at(self, slot: int) -> tuple[int, int]:
        """The task of a slot, and how many slots the task had before it."""
        number, inside = divmod(slot, self.round_slots)
        tasks, places = self._round(number)
        return int(tasks[inside]), int(places[inside])

    def _round(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Task of each slot of a round, and how many slots the task had before."""
        if number not in self._rounds:
            before, after = self._quota(number), self._quota(number + 1)
            sorted_tasks = torch.repeat_interleave(torch.arange(len(self._tasks)), after - before)
            ranges = zip(before.tolist(), after.tolist(), strict=True)
            sorted_places = torch.cat([torch.arange(low, high) for low, high in ranges])
            slots = torch.randperm(self.round_slots, generator=self._generator("round", number))
            tasks = torch.empty_like(sorted_tasks)
            tasks[slots] = sorted_tasks
            places = torch.empty_like(sorted_places)
            places[tasks.sort(stable=True).indices] = sorted_places
            self._rounds = {key: kept for key, kept in self._rounds.items() if key == number - 1}
            self._rounds[number] = (tasks, places)
        return self._rounds[number]

    def _quota(self, rounds: int) -> torch.Tensor:
        """int64 per task: slots it has in the first ``rounds`` rounds."""
        ends = (self._bounds * (rounds * self.round_slots) + self._offset).floor().long()
        return ends.diff()

    def _slots_before(self, slot: int) -> torch.Tensor:
        number, inside = divmod(slot, self.round_slots)
        if inside == 0:
            return self._quota(number)
        tasks, _ = self._round(number)
        return self._quota(number) + torch.bincount(tasks[:inside], minlength=len(self._tasks))

    def _record(self, task: int, place: int) -> int:
        """The record at ``place`` of a task's endless sequence."""
        records = self._tasks[task].records
        cycle, inside = divmod(place, len(records))
        if task not in self._cycles or self._cycles[task][0] != cycle:
            self._cycles[task] = (cycle, records[self._cycle(self._tasks[task], cycle)])
        return int(self._cycles[task][1][inside])

    def _cycle(self, task: _Task, cycle: int) -> torch.Tensor:
        generator = self._generator("cycle", task.name, cycle)
        size = len(task.records)
        order = torch.randperm(size, generator=generator)
        if task.equal:
            return order
        ends = task.weights.cumsum(0)
        points = (torch.arange(size) + torch.rand((), generator=generator, dtype=torch.float64)) * (ends[-1] / size)
        return torch.searchsorted(ends, points, right=True).clamp(max=size - 1)[order]

    def _generator(self, *key: object) -> torch.Generator:
        digest = hashlib.blake2b(repr((self.seed, *key)).encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _by_task(examples: Sequence[MixedExample], keep: Sequence[int]) -> list[_Task]:
    if not keep:
        raise IncompatibleError("there are no records to sample; check the data and the stage's tasks and experts")
    members: dict[str, list[int]] = {}
    for number in keep:
        kept = members.setdefault(examples[number].task, [])
        if examples[number].weight > 0:
            kept.append(number)
    if empty := sorted(task for task, kept in members.items() if not kept):
        raise IncompatibleError(f"every record of task {', '.join(empty)} has weight 0; leave the task out instead")
    found = []
    for task in sorted(members):
        weights = torch.tensor([float(examples[number].weight) for number in members[task]], dtype=torch.float64)
        found.append(_Task(task, torch.tensor(members[task]), weights, bool((weights == weights[0]).all())))
    return found


def _check_sizes(batch_size: int, accumulation: int, sampling: Sampling, tasks: int) -> None:
    if batch_size < 1 or accumulation < 1:
        raise IncompatibleError(f"batch_size and accumulation must be >= 1, got {batch_size} and {accumulation}")
    if batch_size % accumulation:
        raise IncompatibleError(f"batch_size {batch_size} cannot be cut into {accumulation} equal micro-batches")
    if sampling.batch == "balanced" and batch_size // accumulation % tasks:
        raise IncompatibleError(
            f"a balanced micro-batch of {batch_size // accumulation} records cannot hold {tasks} tasks equally often; "
            f"make batch_size a multiple of {tasks * accumulation}"
        )


def _round_slots(records: int, slot: int, shares: dict[str, float]) -> int:
    """Slots of a round: about one epoch, and enough for a slot of the rarest task."""
    rarest = min(shares, key=lambda task: shares[task])
    if shares[rarest] * MAX_ROUND < 1:
        raise IncompatibleError(
            f"task {rarest!r} has a share of {shares[rarest]:.1e}, too small to ever come; raise its weights or the "
            "temperature, or leave it out"
        )
    least = math.ceil(round(1 / shares[rarest], 9))
    return max(-(-records // slot), least)
