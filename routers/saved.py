"""Mixtures on disk: a description, the router's state, and the experts where they were trained with it.

| file | what |
| --- | --- |
| ``mixture.json`` | format and version, specification, names of experts and tasks, targets and their widths, hashes |
| ``router.safetensors`` | parameters and buffers of router and mixer, named by site and component |
| ``experts.safetensors`` | ``<expert>:<target>:a (r, D)`` and ``:b (O, r)``, where experts trained or are made |

Gates are addressed by module path and expert name. A bank of other adapters, or of these in another order, is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import nn

from compose.errors import AdapterFormatError, IncompatibleError
from compose.files import safetensors_file
from compose.files.publish import publish_folder
from compose.routers.builder import build
from compose.routers.saved_file import EXPERTS, FORMAT, MIXTURE, ROUTER, VERSION, SavedMixture, read_mixture
from compose.routers.structures import SharedA

if TYPE_CHECKING:
    from compose.routers.routed import RoutedModel
    from compose.routers.session import Attached


def save(routed: RoutedModel, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a mixture as a folder, whole or not at all.

    Args:
        routed: The mixture.
        folder: New, or an empty folder.
        overwrite: Replace what is there.

    Returns:
        The folder.

    Raises:
        DuplicateNameError: Something is there.
        AdapterFormatError: A value is not finite.
    """
    return publish_folder(mixture_files(routed), Path(folder), overwrite=overwrite)


def mixture_files(routed: RoutedModel) -> dict[str, bytes]:
    """Return the files of a mixture: name -> content.

    Raises:
        AdapterFormatError: A value is not finite.
    """
    bank = routed.attached.bank
    own = _holds_experts(routed)
    tensors = {ROUTER: mixture_state(routed)}
    if own:
        tensors[EXPERTS] = expert_tensors(routed)
    files = {}
    for name, named in tensors.items():
        safetensors_file.check_finite(named, name)
        filled = {key: value for key, value in named.items() if value.numel()}
        if filled:
            files[name] = safetensors.torch.save(filled)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "spec": routed.spec.to_json(),
        "experts": list(bank.names),
        "routed": list(routed.router.site_of),
        "targets": {target: [shape.in_features, shape.out_features] for target, shape in bank.targets.items()},
        "tasks": list(routed.router.tasks),
        "clusters": routed.numbers["num_clusters"],
        "text_features": routed.numbers["text_features"],
        "base": bank.base or str(getattr(routed.config, "_name_or_path", "") or ""),
        "hashes": {} if own else dict(bank.hashes),
        "factors": _factor_table(bank) if own else None,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    text = json.dumps(description, indent=1, allow_nan=False) + "\n"
    return {MIXTURE: text.encode(), **files}


def load(attached: Attached, folder: str | Path, *, allow_changed: bool = False) -> RoutedModel:
    """Put a saved mixture over the bank of an attached model.

    Args:
        attached: Over the bank that the mixture was trained on, in its order; ``compose.engine.routed.open_routed``
            sees to that.
        folder: Of `save`.
        allow_changed: Accept adapters whose weights are not those the router was trained on.

    Raises:
        AdapterFormatError: The folder is damaged, incomplete or hostile.
        IncompatibleError: The bank is another one; the message says what to do.
    """
    return restore(attached, read_mixture(folder), allow_changed=allow_changed)


def restore(attached: Attached, saved: SavedMixture, *, allow_changed: bool = False) -> RoutedModel:
    """Put a mixture that was read over the bank of an attached model; see `load`."""
    _check_bank(attached, saved, allow_changed)
    routed = build(
        attached, saved.spec, tasks=saved.tasks, clusters=saved.clusters, text_features=saved.text_features,
        targets=saved.routed,
    )  # fmt: skip
    try:
        _set_tensors(routed, saved)
    except BaseException:
        routed.remove()
        raise
    return routed


def refill(routed: RoutedModel, folder: str | Path) -> None:
    """Put the tensors of a saved mixture into the same mixture.

    Raises:
        AdapterFormatError: The folder is damaged, or of another mixture.
        IncompatibleError: It is of another bank.
    """
    saved = read_mixture(folder)
    _check_bank(routed.attached, saved, allow_changed=False)
    if saved.spec != routed.spec or saved.routed != tuple(routed.router.site_of):
        raise AdapterFormatError(
            f"{saved.folder}: the mixture in it is not this one ({routed.spec.preset or 'no preset'})"
        )
    _set_tensors(routed, saved)


def mixture_state(routed: RoutedModel) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers of router and mixer on the CPU, by names that a file may hold."""
    return {name: _stored(value) for name, value in _live_state(routed).items()}


def set_mixture_state(routed: RoutedModel, state: Mapping[str, torch.Tensor], where: object) -> None:
    """Put back what `mixture_state` returned.

    Raises:
        AdapterFormatError: Names or shapes are not those of this mixture; all are named.
    """
    live = _live_state(routed)
    problems = [f"{name} is missing" for name, value in live.items() if name not in state and value.numel()]
    problems += [f"{name} belongs to nothing" for name in state if name not in live]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, needed is {tuple(value.shape)}"
        for name, value in live.items()
        if name in state and state[name].shape != (value.shape or (1,))
    ]
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise AdapterFormatError(f"{where}: does not fit this mixture: {'; '.join(problems[:10])}{more}")
    for name, value in live.items():
        if name in state:
            beside_experts = name.startswith("mixer.residuals.")  # in the dtype of the factors that run
            dtype = state[name].dtype if value.is_floating_point() and not beside_experts else value.dtype
            value.data = state[name].reshape(value.shape).to(value.device, dtype, copy=True)


def expert_tensors(routed: RoutedModel) -> dict[str, torch.Tensor]:
    """``<expert>:<target>:a (r, D)`` and ``:b (O, r)`` as they are now, on the CPU."""
    found = {}
    for target, layer in routed.attached.layers.items():
        a_RD, b_RO = _live_factors(routed, target)
        offsets = layer.stack.offsets
        for index, name in enumerate(routed.attached.bank.names):
            rows = slice(offsets[index], offsets[index + 1])
            if target in routed.attached.bank.shapes(name):
                found[f"{name}:{target}:a"] = a_RD[rows].detach().to("cpu", copy=True).contiguous()
                found[f"{name}:{target}:b"] = b_RO[rows].detach().T.to("cpu", copy=True).contiguous()
    return found


def _holds_experts(routed: RoutedModel) -> bool:
    """Whether the experts are the mixture's own: parameters, or no low-rank factors of a bank."""
    trained = any(isinstance(layer.a_RD, nn.Parameter) for layer in routed.attached.layers.values())
    return trained or routed.spec.structure in ("shared_a", "ia3")


def _live_factors(routed: RoutedModel, target: str) -> tuple[torch.Tensor, torch.Tensor]:
    structure = routed.mixer.structure(target)
    if isinstance(structure, SharedA):
        return structure.a_rD.repeat(len(structure.b_ErO), 1), structure.b_ErO.flatten(0, 1)
    layer = routed.attached.layers[target]
    return layer.a_RD, layer.b_RO


def _factor_table(bank: Any) -> dict[str, dict[str, list[float]]]:
    """Expert -> target -> [rank, scaling]."""
    return {
        name: {target: [one.rank, float(one.scaling)] for target, one in bank.shapes(name).items()}
        for name in bank.names
    }


def _live_state(routed: RoutedModel) -> dict[str, torch.Tensor]:
    """The very tensors, by names without slashes."""
    found: dict[str, torch.Tensor] = {}
    for prefix, module in (("router", routed.router), ("mixer", routed.mixer)):
        for key, value in module.state_dict(keep_vars=True).items():
            found[f"{prefix}.{key}".replace("/", ".")] = value
    return found


def _stored(value: torch.Tensor) -> torch.Tensor:
    """A copy as files hold it: floating point, with a dimension."""
    value = value.detach().to("cpu", copy=True)
    value = value if value.is_floating_point() else value.double()
    return value.reshape(value.shape or (1,)).contiguous()


def _check_bank(attached: Attached, saved: SavedMixture, allow_changed: bool) -> None:
    names = tuple(attached.bank.names)
    if names != saved.experts:
        missing = [name for name in saved.experts if name not in names]
        step = f"the bank lacks {', '.join(missing)}; add them" if missing else "attach the bank in its order"
        raise IncompatibleError(
            f"{saved.folder}: made for the experts {list(saved.experts)}, the bank has {list(names)}; "
            f"{step}: attach(model, bank.select({list(saved.experts)})), or open_routed(model, bank, folder)"
        )
    base = attached.bank.base
    if base and saved.base and saved.factors is None and base != saved.base:
        raise IncompatibleError(
            f"{saved.folder}: this mixture was made for the base {saved.base!r}, the bank is for {base!r}; "
            "give Bank.open(..., base=...) if they are one model under two names"
        )
    widths = {target: (shape.in_features, shape.out_features) for target, shape in attached.bank.targets.items()}
    wrong = [target for target in saved.targets if widths.get(target) != saved.targets[target]]
    wrong += [target for target in widths if target not in saved.targets]
    if wrong:
        raise IncompatibleError(
            f"{saved.folder}: the bank's targets are not those of this mixture: {wrong[0]} is "
            f"{saved.targets.get(wrong[0], 'absent')} there, {widths.get(wrong[0], 'absent')} here "
            f"(and {len(wrong) - 1} more); open the bank it was trained on"
        )
    if saved.hashes and not allow_changed:
        hashes = attached.bank.hashes
        changed = [name for name in saved.experts if hashes[name] != saved.hashes.get(name)]
        if changed:
            raise IncompatibleError(
                f"{saved.folder}: the weights of {', '.join(changed)} are not those the router was made for; "
                "restore these adapters, train again, or pass allow_changed=True"
            )


def _set_tensors(routed: RoutedModel, saved: SavedMixture) -> None:
    set_mixture_state(routed, saved.state, saved.folder / ROUTER)
    if saved.factors is not None and saved.spec.structure not in ("shared_a", "ia3"):
        _set_factors(routed.attached, saved)


def _set_factors(attached: Attached, saved: SavedMixture) -> None:
    assert saved.factors is not None  # noqa: S101 - the caller asked
    for target, layer in attached.layers.items():
        present = [saved.factors[name].get(target) for name in saved.experts]
        ranks = tuple(0 if one is None else one.rank for one in present)
        scaling_E = torch.tensor([0.0 if one is None else one.scaling for one in present])
        if tuple(layer.stack.ranks) != ranks or not torch.equal(layer.stack.scaling_E.cpu().float(), scaling_E):
            raise IncompatibleError(
                f"{saved.folder}: {target} has experts of ranks {ranks} there, {tuple(layer.stack.ranks)} here, "
                "or other scalings; use open_routed(model, None, folder), which makes the bank from the folder"
            )
        filled = [one for one in present if one is not None]
        a_RD, b_RO = torch.cat([one.a for one in filled]), torch.cat([one.b.T for one in filled])
        for live, value in ((layer.a_RD, a_RD), (layer.b_RO, b_RO)):
            value = value.to(live.device, live.dtype)
            if isinstance(live, nn.Parameter):
                live.data.copy_(value)
            elif not torch.equal(live, value):
                raise IncompatibleError(
                    f"{saved.folder}: {target}: the bank's factors are not those in {EXPERTS}, and they cannot be "
                    "replaced; attach with trainable=True, or use open_routed(model, None, folder)"
                )
