"""MOELoRA: gates by task (arXiv:2310.18339)."""

from __future__ import annotations

from compose.routers.gates.embedding import EmbeddingGate
from compose.routers.presets.registry import FreshExperts, Preset, enter
from compose.routers.spec import MixtureSpec

_EXPERTS = FreshExperts(num_experts=8, rank=2, alpha=4.0)
_GATE = EmbeddingGate(of="tasks", width=64)
_DEPARTURES = (
    "recalled, not verified: alpha 32 of the total rank 16, a scaling of 2",
    "the mean of the tasks' vectors stands for an unknown task (-1); upstream has one unused row",
)


@enter("moelora_task")
def moelora_task() -> Preset:
    """MOELoRA (arXiv:2310.18339): a task's learned vector decides at every target; rank 16 in 8 experts."""
    spec = MixtureSpec(scope="task", gate_input="task_id", gate=_GATE, train="both", departures=_DEPARTURES)
    return Preset(
        paper="2310.18339", summary="gates from the task's embedding, per target", spec=spec, experts=_EXPERTS,
        needs=("tasks",),
    )  # fmt: skip


@enter("moelora_task_shared")
def moelora_task_shared() -> Preset:
    """MOELoRA(S) (arXiv:2310.18339): one gate for all layers (one each for encoder and decoder)."""
    spec = MixtureSpec(
        site="model", scope="task", gate_input="task_id", gate=_GATE, train="both", departures=_DEPARTURES
    )
    return Preset(
        paper="2310.18339", summary="gates from the task's embedding, one for all layers", spec=spec,
        experts=_EXPERTS, needs=("tasks",),
    )  # fmt: skip
