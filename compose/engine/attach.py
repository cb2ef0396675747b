"""attach: put a bank into a live model, and take it out again without a trace."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn

from compose.adapter import Adapter, LowRank
from compose.bank import Bank
from compose.engine.coefficients import AdapterIds, Coefficients, Combine, Selection
from compose.engine.generate import check_generates, default_stop_ids, generate_tokens, token_rows
from compose.engine.layers import ComposedEmbedding, ComposedLinear, RuntimeState
from compose.engine.rows import RowAdapter, row_weights, rows_selection
from compose.errors import IncompatibleError
from compose.kernels.stack import LoraStack

ComposedLayer = ComposedLinear | ComposedEmbedding


def attach(model: nn.Module, bank: Bank, *, backend: str = "auto", trainable: bool = False) -> AttachedModel:
    """Replace every targeted module of ``model`` by a composed layer that holds the original module object.

    Until coefficients are set the model computes exactly what it did before. Factors are cast to the dtype and moved
    to the device of the layer they belong to. Nothing is replaced unless everything fits.

    Args:
        model: Any ``nn.Module`` whose submodule paths the bank's targets name: Transformers models of every kind.
        bank: The adapters.
        backend: Kernel backend: ``"auto"``, or a name that raises where it cannot run.
        trainable: Make the factors parameters of the model (copies; the bank stays as it is) and freeze all others
            until ``detach``.

    Returns:
        The handle; as a context manager it detaches on exit.

    Raises:
        IncompatibleError: A bank is attached already, a target does not exist, or shapes or kinds differ; the message
            names all such targets.
    """
    _refuse_attached(model)
    fitting = _fitting_modules(model, bank)
    state = RuntimeState(backend)
    stacks = _stacks(bank, fitting)
    layers = {
        target: _composed(module, stacks[target], target, state, bank.targets[target].kind)
        for target, module in fitting.items()
    }
    return AttachedModel(model, bank, layers, state, trainable=trainable)


class AttachedModel:
    """A live model with a bank attached; the handle that sets coefficients.

    Handles of different models are independent, so threads may use different handles at the same time. Backward passes
    under gradient checkpointing run layers again: keep the coefficients set until ``backward`` returns.

    Attributes:
        model: The model, changed in place.
        bank: The bank.
        layers: Target -> composed layer.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: Bank,
        layers: Mapping[str, ComposedLayer],
        state: RuntimeState,
        *,
        trainable: bool,
    ) -> None:
        self.model = model
        self.bank = bank
        self.layers = dict(layers)
        self._state = state
        self._attached = True
        self._frozen: list[nn.Parameter] = []
        self._at_detach: list[Callable[[], None]] = []
        if trainable:
            self._frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
            for parameter in self._frozen:
                parameter.requires_grad_(False)
            for layer in self.layers.values():
                layer.make_trainable_()
        self._places = _places(model, self.layers)
        for path, target in self._places.items():
            _set_submodule(model, path, self.layers[target])

    def __enter__(self) -> AttachedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._attached:
            self.detach()

    @property
    def device(self) -> torch.device:
        """Where the first composed layer's factors are."""
        return next(iter(self.layers.values())).a_RD.device

    @property
    def backend(self) -> str:
        """Name of the kernel backend."""
        return self._state.backend

    @property
    def active(self) -> Selection | None:
        """What is in force now."""
        return self._state.active

    def set(self, selection: Selection | Mapping[str, float] | Sequence[str | None] | str | None) -> None:
        """Put coefficients into force until the next call.

        Args:
            selection: ``Coefficients``; ``AdapterIds``; another `Selection` (a router's); a name (that adapter, at 1,
                for the whole batch); a mapping of names to weights (for the whole batch); a list with one name or
                ``None`` per row; or ``None`` for the bare base model.

        Raises:
            IncompatibleError: The numbers do not fit the bank, or the handle is detached.
            UnknownNameError: A name is not in the bank.
        """
        if not self._attached:
            raise IncompatibleError("this handle is detached; attach the bank again")
        self._state.active = self._resolve(selection)

    @contextmanager
    def using(
        self, selection: Selection | Mapping[str, float] | Sequence[str | None] | str | None
    ) -> Iterator[AttachedModel]:
        """Set coefficients inside a ``with`` block and restore what was in force before, whatever happens."""
        before = self._state.active
        self.set(selection)
        try:
            yield self
        finally:
            self._state.active = before

    def generate(
        self,
        inputs: Any,
        adapters: Sequence[RowAdapter] | None = None,
        *,
        max_new_tokens: int = 64,
        stop_ids: Sequence[int] | None = None,
        combine: Combine = "outputs",
        **options: Any,
    ) -> list[list[int]]:
        """Continue every row with its own adapter, its own weighted set of adapters, or none, in one batch.

        Args:
            inputs: ``B`` lists of token ids of any lengths, a tensor ``(B, T)``, or a tokenizer's result with
                ``input_ids`` and ``attention_mask``.
            adapters: ``B`` entries: an adapter's name, a mapping of names to weights, or ``None`` for the bare base
                model. Without it what is in force now stays in force.
            max_new_tokens: Upper limit of new tokens per row.
            stop_ids: Token ids that end a row and are never part of the result; ``None``: the model's own.
            combine: How the adapters of a weighted set are combined (see ``Coefficients``).
            options: Further options of the model's ``generate``: ``do_sample``, ``num_beams`` ... Greedy without any.
                ``inference_mode=False`` where hooks keep tensors that are written to or differentiated later.

        Returns:
            ``B`` rows of new token ids; with ``num_return_sequences`` that many per row, next to each other.

        Raises:
            IncompatibleError: Not one adapter per row, a weight that is no finite number, inputs that are no rows of
                token ids, a model that does not generate, or a detached handle.
            UnknownNameError: A name is not in the bank.
        """
        check_generates(self.model)
        prompts = token_rows(inputs)
        selection = self.active if adapters is None else self._rows(adapters, len(prompts), combine)
        stop = default_stop_ids(self.model) if stop_ids is None else stop_ids
        with self.using(selection):
            return generate_tokens(self.model, prompts, max_new_tokens=max_new_tokens, stop_ids=stop, **options)

    def layer_groups(self, num_groups: int | None = None) -> dict[str, int]:
        """Cut the targets into groups along the depth of the model, for coefficients per adapter and layer group.

        Args:
            num_groups: How many groups of equal depth, at most the number of layers; ``None``: every layer its own.

        Returns:
            Target -> group number, 0 nearest the input; a target outside the numbered layers stands with its
            neighbours in module order.
        """
        order = [name for name, _ in self.model.named_modules(remove_duplicate=False) if name in self.layers]
        depth_keys = list(dict.fromkeys(_depth_key(target) for target in order))
        total = len(depth_keys)
        wanted = total if num_groups is None else num_groups
        if not 1 <= wanted <= total:
            raise IncompatibleError(f"num_groups must lie in [1, {total}] for this model and bank, got {num_groups}")
        return {target: depth_keys.index(_depth_key(target)) * wanted // total for target in order}

    def export(self) -> list[Adapter]:
        """Return the adapters as they are now (after training: the trained factors), copied to the CPU."""
        return [self._export(index, name) for index, name in enumerate(self.bank.names)]

    def at_detach(self, undo: Callable[[], None]) -> None:
        """Have ``undo`` called at the start of `detach`: for what was put on the model beside the bank."""
        self._at_detach.append(undo)

    def detach(self) -> nn.Module:
        """Restore the very same module objects and return the model."""
        if not self._attached:
            raise IncompatibleError("this handle is detached already")
        for undo in self._at_detach:
            undo()
        for path, target in self._places.items():
            _set_submodule(self.model, path, self.layers[target].base_layer)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._attached = False
        self._state.active = None
        return self.model

    def _rows(self, adapters: Sequence[RowAdapter], rows: int, combine: Combine) -> Selection | None:
        if isinstance(adapters, str | Mapping) or len(adapters) != rows:
            given = f"{len(adapters)} entries" if not isinstance(adapters, str | Mapping) else f"{adapters!r}"
            raise IncompatibleError(f"adapters must have one entry for each of the {rows} rows, got {given}")
        chosen = [row_weights(self.bank, adapter) for adapter in adapters]
        return rows_selection(chosen, combine=combine, device=self.device)

    def _resolve(self, selection: object) -> Selection | None:
        if isinstance(selection, str):
            selection = {selection: 1.0}
        if isinstance(selection, Mapping):
            values = torch.zeros(len(self.bank))
            for name, weight in selection.items():
                values[self.bank.index(name)] = float(weight)
            selection = Coefficients(values)
        elif isinstance(selection, Sequence):
            selection = AdapterIds(torch.tensor([-1 if name is None else self.bank.index(name) for name in selection]))
        if selection is None:
            return None
        if not isinstance(selection, Selection):
            raise IncompatibleError(f"expected coefficients, names or None, got {type(selection).__name__}")
        selection.check(list(self.layers), len(self.bank))
        return selection.to(self.device)

    def _export(self, index: int, name: str) -> Adapter:
        source = self.bank[name]
        targets = {}
        for target, update in source.targets.items():
            layer = self.layers[target]
            rows = slice(layer.stack.offsets[index], layer.stack.offsets[index + 1])
            a, b = (factor.detach().to("cpu", copy=True)[rows] for factor in (layer.a_RD, layer.b_RO))
            targets[target] = LowRank(a, b.T.contiguous(), update.scaling, update.kind)
        return Adapter(name, source.base, targets, source.config, source.full_modules)


def _refuse_attached(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, ComposedLayer):
            raise IncompatibleError(f"a bank is attached to this model already (at {name!r}); detach it first")


def _fitting_modules(model: nn.Module, bank: Bank) -> dict[str, nn.Module]:
    """Return target -> module, or raise with every target that does not fit."""
    modules = dict(model.named_modules(remove_duplicate=False))
    problems = []
    for target, shape in bank.targets.items():
        if target not in modules:
            problems.append(f"{target}: no such module{_hint(target, modules)}")
        elif (found := _shape_of(modules[target])) != (shape.kind, shape.in_features, shape.out_features):
            problems.append(
                f"{target}: the bank has {shape.kind} {shape.in_features} -> {shape.out_features}, "
                f"the model has {_describe(found, modules[target])}"
            )
    if problems:
        raise IncompatibleError(
            f"the bank (base {bank.base or 'unknown'!r}) does not fit this model at {len(problems)} of "
            f"{len(bank.targets)} targets:\n  " + "\n  ".join(problems[:20])
        )
    owner: dict[nn.Module, str] = {}
    for target in bank.targets:
        if owner.setdefault(modules[target], target) != target:
            raise IncompatibleError(
                f"the targets {owner[modules[target]]!r} and {target!r} are one and the same module of this model; "
                "keep one of them"
            )
    return {target: modules[target] for target in bank.targets}


def _hint(target: str, modules: Mapping[str, nn.Module]) -> str:
    suffix = [name for name in modules if name and (name.endswith("." + target) or target.endswith("." + name))]
    close = suffix or difflib.get_close_matches(target, modules, n=1)
    return (
        f"; did you mean {max(close, key=len)!r}? (load the model class the adapters were trained on)" if close else ""
    )


def _shape_of(module: Any) -> tuple[str, int, int] | None:
    """Return (kind, input width, output width) of a module an adapter can stand on, else ``None``."""
    if isinstance(module, nn.Embedding):
        return "embedding", module.num_embeddings, module.embedding_dim
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return "linear", module.weight.shape[0], module.weight.shape[1]
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return "linear", module.in_features, module.out_features
    return None


def _describe(found: tuple[str, int, int] | None, module: nn.Module) -> str:
    return type(module).__name__ if found is None else f"{found[0]} {found[1]} -> {found[2]}"


def _stacks(bank: Bank, modules: Mapping[str, nn.Module]) -> dict[str, LoraStack]:
    """Return target -> stack in the dtype and on the device of its module, loaded straight there where all agree."""
    places = {target: _place(module) for target, module in modules.items()}
    if len(set(places.values())) == 1:
        dtype, device = next(iter(places.values()))
        return bank.stacks(dtype, device)
    return {target: _moved(bank.stack(target), *place) for target, place in places.items()}


def _place(module: Any) -> tuple[torch.dtype, torch.device]:
    weight = module.weight
    return weight.dtype if weight.is_floating_point() else torch.get_default_dtype(), weight.device


def _moved(stack: LoraStack, dtype: torch.dtype, device: torch.device) -> LoraStack:
    a_RD, b_RO = stack.a_RD.to(device, dtype), stack.b_RO.to(device, dtype)
    return LoraStack(a_RD, b_RO, stack.scaling_E.to(device), stack.ranks)


def _composed(module: nn.Module, stack: LoraStack, target: str, state: RuntimeState, kind: str) -> ComposedLayer:
    layer = ComposedEmbedding if kind == "embedding" else ComposedLinear
    return layer(module, stack, target, state).train(module.training)


def _places(model: nn.Module, layers: Mapping[str, ComposedLayer]) -> dict[str, str]:
    """Return every path at which a target's module stands -> target: some T5 hold one embedding at three."""
    owner = {layer.base_layer: target for target, layer in layers.items()}
    return {path: owner[one] for path, one in model.named_modules(remove_duplicate=False) if one in owner}


def _set_submodule(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _depth_key(target: str) -> str:
    """The path up to the first layer number (``model.layers.3``), or the whole path where there is none."""
    found = re.match(r".*?\.\d+(?=\.|$)", target)
    return found.group(0) if found else target
