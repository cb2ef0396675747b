"""TrainSettings: what holds for a whole training run; what changes between its stages stands in `Stage`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from compose.errors import IncompatibleError
from compose.routers.collate import Truncate
from compose.routers.sampling import Sampling

Precision = Literal["model", "bf16"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of a run.

    Attributes:
        batch_size: Records per step, of all processes.
        accumulation: Micro-batches per step. The model's loss is the mean over all predicted tokens of a step, however
            they are cut; auxiliary losses are means over micro-batches of their value in each (of all processes).
        sampling: Shares of tasks, kind of batches.
        weight_decay: Of AdamW.
        betas: Of AdamW.
        max_grad_norm: Gradients are clipped to it; None: not at all.
        precision: ``"model"``: the model's own dtype; ``"bf16"``: autocast. Gates are float32, and trained factors in
            half precision have float32 masters in either case.
        gradient_checkpointing: Compute layers again in ``backward``; same gradients, less memory.
        seed: Of initial values, batches, dropout and noise.
        max_length: Most tokens of an example; None: any.
        truncate: What to do with longer ones.
        balance_rate: Step of loss-free balance, where a selector has a bias for it (arXiv:2408.15664).
        checkpoint_every: Steps between checkpoints; 0: only at the end of stages.
        log_every: Steps between entries of the history; the last step always has one.
    """

    batch_size: int = 8
    accumulation: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float | None = 1.0
    precision: Precision = "model"
    gradient_checkpointing: bool = False
    seed: int = 0
    max_length: int | None = None
    truncate: Truncate = "refuse"
    balance_rate: float = 1e-3
    checkpoint_every: int = 100
    log_every: int = 1

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least {least}, got {getattr(self, name)}"
            for name, least in (("batch_size", 1), ("accumulation", 1), ("checkpoint_every", 0), ("log_every", 1))
            if getattr(self, name) < least
        ]
        if self.precision not in get_args(Precision):
            problems.append(f"precision must be one of {', '.join(get_args(Precision))}, got {self.precision!r}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            problems.append(f"weight_decay must be a number >= 0, got {self.weight_decay}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            problems.append(f"max_grad_norm must be > 0 or None, got {self.max_grad_norm}")
        if not all(0 <= beta < 1 for beta in self.betas) or len(self.betas) != 2:
            problems.append(f"betas must be two numbers in [0, 1), got {self.betas}")
        if problems:
            raise IncompatibleError("; ".join(problems))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)
