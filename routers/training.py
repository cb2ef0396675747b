"""train: a mixture over an attached bank, on mixed-task records; a plain loop, deterministic, continued to the bit.

One step: its micro-batches follow from (seed, stage, step); the gradient is that of the mean loss over all tokens that
the step predicts, of all processes, plus the auxiliary losses; AdamW. What a step draws (dropout, noise) follows from
(seed, step, micro-batch, process), so a checkpoint holds no state of generators.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from compose.errors import IncompatibleError, RunFolderError
from compose.routers.balance import SelectionBalance, selection_bias
from compose.routers.builder import build, check_kinds
from compose.routers.checkpoint import (
    Position,
    latest_checkpoint,
    read_position,
    restore_checkpoint,
    write_checkpoint,
)
from compose.routers.optimiser import Optimiser
from compose.routers.processes import processes, share_, sum_, wait
from compose.routers.records import MixedExample
from compose.routers.routed import RoutedModel
from compose.routers.session import Attached
from compose.routers.spec import MixtureSpec
from compose.routers.stages import Stage
from compose.routers.train_data import StageData, TextEmbedding, TrainData, fingerprint, plan_stages, prepare
from compose.routers.train_report import GateSums, StepReport
from compose.routers.train_settings import TrainSettings
from compose.text.encoding import PromptFormat

Progress = Callable[[StepReport], None]
AfterStep = Callable[[RoutedModel, int], None]


class TrainResult(NamedTuple):
    """A trained mixture, in force on its model, and what was logged on the way."""

    routed: RoutedModel
    history: list[dict[str, Any]]


def train(  # noqa: PLR0913 - one parameter per thing that a caller may bring
    attached: Attached,
    spec: MixtureSpec,
    dataset: Sequence[MixedExample],
    *,
    tokenizer: Any,
    prompt_format: PromptFormat | None = None,
    stages: Sequence[Stage] = (),
    steps: int | None = None,
    epochs: float | None = None,
    learning_rate: float = 1e-3,
    settings: TrainSettings | None = None,
    tasks: Sequence[str] | None = None,
    text_embedding: TextEmbedding | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    after_step: AfterStep | None = None,
    **options: Any,
) -> TrainResult:
    """Build a mixture over an attached model and train it.

    Under ``torchrun`` with a process group every process calls this with the same arguments; steps are shared between
    them, and all end with the same weights. The first process writes checkpoints.

    Args:
        attached: ``compose.attach(model, bank)``; with ``trainable=True`` where experts train.
        spec: The mixture.
        dataset: Records; see `compose.routers.records.read_mixed`.
        tokenizer: The model's.
        prompt_format: How records become text.
        stages: One after the other; without them there is one, of ``steps`` or ``epochs`` at ``learning_rate``.
        steps: See ``stages``.
        epochs: See ``stages``; 1 where nothing is said.
        learning_rate: See ``stages``.
        settings: Of the run; ``options`` are fields of it: ``batch_size=16``, ``seed=1`` ...
        tasks: Names in the order of task ids; None: those of the records, sorted.
        text_embedding: For gates that read texts.
        checkpoint_dir: Folder for checkpoints; None: there are none.
        resume: Continue from the last checkpoint there, if any; the end is the same to the bit.
        progress: Called with every step's report.
        after_step: Called after every step of the optimiser, with the number of steps done.
        options: See ``settings``.

    Raises:
        ExamplesError: Records cannot be encoded; all are named.
        IncompatibleError: Bank, specification, records and settings do not fit together, or a loss is not finite.
        RunFolderError: There are checkpoints and ``resume`` is not set, or they are of another run.
    """
    check_kinds(attached, spec)
    chosen = replace(settings or TrainSettings(), **_known(options))
    if spec.train == "none" and not any(stage.train != "preset" for stage in stages):
        raise IncompatibleError(
            f"the mixture {spec.preset!r} trains nothing; build(attached, spec) is ready to use as it is"
        )
    config, experts = attached.model.config, attached.bank.names
    data = prepare(
        dataset, tokenizer, prompt_format or PromptFormat(), config=config, spec=spec, experts=experts,
        settings=chosen, tasks=tasks, text_embedding=text_embedding,
    )  # fmt: skip
    routed = build(
        attached, spec, tasks=data.tasks, clusters=data.clusters, text_features=data.text_features, seed=chosen.seed
    )
    try:
        run = Run(
            routed, data, _stages(stages, steps, epochs, learning_rate), chosen, progress=progress,
            after_step=after_step,
        )  # fmt: skip
        history = run.train(None if checkpoint_dir is None else Path(checkpoint_dir), resume=resume)
    except BaseException:
        routed.remove()  # nobody else could: the caller has no handle of it
        raise
    return TrainResult(routed, history)


@dataclass
class _Losses:
    """Sums over the micro-batches of one step, of all processes."""

    model: torch.Tensor
    aux: torch.Tensor
    parts: dict[str, torch.Tensor]
    tokens: int
    gates: GateSums


class Run:
    """One training run of a mixture.

    Attributes:
        routed: The mixture.
        data: Encoded records.
        settings: Of the run.
        plan: Stages with their steps.
        stage_data: The records of each stage.
        history: Entries so far.

    Args:
        routed: The mixture; its weights change.
        data: Encoded records.
        stages: One after the other.
        settings: Of the run.
        progress: Called with every step's report.
        after_step: Called after every step of the optimiser.

    Raises:
        IncompatibleError: Stages, records and settings do not fit together.
    """

    def __init__(
        self,
        routed: RoutedModel,
        data: TrainData,
        stages: Sequence[Stage],
        settings: TrainSettings,
        *,
        progress: Progress | None = None,
        after_step: AfterStep | None = None,
    ) -> None:
        self.routed = routed
        self.data = data
        self.settings = settings
        self.plan, self.stage_data = plan_stages(data.examples, stages, settings)
        self.history: list[dict[str, Any]] = []
        self._fingerprint = fingerprint(data, self.plan, settings)
        self.progress = progress
        self._after_step = after_step
        self._balance = _balance(routed, settings)
        self._started = 0.0

    def train(self, checkpoints: Path | None = None, *, resume: bool = False) -> list[dict[str, Any]]:
        """Run to the end of the plan and return the history; see `train`."""
        begun = self._begin(checkpoints, resume)
        self._started = time.monotonic()
        step, optimiser = begun if begun is not None else (0, None)
        training = self.routed.training
        with _own_draws(self.routed.device), self._checkpointing():
            self.routed.train()
            try:
                while step < self.plan.total:
                    place = self.plan.place(step)
                    if optimiser is None or place.step == 0:
                        optimiser = self._optimiser(place.stage)
                    self._step(step, optimiser)
                    step += 1
                    if checkpoints is not None and self._is_due(step):
                        self._write(checkpoints, optimiser, Position(step, place.stage, self.history))
            finally:
                self.routed.train(training)
        self.routed.set_trained(self.routed.spec.train)
        return self.history

    def _begin(self, checkpoints: Path | None, resume: bool) -> tuple[int, Optimiser | None] | None:
        """The step to continue with and its optimiser; None for a new run."""
        found = None if checkpoints is None else latest_checkpoint(checkpoints)
        wait()  # nobody writes before all have looked
        share_(parameter.data for parameter in self.routed.trained_parameters().values())
        if found is None:
            return None
        if not resume:
            raise RunFolderError(f"{found.parent} holds checkpoints of a run; resume it, or choose another folder")
        position = read_position(found, self._fingerprint)
        place = self.plan.place(position.step)
        same_stage = place.stage == position.stage and place.step > 0
        optimiser = self._optimiser(place.stage) if same_stage else None
        restore_checkpoint(found, self.routed, optimiser)
        self.history = position.history
        return position.step, optimiser

    def _is_due(self, step: int) -> bool:
        every = self.settings.checkpoint_every
        ends_stage = step == self.plan.total or self.plan.place(step).step == 0
        return ends_stage or (every > 0 and step % every == 0)

    def _write(self, folder: Path, optimiser: Optimiser, position: Position) -> None:
        if processes().first:
            write_checkpoint(folder, self.routed, optimiser, position, self._fingerprint)
        wait()

    def _optimiser(self, stage: int) -> Optimiser:
        """Let train what trains in a stage, with a new optimiser."""
        what = self.plan.stages[stage].train
        self.routed.set_trained(self.routed.spec.train if what == "preset" else what)
        named = self.routed.trained_parameters()
        if not named:
            raise IncompatibleError(f"nothing trains in stage {self.plan.stages[stage].name!r}")
        return Optimiser(named, weight_decay=self.settings.weight_decay, betas=self.settings.betas)

    def _step(self, step: int, optimiser: Optimiser) -> None:
        place = self.plan.place(step)
        stage = self.stage_data[place.stage]
        rank, world = processes()
        losses = self._gradients(step, stage.sampler.batch(place.step, rank=rank, world=world), stage)
        sum_(optimiser.gradients())
        rates = self.plan.rates(step)
        optimiser.set_rates(*rates)
        norm = optimiser.step(self.settings.max_grad_norm)
        if not math.isfinite(norm):
            raise IncompatibleError(
                f"the gradient is not finite in step {step + 1} (stage {stage.stage.name!r}); lower the learning "
                "rate, or look at the records of this step"
            )
        if self._balance is not None:
            self._balance.step()
        if self._after_step is not None:
            self._after_step(self.routed, step + 1)
        self._report(step, stage, losses, rates, norm)

    def _gradients(self, step: int, parts: Sequence[Sequence[int]], stage: StageData) -> _Losses:
        """Add up the gradients of a step's micro-batches in this process."""
        rank, world = processes()
        device = self.routed.device
        batches = [self.data.batch(numbers, device) for numbers in parts]
        counted = torch.tensor([sum(count for _, count in batches)], dtype=torch.int64, device=device)
        sum_([counted])
        tokens = int(counted)
        total = _Losses(torch.zeros((), device=device), torch.zeros((), device=device), {}, tokens, GateSums())
        for number, (inputs, count) in enumerate(batches):
            _seed_draws(self.settings.seed, step, number, rank)
            with self._autocast(device), self.routed.recording() as decisions:
                output = self.routed(**inputs)
            aux = getattr(output, "aux_loss", torch.zeros((), device=device))
            model = getattr(output, "model_loss", output.loss) * (count / tokens)
            aux_part = aux / (len(batches) * world)
            (model + aux_part.to(model.dtype)).backward()
            total.model += model.detach()
            total.aux += aux_part.detach()
            for name, value in self.routed.last_losses.items():
                total.parts[name] = total.parts.get(name, 0) + value / (len(batches) * world)
            total.gates.add(decisions)
            if self._balance is not None:
                self._balance.observe(decisions)
        self._check_finite(step, stage, total)
        return total

    def _check_finite(self, step: int, stage: StageData, losses: _Losses) -> None:
        """Sum the losses over processes; all of them raise, or none."""
        sum_([losses.model, losses.aux, *losses.parts.values()])
        if not bool(losses.model.isfinite() & losses.aux.isfinite()):
            raise IncompatibleError(
                f"the loss is not finite in step {step + 1} (stage {stage.stage.name!r}): model "
                f"{float(losses.model):.4g}, auxiliary {float(losses.aux):.4g}; lower the learning rate, or look at "
                "the records of this step"
            )

    def _report(self, step: int, stage: StageData, losses: _Losses, rates: tuple[float, float], norm: float) -> None:
        logged = (step + 1) % self.settings.log_every == 0 or step + 1 == self.plan.total
        alone = processes().world == 1  # the sums below are of all processes, which may not all have a callback
        if not logged and self.progress is None and alone:
            return
        entropy, load = losses.gates.finish()
        report = StepReport(
            step=step + 1,
            total=self.plan.total,
            stage=stage.stage.name,
            loss=float(losses.model),
            aux_loss=float(losses.aux),
            aux={name: float(value) for name, value in losses.parts.items()},
            entropy=entropy,
            load=load,
            rates=rates,
            gradient_norm=norm,
            tokens=losses.tokens,
            tasks=stage.sampler.counts(0, self.plan.place(step).step + 1),
            seconds=time.monotonic() - self._started,
        )
        if logged:
            self.history.append(report.entry())
        if self.progress is not None:
            self.progress(report)

    def _autocast(self, device: torch.device) -> Any:
        return torch.autocast(device.type, torch.bfloat16) if self.settings.precision == "bf16" else nullcontext()

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        if not self.settings.gradient_checkpointing:
            yield
            return
        self.routed.gradient_checkpointing_enable()
        try:
            yield
        finally:
            self.routed.gradient_checkpointing_disable()


def _known(options: dict[str, Any]) -> dict[str, Any]:
    known = set(TrainSettings.__dataclass_fields__)
    if unknown := sorted(set(options) - known):
        raise IncompatibleError(
            f"train has no option {unknown[0]!r}; options: {', '.join(sorted(known))}, beside train's own arguments "
            "(steps, epochs, learning_rate, stages ...)"
        )
    return options


def _stages(
    stages: Sequence[Stage], steps: int | None, epochs: float | None, learning_rate: float
) -> tuple[Stage, ...]:
    if stages and (steps is not None or epochs is not None):
        raise IncompatibleError("stages have steps or epochs of their own; leave steps and epochs out")
    if stages:
        return tuple(stages)
    epochs = 1.0 if steps is None and epochs is None else epochs
    return (Stage(name="train", steps=steps, epochs=epochs, learning_rate=learning_rate),)


def _balance(routed: RoutedModel, settings: TrainSettings) -> SelectionBalance | None:
    sites = {name: routed.router.site(name) for name in routed.router.layout}
    biased = {name: site for name, site in sites.items() if selection_bias(site) is not None}
    return SelectionBalance(biased, rate=settings.balance_rate) if biased else None


@contextmanager
def _own_draws(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside leaves torch's global generators as they were."""
    devices = range(torch.cuda.device_count()) if device.type == "cuda" else []  # a model may lie on several
    with torch.random.fork_rng(devices=devices):
        yield


def _seed_draws(seed: int, step: int, micro_batch: int, rank: int) -> None:
    digest = hashlib.blake2b(repr((seed, step, micro_batch, rank)).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
