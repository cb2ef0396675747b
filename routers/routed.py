"""RoutedModel: an attached model with its router as one module to train, run and save."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.routers.context import RoutingContext
from compose.routers.losses.total import total_loss
from compose.routers.routing import Decisions, Routing
from compose.routers.session import RoutingSession
from compose.routers.spec import MixtureSpec, Trains

_OF_MODEL = ("attention_mask", "labels", "lag")
_CONTEXT = tuple(each.name for each in fields(RoutingContext) if each.name not in _OF_MODEL)


class RoutedModel(nn.Module):
    """The model, its router and what trains, as one module.

    Calling it runs the model with the router in force and adds the auxiliary losses to the model's loss. It works
    where modules work: plain loops, ``Trainer``, ``DistributedDataParallel``, gradient checkpointing (not reentrant,
    where auxiliary losses train). The router stays in force outside of calls too, so ``model.generate`` uses it, until
    ``remove`` or until other coefficients are set on the attached model.

    Attributes:
        model: The attached model's module.
        router: The gates.
        mixer: How gates meet experts; holds experts that are not the bank's.
        numbers: ``num_tasks``, ``num_clusters`` and ``text_features`` that it was built for.
        last_losses: Auxiliary losses of the last call by name, times nothing, averaged over sites; detached.
    """

    def __init__(self, session: RoutingSession, *, numbers: Mapping[str, int]) -> None:
        super().__init__()
        self._session = session
        self.numbers = dict(numbers)
        self.model = session.attached.model
        self.router = session.router
        self.mixer = session.mixer
        self.last_losses: dict[str, torch.Tensor] = {}
        self._frozen: list[nn.Parameter] = []
        self._removed = False
        self._freeze()
        try:
            session.install()
            self.enable()
        except BaseException:
            self._undo()
            raise
        session.attached.at_detach(self._undo)
        self.train(self.model.training)

    @property
    def spec(self) -> MixtureSpec:
        """The mixture."""
        return self.router.spec

    @property
    def session(self) -> RoutingSession:
        """What connects the router with the attached model."""
        return self._session

    @property
    def attached(self) -> Any:
        """The attached model."""
        return self._session.attached

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter is."""
        return next(self.model.parameters()).device

    def forward(self, **inputs: Any) -> Any:
        """Run the model; see the class.

        Args:
            inputs: The model's own, and those of `RoutingContext`: ``task_ids``, ``cluster_ids``, ``text_embedding``,
                ``prompt_mask``, ``expert_labels``.

        Returns:
            The model's output; ``loss`` includes the auxiliary losses, where there are any: their weighted sum is
            ``aux_loss``, the rest ``model_loss``.
        """
        said = {name: inputs.pop(name) for name in _CONTEXT if name in inputs}
        context = replace(self._session.context, **said)
        losses = self.spec.losses if self.spec.train != "none" else ()
        needs_inputs = any(loss.needs_inputs for loss in losses)
        with self._session.told(context), self.attached.using(self._session):
            if not losses or inputs.get("labels") is None:
                self.last_losses = {}
                return self.model(**inputs)
            with self._session.recording(inputs=needs_inputs) as decisions:
                output = self.model(**inputs)
        return self._with_losses(output, decisions)

    def _with_losses(self, output: Any, decisions: list[Decisions]) -> Any:
        total, parts = total_loss(self.spec.losses, decisions)
        trains = any(parameter.requires_grad for parameter in self.router.parameters())
        if self.training and torch.is_grad_enabled() and trains and decisions and not total.requires_grad:
            raise IncompatibleError(
                "the auxiliary losses have no gradient here; with gradient checkpointing use use_reentrant=False"
            )
        self.last_losses = {name: value.detach() for name, value in parts.items()}
        if getattr(output, "loss", None) is None:
            raise IncompatibleError("the model returned no loss to add the auxiliary losses to; keep return_dict=True")
        output.model_loss, output.aux_loss = output.loss, total
        output.loss = output.loss + total.to(output.loss.dtype)
        return output

    def generate(self, inputs: Any, **options: Any) -> list[list[int]]:
        """Continue prompts with the router in force; see ``attached.generate``. Mode and gradients stay as they are.

        Args:
            inputs: Rows of token ids, a tensor, or a tokenizer's result.
            options: Of ``attached.generate``, and those of `RoutingContext`; the prompt is ``inputs``.

        Raises:
            IncompatibleError: The prompt is to be read in chunks, and gates read it as one.
        """
        if options.get("prefill_chunk_size") and self.spec.pooling != "none":
            raise IncompatibleError("gates of this router read the prompt as one; leave prefill_chunk_size out")
        said = {name: options.pop(name) for name in _CONTEXT if name in options}
        context = replace(self._session.context, **said)
        if not self.config.is_encoder_decoder:  # without a cache, steps compute the prompt again with what follows
            context = replace(context, prompt_mask=_prompt_columns(inputs))
        if self._session.recording_now:  # decisions may be used in a loss later
            options = {"inference_mode": False, **options}
        with self._session.told(context), self.attached.using(self._session):
            return self.attached.generate(inputs, **options)

    @contextmanager
    def told(self, **said: Any) -> Iterator[RoutedModel]:
        """Say ``task_ids``, ``cluster_ids`` ... for calls inside a ``with`` block, beside what is said already."""
        unknown = sorted(set(said) - set(_CONTEXT))
        if unknown:
            raise IncompatibleError(f"a router cannot be told {unknown[0]!r}; known: {', '.join(_CONTEXT)}")
        with self._session.told(replace(self._session.context, **said)):
            yield self

    @contextmanager
    def recording(self, *, inputs: bool = False) -> Iterator[list[Decisions]]:
        """Collect the decisions of the calls inside a ``with`` block.

        End it before ``backward``, in which checkpointed layers run and decide again.
        """
        with self._session.recording(inputs=inputs) as decisions:
            yield decisions

    @contextmanager
    def transformed(self, transform: Callable[[str, Routing], Routing]) -> Iterator[RoutedModel]:
        """Change every routing inside a ``with`` block: ``transform(site, routing)``. For ablations."""
        before = self._session.transform
        self._session.transform = transform
        try:
            yield self
        finally:
            self._session.transform = before

    def enable(self) -> None:
        """Put the router into force."""
        if self._removed:
            raise IncompatibleError("this router was removed from its model; build or load it again")
        self.attached.set(self._session)

    @contextmanager
    def disable(self) -> Iterator[RoutedModel]:
        """Run the bare base model inside a ``with`` block."""
        with self.attached.using(None):
            yield self

    def train(self, mode: bool = True) -> RoutedModel:
        """Training mode of model and gates; noise and dropout of gates apply in training only."""
        super().train(mode)
        self._session.training = mode
        return self

    def set_trained(self, what: Trains) -> None:
        """Choose what trains from now on: stages train the router and the experts in turn."""
        if what in ("experts", "both") and not self._expert_parameters():
            raise IncompatibleError("the experts cannot train: attach the bank with trainable=True")
        for parameter in self.router.parameters():
            parameter.requires_grad_(what in ("router", "both"))
        for parameter in self._expert_parameters():
            parameter.requires_grad_(what in ("experts", "both"))

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Names and parameters that train now."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Checkpoint the model's layers, without reentrance unless asked for: auxiliary losses need that."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False, **(gradient_checkpointing_kwargs or {})})

    def gradient_checkpointing_disable(self) -> None:
        """Undo `gradient_checkpointing_enable`."""
        self.model.gradient_checkpointing_disable()

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write router, trained experts and what they need, as a folder; see `compose.routers.saved`."""
        from compose.routers.saved import save  # it builds routed models, so it stands above this module

        return save(self, folder, overwrite=overwrite)

    def remove(self) -> None:
        """Take the router off the attached model; the bank stays attached."""
        if self._removed:
            return
        if self.attached.active is self._session:
            self.attached.set(None)
        self._undo()

    def _undo(self) -> None:
        if self._removed:
            return
        self._session.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []
        self._removed = True

    def _freeze(self) -> None:
        experts = {id(parameter) for parameter in self._expert_parameters()}
        self._frozen = [p for p in self.model.parameters() if p.requires_grad and id(p) not in experts]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self.set_trained(self.spec.train)

    def _expert_parameters(self) -> list[nn.Parameter]:
        own = list(self.mixer.parameters())
        routed = [layer for target, layer in self.attached.layers.items() if target in self.router.site_of]
        factors = [factor for layer in routed for factor in (layer.a_RD, layer.b_RO)]
        if self.spec.structure not in ("lora", "ffn"):
            return own
        return own + [factor for factor in factors if isinstance(factor, nn.Parameter)]


def _prompt_columns(inputs: Any) -> torch.Tensor:
    """Bool ``(B, T)``: the columns of prompts that are padded on the left to the longest."""
    rows, lengths = inputs, None
    if isinstance(inputs, Mapping):
        rows, lengths = inputs["input_ids"], inputs.get("attention_mask")
    longest = max(len(row) if lengths is None else int(sum(lengths[i])) for i, row in enumerate(rows))
    return torch.ones(len(rows), longest, dtype=torch.bool)
