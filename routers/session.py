"""RoutingSession: what connects a router with an attached model: it sees inputs, asks the gates, mixes the experts.

The session is the selection in force of the attached model; its hooks on the model do nothing while it is not.

Shape letters: ``B`` rows, ``T`` tokens, ``D`` width, ``E`` experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from compose.errors import IncompatibleError
from compose.kernels.stack import LoraStack
from compose.kernels.watched import Unwatched, runs_again
from compose.routers.base_prompt import BasePrompt
from compose.routers.bodies import Body, first_block, is_decoder_of_two, pooled
from compose.routers.context import RoutingContext, padding_of, repeat_rows
from compose.routers.decisions import decisions_of
from compose.routers.ffn import place_ffn_experts
from compose.routers.first_pass import base_pass, past_length
from compose.routers.lanes import Lane, lane_of
from compose.routers.mixing import Mixer, Rows
from compose.routers.router import Router
from compose.routers.routing import Decisions, Routing
from compose.routers.siblings import Families
from compose.routers.sites import Site, body_path
from compose.routers.soft import mix_trained
from compose.routers.spec import reads_prompt_too
from compose.routers.steps import Seen
from compose.routers.taps import tap_target

BASE_INPUTS = ("first_pass", "tap")
PER_ROW = ("none", "task_id", "cluster_id", "text")
_NUMBERS = count()


class Call(Protocol):
    """What a layer hands over; see ``compose.engine.coefficients.LayerCall``."""

    stack: LoraStack
    base: torch.Tensor | None
    target: str
    backend: str
    owns_base: bool


class Attached(Protocol):
    """What routers need of the attached model (``compose.engine.attach.AttachedModel``)."""

    model: Any
    bank: Any

    @property
    def layers(self) -> Mapping[str, Any]:
        """Target -> composed layer."""

    @property
    def backend(self) -> str:
        """Kernel backend."""

    @property
    def active(self) -> Any:
        """The selection in force."""

    def set(self, selection: Any) -> None:
        """Put a selection into force."""

    def using(self, selection: Any) -> AbstractContextManager[Any]:
        """Put a selection into force inside a ``with`` block."""

    def at_detach(self, undo: Callable[[], None]) -> None:
        """Have ``undo`` called when the bank is detached."""


class _Decided(NamedTuple):
    """A routing; of a site with several targets also its gates spread over their rank rows."""

    routing: Routing
    rows: Rows | None


class RoutingSession:
    """The selection that a router is.

    Attributes:
        attached: The model and its bank.
        router: The gates.
        mixer: How gates and experts meet.
        context: What was said about the batch beside the model's inputs.
        training: Whether noise and dropout of gates apply.
    """

    def __init__(self, attached: Attached, router: Router, mixer: Mixer) -> None:
        self.attached = attached
        self.router = router
        self.mixer = mixer
        self.context = RoutingContext()
        self.training = False
        self._transform: Callable[[str, Routing], Routing] | None = None
        self._tap = tap_target(attached, router.spec.tap) if router.spec.tap else ""
        paths = [site.body for site in router.layout.values()] + ([body_path(self._tap)] if self._tap else [])
        self._bodies = {path: Body() for path in paths}
        self._lanes = {target: lane_of(router, target) for target in router.site_of}
        self._gates = {name: router.site(name) for name in router.layout}
        self._base_prompt = BasePrompt(attached, router.spec.pooling, self._tap)
        self._restore: Callable[[], None] | None = None
        self._decided: dict[str, _Decided] = {}
        self._records: list[Decisions] | None = None
        self._pending: list[Callable[[], Decisions]] = []
        self._keeps_inputs = False
        self._hooks: list[RemovableHandle] = []
        self._top: dict[str, torch.Tensor | None] = {}
        self._prompts: dict[str, torch.Tensor] = {}
        self._kept_as = f"compose_gates_{next(_NUMBERS)}"  # attribute of caches: what was decided on their prompts
        self._per_prompt = router.spec.scope == "sequence" and router.spec.pooling != "none"
        self._decides_on_base = router.spec.scope == "sequence" and router.spec.gate_input in BASE_INPUTS
        self._unwatched = Unwatched(nn.ModuleList([router, mixer]))
        self._reads_tokens = router.spec.scope == "token" and router.spec.gate_input not in PER_ROW
        self._families = Families(
            self._lanes, self._gates, attached.layers, self._decided, mixer, attached.backend,
            unwatched=self._unwatched, reads_tokens=self._reads_tokens,
        )  # fmt: skip

    @property
    def transform(self) -> Callable[[str, Routing], Routing] | None:
        """Changes every routing (site, routing) before it is used: ablations."""
        return self._transform

    @transform.setter
    def transform(self, transform: Callable[[str, Routing], Routing] | None) -> None:
        self._families.forget()
        self._transform = transform

    @property
    def recording_now(self) -> bool:
        """Whether decisions are being collected."""
        return self._records is not None

    def check(self, targets: list[str], num_adapters: int) -> None:
        """Raise unless the router was built for this bank."""
        if num_adapters != len(self.router.experts):
            raise IncompatibleError(f"the router has {len(self.router.experts)} experts, the bank {num_adapters}")

    def to(self, device: torch.device) -> RoutingSession:
        """Move the gates' parameters."""
        self.router.to(device)
        self.mixer.to(device)
        return self

    def apply(self, x: torch.Tensor, call: Call) -> torch.Tensor:
        """Return the base output plus the mixture's contribution for one target."""
        if not torch.compiler.is_compiling() and (mixed := self._families.take(x, call)) is not None:
            return mixed
        lane = self._lanes.get(call.target)
        if lane is None:
            return _unchanged(x, call)
        site, stack, quick = lane.site, call.stack, self._quick(x)
        together = quick and not torch.is_grad_enabled()
        if quick and self._records is None and self._transform is None:  # nobody sees what the gates say
            mixed = self._families.lead(x, call) if together else self._trained(lane, x, call)
            if mixed is not None:
                return mixed
        if lane.decides:
            routing, rows = self._decide(site, x, stack, quick, keep=lane.keeps, of_encoder=lane.of_encoder)
        elif site.name in self._decided:
            routing, rows = self._decided[site.name]
        else:
            raise IncompatibleError(
                f"{call.target}: nothing was routed yet at {site.name!r}; the router needs the whole model's forward, "
                f"in which {site.leader!r} runs first"
            )
        if quick:
            if lane.alone:
                rows = self.mixer.spread(routing, stack, call.backend)
            if rows is not None and rows.fit(x, call.base) and (lane.alone or rows.are_of(stack)):
                mixed = self._families.lead(x, call, rows) if together else None
                return rows.add(x, call) if mixed is None else mixed
        return self.mixer(x, call, routing)

    def _trained(self, lane: Lane, x: torch.Tensor, call: Call) -> torch.Tensor | None:
        """Mix and decide in one function, where the target's gate is its own; None where that is not possible.

        Nor where layers run again in ``backward``: the first time decisions may be recorded, the second time not.
        """
        if runs_again() or lane.of_encoder or not (self._reads_tokens and lane.alone and lane.decides):
            return None
        gate = self._gates[lane.site.name]
        return mix_trained(gate.soft, gate.product(), self.mixer.spread_of(call.stack, call.backend), x, call)

    def install(self) -> None:
        """Put the hooks on the model; they do nothing while the session is not in force."""
        model = self.attached.model
        if self.router.spec.structure == "ffn":
            self._restore = place_ffn_experts(self.attached, self.router, self._routing_of_part, self._in_force)
        self._hooks.append(model.register_forward_pre_hook(self._before_model, with_kwargs=True))
        self._hooks.append(model.register_forward_hook(self._after_model, always_call=True))
        for path, body in self._bodies.items():
            module = model.get_submodule(path)
            body.decodes = is_decoder_of_two(model, path)
            self._hooks.append(module.register_forward_pre_hook(self._before_body(path), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._after_body, always_call=True))
            if self._decides_on_base and not body.decodes and model.config.is_encoder_decoder:
                self._hooks.append(module.register_forward_hook(self._after_encoder))
            if reads_prompt_too(self.router.spec) and self.router.spec.gate_input == "layer":
                site = next(site for site in self.router.layout.values() if site.body == path)
                block = model.get_submodule(first_block(model, site))
                self._hooks.append(block.register_forward_pre_hook(self._before_first_block(path), with_kwargs=True))
        for path, sites in self._hidden_paths().items():
            module = model.get_submodule(path)
            self._hooks.append(module.register_forward_pre_hook(self._before_hidden(sites), with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._families.clear()
        if self._restore is not None:
            self._restore()
            self._restore = None

    @contextmanager
    def recording(self, *, inputs: bool = False) -> Iterator[list[Decisions]]:
        """Collect the decisions of one forward; with ``inputs`` also what losses on expert activations read.

        What gradient checkpointing computes again in ``backward`` is outside of the block and not collected twice. A
        block inside another hands on to it what it collected.
        """
        self._settle()
        self._families.forget()
        before = self._records, self._keeps_inputs
        self._records, self._keeps_inputs = [], inputs or self._keeps_inputs
        try:
            yield self._records
        finally:
            self._settle()
            if before[0] is not None:
                before[0].extend(self._records)
            self._records, self._keeps_inputs = before

    @contextmanager
    def told(self, context: RoutingContext) -> Iterator[None]:
        """Say something about the batches inside a ``with`` block."""
        before = self.context
        self.context = context
        try:
            yield
        finally:
            self.context = before

    def _quick(self, x: torch.Tensor | None) -> bool:
        """Whether fast paths may run on an input: nothing is traced or cast, and nobody watches a step."""
        if x is None or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            return False
        return self._unwatched()

    def _in_force(self) -> bool:
        return self.attached.active is self

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._in_force():
            self._base_prompt.begin()
            self._top = {key: kwargs.get(key) for key in ("attention_mask", "decoder_attention_mask", "labels")}

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._top = {}
        self._base_prompt.end()
        self._settle()
        cache = getattr(output, "past_key_values", None)
        if cache is not None and (self._per_prompt or self._prompts) and self._in_force():
            decided = dict(self._decided) if self._per_prompt else {}
            setattr(cache, self._kept_as, (decided, dict(self._prompts)))

    def _recall(self, cache: Any) -> None:
        """Take up what was decided on the prompt in a cache; other prompts may have been read since."""
        if not (self._per_prompt or reads_prompt_too(self.router.spec)):
            return
        kept = getattr(cache, self._kept_as, None)
        if kept is None:
            raise IncompatibleError(
                "these gates are decided on the whole prompt, and this router was not in force when the prompt in the "
                "cache was read; start without the cache"
            )
        decided, prompts = kept
        self._decided.update(decided)
        self._prompts.update(prompts)

    def _settle(self) -> None:
        """Flatten what was decided, outside of layers: checkpointed ones would not do it again in ``backward``."""
        pending, self._pending = self._pending, []
        if self._records is not None:
            self._records.extend([flatten() for flatten in pending])

    def _before_body(self, path: str) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]] | None]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            if not self._in_force():
                return None
            given = next((each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)), None)
            call = self._open_body(path, module, args, kwargs)
            told = self._records is not None or self._transform is not None
            self._families.begin(quick=self._quick(given) and not told)
            return call

        return hook

    def _open_body(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Take in what a body is called with, decide what is decided before its layers run; return changed inputs."""
        body = self._bodies[path]
        body.past = past_length(kwargs.get("past_key_values"))
        if body.past:
            self._recall(kwargs["past_key_values"])
        body.encoder = kwargs.get("encoder_hidden_states") if body.decodes else None
        body.encoder_mask = kwargs.get("encoder_attention_mask") if body.decodes else None
        body.context = self._context(body, kwargs)
        if self.router.spec.gate_input not in BASE_INPUTS:
            return None
        sites = [site for site in self.router.layout.values() if site.body == path]
        if self._decides_on_base:
            self._decide_on_base_prompt(body, sites, (module, args, kwargs))
            return None
        hidden, kwargs = base_pass(self.attached, module, args, kwargs)
        if reads_prompt_too(self.router.spec) and not (body.past and path in self._prompts):
            self._prompts[path] = pooled(self.router.spec.pooling, hidden, body)
        quick = self._quick(hidden)
        for site in sites:
            self._decide(site, hidden, None, quick)
        return args, kwargs

    def _decide_on_base_prompt(
        self, body: Body, sites: list[Site], call: tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
    ) -> None:
        """Decide once per sequence, on the prompt as the bare base model sees it."""
        if body.past:
            return
        prompt = self._base_prompt.of(body, *call)
        stack = self.attached.layers[self._tap].stack if self._tap else None
        quick = self._quick(prompt)
        for site in sites:
            self._decide(site, prompt, stack, quick)

    def _after_body(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._families.forget()

    def _after_encoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._in_force() or self.attached.active is None:
            self._base_prompt.encoded(output[0], bare=not self._in_force())

    def _context(self, body: Body, kwargs: dict[str, Any]) -> RoutingContext:
        """What was said, completed by the model's inputs."""
        model = self.attached.model
        of_two = bool(getattr(model.config, "is_encoder_decoder", False))
        mask, labels = self._mask(body, kwargs), self._labels(body)
        context = self.context.with_inputs(mask, labels, lag=0 if of_two else 1)
        return context.of_encoder() if of_two and not body.decodes else context

    def _mask(self, body: Body, kwargs: dict[str, Any]) -> torch.Tensor | None:
        mask = self._top.get("decoder_attention_mask" if body.decodes else "attention_mask")
        labels = self._top.get("labels") if body.decodes else None
        if mask is None and labels is not None and labels.dim() == 2:
            mask = (labels != -100).long()  # a decoder's inputs are its labels one place later
        return padding_of(kwargs.get("attention_mask") if mask is None else mask, body.past)

    def _labels(self, body: Body) -> torch.Tensor | None:
        """Labels mark the response of the body that predicts them; in an encoder they mean nothing."""
        model = self.attached.model
        predicts = body.decodes or not getattr(model.config, "is_encoder_decoder", False)
        return self._top.get("labels") if predicts and getattr(model, "can_generate", bool)() else None

    def _hidden_paths(self) -> dict[str, list[Site]]:
        """Module whose input is read -> sites that read it."""
        paths: dict[str, list[Site]] = {}
        gate_input = self.router.spec.gate_input
        for site in self.router.layout.values():
            if gate_input == "block":
                paths.setdefault(site.block, []).append(site)
            elif gate_input == "embeddings":
                paths.setdefault(first_block(self.attached.model, site), []).append(site)
        return paths

    def _before_hidden(self, sites: list[Site]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._in_force():
                hidden = kwargs.get("hidden_states", args[0] if args else None)
                quick = self._quick(hidden)
                for site in sites:
                    self._decide(site, hidden, None, quick)

        return hook

    def _before_first_block(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            body = self._bodies[path]
            if self._in_force() and not (body.past and path in self._prompts):
                hidden = kwargs.get("hidden_states", args[0] if args else None)
                self._prompts[path] = pooled(self.router.spec.pooling, hidden, body)

        return hook

    def _routing_of_part(self, name: str, x: torch.Tensor) -> Routing | None:
        """The routing of a feed-forward part for its input; None while the session is not in force."""
        if not self._in_force():
            return None
        site = self.router.layout[name]
        return self._decide(site, x, self.attached.layers[site.leader].stack, self._quick(x)).routing

    def _decide(
        self,
        site: Site,
        hidden: torch.Tensor | None,
        stack: LoraStack | None,
        quick: bool,
        *,
        keep: bool = True,
        of_encoder: bool = False,
    ) -> _Decided:
        """Ask the gate of a site, unless its decision on the prompt stands."""
        name, body = site.name, self._bodies[site.body]
        if self._per_prompt and body.past and name in self._decided:
            return self._decided[name]
        if of_encoder:  # a decoder's target that reads the encoder's tokens: their mask, and no labels
            body = replace(body, context=replace(body.context.of_encoder(), attention_mask=body.encoder_mask))
        gate = self._gates[name]
        routing = gate.quick(hidden) if quick and self._reads_tokens and hidden is not None else None
        if routing is None:
            routing = self.router(name, self._seen(site, body, hidden, stack))
        if self.transform is not None:
            routing = self.transform(name, routing)
        rows = None
        if quick and len(site.targets) > 1:  # not in layers: checkpointed ones would not do it again in backward
            rows = self.mixer.spread(routing, self.attached.layers[site.leader].stack, self.attached.backend)
        decided = _Decided(routing, rows)
        if keep:
            self._decided[name] = decided
        if self._records is not None and not gate.constant:
            inputs = (hidden, stack) if self._keeps_inputs and stack is not None else None
            self._pending.append(partial(decisions_of, site, routing, body.context, gate.available_E, hidden, inputs))
        return decided

    def _seen(self, site: Site, body: Body, hidden: torch.Tensor | None, stack: LoraStack | None) -> Seen:
        spec, context = self.router.spec, body.context
        rows = None if hidden is None else hidden.shape[0]
        device = self._gates[site.name].available_E.device
        x, text = hidden, _text(spec.gate_input, context, rows, device)
        if spec.gate_input in PER_ROW:
            x = text
        elif spec.scope == "sequence" and hidden is not None and hidden.dim() == 3:
            x = pooled(spec.pooling, hidden, body)
        ids = _row_ids(spec.gate_input, context, rows, device)
        return Seen(x, ids, text, stack, context, self.training, self._prompts.get(site.body))


def _row_ids(gate_input: str, context: RoutingContext, rows: int | None, device: torch.device) -> torch.Tensor | None:
    if gate_input not in ("task_id", "cluster_id"):
        return None
    ids = context.task_ids if gate_input == "task_id" else context.cluster_ids
    if ids is None:
        raise IncompatibleError(
            f"this router reads {gate_input}s, and none were given: pass {gate_input}s=(B,) with the batch, or set "
            "them with routed.told(...) around generate"
        )
    return (ids if rows is None else repeat_rows(ids, rows)).to(device)


def _text(gate_input: str, context: RoutingContext, rows: int | None, device: torch.device) -> torch.Tensor | None:
    if gate_input != "text":
        return None
    if context.text_embedding is None:
        raise IncompatibleError(
            "this router reads text embeddings, and none were given: pass text_embedding=(B, D) with the batch, or "
            "set them with routed.told(...) around generate"
        )
    return (context.text_embedding if rows is None else repeat_rows(context.text_embedding, rows)).to(device)


def _unchanged(x: torch.Tensor, call: Call) -> torch.Tensor:
    """The base output of a target that no site routes."""
    return x.new_zeros(*x.shape[:-1], call.stack.b_RO.shape[1]) if call.base is None else call.base
