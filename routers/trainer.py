"""RouterTrainer: Transformers' ``Trainer`` for a routed model; importing this module imports transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from compose.errors import IncompatibleError
from compose.routers.collate import Collator, EncodedMixed
from compose.routers.routed import RoutedModel
from compose.routers.saved import mixture_files, refill
from compose.routers.saved_file import MIXTURE


class RouterTrainer(Trainer):
    """Trains a `RoutedModel`; what it saves is the mixture: router and trained experts, as safetensors.

    Everything else is Trainer's: optimiser, schedule, accumulation, resuming. The model's loss is the mean over all
    tokens that a step predicts, and auxiliary losses are means over its micro-batches. Logs hold ``aux_loss`` and
    every auxiliary loss by name.

    Example:
        >>> trainer = RouterTrainer(  # doctest: +SKIP
        ...     routed, args=TrainingArguments("run"), train_dataset=rows, data_collator=router_collator(collator)
        ... )
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(self, model: RoutedModel, args: Any = None, **options: Any) -> None:
        if not isinstance(model, RoutedModel):
            raise IncompatibleError(f"RouterTrainer trains a routed model, got {type(model).__name__}")
        super().__init__(model, args, **options)
        if self.args.n_gpu > 1:
            raise IncompatibleError(
                f"{self.args.n_gpu} GPUs in one process would share one router's state; start one process per GPU "
                "(torchrun), or show this one a single GPU (CUDA_VISIBLE_DEVICES)"
            )
        self.args.remove_unused_columns = False  # a routed model's inputs are not in its signature
        self.args.label_names = ["labels"]
        self.label_names = ["labels"]
        self.model_accepts_loss_kwargs = True  # compute_loss divides, not the training step
        self._loss_shifts_labels = not model.config.is_encoder_decoder
        self._sums: dict[str, torch.Tensor] = {}
        self._calls = 0

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a micro-batch as its part of the step's."""
        output = model(**inputs)
        routed = self._routed()
        aux = getattr(output, "aux_loss", output.loss.new_zeros(()))
        loss = output.loss
        if num_items_in_batch is not None:
            own = getattr(output, "model_loss", loss)
            parts = self.current_gradient_accumulation_steps
            share = self._predicted(inputs["labels"]) / num_items_in_batch
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                share = share * self.accelerator.num_processes
            loss = own * share + aux.to(own.dtype) / parts
        if model.training:
            self._count({"aux_loss": aux.detach(), **routed.last_losses})
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Add the means of the auxiliary losses since the last log."""
        if self._calls and "loss" in logs:
            logs |= {name: float(value) / self._calls for name, value in self._sums.items()}
            self._sums, self._calls = {}, 0
        super().log(logs, *args, **options)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        files = mixture_files(self._routed())
        for name in sorted(files, key=lambda name: name == MIXTURE):  # it names the others, so it comes last
            fresh = folder / f".{name}.tmp"
            fresh.write_bytes(files[name])
            fresh.replace(folder / name)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        refill(self._routed(), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        refill(self._routed(), str(self.state.best_model_checkpoint))

    def _routed(self) -> RoutedModel:
        routed = self.accelerator.unwrap_model(self.model)
        assert isinstance(routed, RoutedModel)  # noqa: S101 - checked in __init__
        return routed

    def _predicted(self, labels: torch.Tensor) -> torch.Tensor:
        """Tokens that a micro-batch predicts, counted as ``num_items_in_batch`` is."""
        return ((labels[..., 1:] if self._loss_shifts_labels else labels) != -100).sum()

    def _count(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.float()
        self._calls += 1


def router_collator(collator: Collator) -> Any:
    """Return a ``data_collator`` for a dataset of `EncodedMixed` rows: the model's inputs and the router's."""

    def collate(rows: Sequence[EncodedMixed]) -> dict[str, torch.Tensor]:
        batch = collator(rows)
        inputs = {**batch.model_inputs(), **batch.routing_inputs()}
        if collator.encoder_decoder:
            del inputs["prompt_mask"]
        return inputs

    return collate
