"""Poly and MHR: skills combined by task, in parameters (arXiv:2202.13914, arXiv:2211.03831)."""

from __future__ import annotations

from compose.routers.gates.table import TableGate
from compose.routers.normalisations.relaxed_bernoulli import RelaxedBernoulli
from compose.routers.presets.registry import FreshExperts, Preset, enter
from compose.routers.spec import MixtureSpec

_EXPERTS = FreshExperts(num_experts=4, rank=8, alpha=1.0)
_UNKNOWN = "an unknown task (-1) reads the mean row of scores, as mttl's fallback"


def _spec(splits: int) -> MixtureSpec:
    return MixtureSpec(
        scope="task", gate_input="task_id", gate=TableGate(rows="tasks", init="uniform", bound=1e-3),
        normalise=RelaxedBernoulli(), combine="parameters", splits=splits, train="both", departures=(_UNKNOWN,),
    )  # fmt: skip


@enter("poly")
def poly() -> Preset:
    """Poly (arXiv:2202.13914): ``(Σ z B)(Σ z A) x / r`` with the task's skill allocation ``z``; sizes as in PEFT."""
    return Preset(
        paper="2202.13914", summary="skills allocated to tasks, parameters mixed", spec=_spec(1), experts=_EXPERTS,
        needs=("tasks",),
    )  # fmt: skip


@enter("mhr")
def mhr() -> Preset:
    """MHR (arXiv:2211.03831): Poly with an allocation for each of 4 blocks of the widths."""
    return Preset(
        paper="2211.03831", summary="skills allocated to tasks in 4 splits, parameters mixed", spec=_spec(4),
        experts=_EXPERTS, needs=("tasks",), limits="4 splits must divide the widths of every target",
    )  # fmt: skip
