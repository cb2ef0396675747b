"""SiteSums: running sums over the decisions of one site, per task; adding sums is adding batches.

Shape letters: ``N`` decisions, ``E`` experts, ``L`` lines (unknown tasks, then one per task), ``C`` columns.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from compose.errors import IncompatibleError
from compose.routers.entropy import shannon
from compose.routers.routing import Decisions

Counted = Literal["real", "response"]

SCALARS = (
    "decisions", "entropy", "active", "kept", "gate_sum", "labelled", "correct", "label_share", "pairs", "switches",
)  # fmt: skip
VECTORS = ("importance", "load", "chosen", "dominant")


class SiteSums(NamedTuple):
    """Float64 sums of one site.

    Of every counted decision: 1 (``decisions``), the entropy in nats of its probabilities (``entropy``), how many
    experts have a gate that is not 0 (``active``), the probability those hold (``kept``), the sum of the gates
    (``gate_sum``); 1 if the expert it should name is known and exists here (``labelled``), 1 if that expert is the
    dominant one (``correct``), that expert's share of the gates (``label_share``); 1 if the decision before it in the
    row counts as well (``pairs``), 1 if another expert dominated there (``switches``). Per expert: its share of the
    probabilities (``importance``), its share of the absolute gates (``load``), 1 if its gate is not 0 (``chosen``), 1
    if its absolute gate is the largest, the first of equals (``dominant``).

    Attributes:
        site: Name of the site.
        layer: Its layer number, -1 for a site of the whole model.
        available_E: bool: experts that take part here; always-on ones do not.
        sums_LC: ``SCALARS``, then ``E`` columns for each of ``VECTORS``.
    """

    site: str
    layer: int
    available_E: torch.Tensor
    sums_LC: torch.Tensor

    def scalar(self, name: str) -> torch.Tensor:
        """One of ``SCALARS``, ``(L,)``."""
        return self.sums_LC[:, SCALARS.index(name)]

    def vector(self, name: str) -> torch.Tensor:
        """One of ``VECTORS``, ``(L, E)``."""
        experts = len(self.available_E)
        start = len(SCALARS) + VECTORS.index(name) * experts
        return self.sums_LC[:, start : start + experts]

    def added(self, other: SiteSums) -> SiteSums:
        """Sums of both.

        Raises:
            IncompatibleError: They are of different experts.
        """
        if not torch.equal(self.available_E, other.available_E):
            raise IncompatibleError(f"{self.site}: the sums are of different experts and cannot be added")
        return self._replace(sums_LC=self.sums_LC + other.sums_LC)

    def to_json(self, tasks: tuple[str, ...]) -> dict[str, Any]:
        """Plain values; lines without decisions and pairs are left out."""
        lines = []
        for number, task in enumerate((None, *tasks)):
            row = {"task": task, **{name: float(self.scalar(name)[number]) for name in SCALARS}}
            if row["decisions"] or row["pairs"]:
                lines.append({**row, **{name: self.vector(name)[number].tolist() for name in VECTORS}})
        return {"site": self.site, "layer": self.layer, "available": self.available_E.tolist(), "sums": lines}

    @classmethod
    def from_json(cls, plain: dict[str, Any], tasks: tuple[str, ...]) -> SiteSums:
        """The sums of `to_json`; ``KeyError``, ``TypeError`` or ``ValueError`` where it is none."""
        available_E = torch.tensor(plain["available"], dtype=torch.bool)
        made = cls(str(plain["site"]), int(plain["layer"]), available_E, empty(len(tasks), len(available_E)))
        for line in plain["sums"]:
            number = 0 if line["task"] is None else 1 + tasks.index(line["task"])
            for name in SCALARS:
                made.scalar(name)[number] = line[name]
            for name in VECTORS:
                values = torch.tensor(line[name], dtype=torch.float64)
                if values.shape != available_E.shape:
                    raise ValueError(f"{name} has {len(values)} entries for {len(available_E)} experts")
                made.vector(name)[number] = values
        return made


def empty(num_tasks: int, num_experts: int) -> torch.Tensor:
    """Zeros ``(L, C)`` float64."""
    return torch.zeros(1 + num_tasks, len(SCALARS) + len(VECTORS) * num_experts, dtype=torch.float64)


def sums_of(decisions: Decisions, *, num_tasks: int, over: Counted) -> SiteSums:
    """Sum up the decisions of one site in one forward.

    Args:
        decisions: See `Decisions`; whatever padding holds is not read.
        num_tasks: Known tasks; 0: all decisions are summed under one line.
        over: ``"real"``: all but padding; ``"response"``: tokens of the response only.

    Raises:
        IncompatibleError: A task number is not below ``num_tasks``, or a counted decision is not finite.
    """
    counted = decisions.real_N & decisions.response_N if over == "response" else decisions.real_N
    lines_N = _lines(decisions.tasks_N, num_tasks, decisions.site)
    with torch.no_grad():
        columns_NC = torch.where(counted[:, None], _columns(decisions, counted), 0.0)
        sums_LC = columns_NC.new_zeros(1 + num_tasks, columns_NC.shape[1])
        sums_LC.index_add_(0, lines_N.to(columns_NC.device), columns_NC)
    sums_LC = sums_LC.cpu()
    if not bool(sums_LC.isfinite().all()):
        raise IncompatibleError(f"{decisions.site}: gates or probabilities are not finite; look at the gate's weights")
    return SiteSums(decisions.site, decisions.layer, decisions.available_E.cpu(), sums_LC)


def dominant_expert(decisions: Decisions) -> torch.Tensor:
    """int64 ``(N,)``: the available expert with the largest absolute gate, the first of equals; -1 where all are 0."""
    gates_NE = torch.where(decisions.available_E, decisions.gates_NE.abs(), 0)
    largest, expert_N = gates_NE.max(-1)
    first_N = (gates_NE == largest[:, None]).to(torch.int8).argmax(-1)
    return torch.where(largest > 0, first_N, torch.full_like(expert_N, -1))


def gate_shares(decisions: Decisions) -> torch.Tensor:
    """float64 ``(N, E)``: absolute gates of available experts, divided by their sum; 0 where all are 0."""
    return _shares(torch.where(decisions.available_E, decisions.gates_NE, 0))


def _shares(values_NE: torch.Tensor) -> torch.Tensor:
    values_NE = values_NE.double().abs()
    total = values_NE.sum(-1, keepdim=True)
    return torch.where(total > 0, values_NE / torch.where(total > 0, total, 1), 0)


def _lines(tasks_N: torch.Tensor, num_tasks: int, site: str) -> torch.Tensor:
    if not num_tasks:
        return torch.zeros_like(tasks_N)
    largest = int(tasks_N.max()) if len(tasks_N) else -1
    if largest >= num_tasks:
        raise IncompatibleError(f"{site}: task number {largest}, but {num_tasks} tasks are named; name all of them")
    return tasks_N.clamp_min(-1) + 1


def _columns(decisions: Decisions, counted_N: torch.Tensor) -> torch.Tensor:
    """``(N, C)`` float64: what every decision adds."""
    available_E = decisions.available_E
    gates_NE = torch.where(available_E, decisions.gates_NE.double(), 0)
    importance_NE = _shares(torch.where(available_E, decisions.probs_NE, 0))
    load_NE = gate_shares(decisions)
    chosen_NE = gates_NE != 0
    dominant_N = dominant_expert(decisions)
    dominant_NE = torch.nn.functional.one_hot(dominant_N + 1, len(available_E) + 1)[:, 1:].double()
    named_N = _named_experts(decisions)
    labelled_N = (decisions.labels_N >= 0) & available_E[named_N]
    pairs_N, switches_N = _neighbours(decisions, counted_N, dominant_N)
    scalars = (
        torch.ones_like(named_N),
        shannon(importance_NE),
        chosen_NE.sum(-1),
        (importance_NE * chosen_NE).sum(-1),
        gates_NE.sum(-1),
        labelled_N,
        labelled_N & (dominant_N == decisions.labels_N),
        torch.where(labelled_N, load_NE.gather(-1, named_N[:, None]).squeeze(-1), 0),
        pairs_N,
        switches_N,
    )
    narrow = torch.stack([values.double() for values in scalars], -1)
    return torch.cat([narrow, importance_NE, load_NE, chosen_NE.double(), dominant_NE], -1)


def _named_experts(decisions: Decisions) -> torch.Tensor:
    """The labels as indices; 0 where there is none."""
    labels_N, experts = decisions.labels_N, len(decisions.available_E)
    largest = int(labels_N.max()) if len(labels_N) else -1
    if largest >= experts:
        raise IncompatibleError(f"{decisions.site}: expert label {largest}, but there are {experts} experts")
    return labels_N.clamp_min(0)


def _neighbours(
    decisions: Decisions, counted_N: torch.Tensor, dominant_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether the token before, in the same row, is one of the response too, and whether its expert was another."""
    pairs_N = torch.zeros_like(counted_N)
    if decisions.rows_N is not None and len(counted_N) > 1:
        told_N = counted_N & decisions.response_N
        pairs_N[1:] = told_N[1:] & told_N[:-1] & (decisions.rows_N[1:] == decisions.rows_N[:-1])
    before_N = torch.cat([dominant_N[:1], dominant_N[:-1]])
    return pairs_N, pairs_N & (before_N != dominant_N)
