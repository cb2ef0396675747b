"""The base model: whether the adapter's targets are layers of it. These rules need the base model (``--base``)."""

from __future__ import annotations

from collections.abc import Iterator

from compose.adapter import Adapter
from compose.hub_index.audit.evidence import Evidence
from compose.hub_index.audit.rule import Remark, rule
from compose.hub_index.fingerprint import base_fingerprint, fingerprint_in
from compose.hub_index.records import ModuleRecord


@rule("base.module", "high", hard=True)
def targets_exist(evidence: Evidence) -> Iterator[Remark]:
    """A target is no layer of the base model: PEFT drops its tensors without a word."""
    for module in _shapes(evidence):
        if evidence.base is not None and evidence.base.find(module) is None:
            yield Remark(f"{module} is no layer of {evidence.base.name}", module)


@rule("base.shape", "critical", hard=True)
def shapes_agree(evidence: Evidence) -> Iterator[Remark]:
    """A target has another shape in the base model: the adapter belongs to another one."""
    for module, shape in _shapes(evidence).items():
        layer = evidence.base.find(module) if evidence.base is not None else None
        if layer is not None and shape != (layer.out_features, layer.in_features):
            there = f"{layer.in_features} -> {layer.out_features}"
            yield Remark(f"{module} is {shape[1]} -> {shape[0]}, in the base model {there}", module)


@rule("base.missing", "medium")
def no_layer_is_left_out(evidence: Evidence) -> Iterator[Remark]:
    """Layers of the base model that the configuration's target names mean and the file lacks."""
    config, base = evidence.config or {}, evidence.base
    listed = config.get("target_modules")
    if base is None or not isinstance(listed, list) or config.get("layers_to_transform") is not None:
        return
    touched = {id(base.find(module)) for module in _shapes(evidence)}
    excluded = config.get("exclude_modules")
    meant = {one for one in listed if isinstance(one, str)}
    excepted = {one for one in excluded if isinstance(one, str)} if isinstance(excluded, list) else {excluded}
    for path, layer in base.layers.items():
        segments = path.split(".")
        suffixes = {".".join(segments[start:]) for start in range(len(segments))}
        if meant & suffixes and not excepted & suffixes and id(layer) not in touched:
            yield Remark(f"{path} is meant by target_modules, and the file has no factors for it", path)


@rule("base.name", "low")
def base_has_the_name(evidence: Evidence) -> Iterator[Remark]:
    """The configuration names another base model than the one given."""
    named = (evidence.config or {}).get("base_model_name_or_path")
    if evidence.base is not None and not evidence.base.local and isinstance(named, str) and named:
        given = evidence.base.name.rstrip("/").rpartition("/")[2]
        if named.rstrip("/").rpartition("/")[2].lower() != given.lower():
            yield Remark(f"the configuration says {named!r:.200}, the base model given is {evidence.base.name!r:.200}")


@rule("base.norm", "medium")
def update_is_smaller_than_the_weight(evidence: Evidence) -> Iterator[Remark]:
    """An update is larger than the weight that it changes."""
    if evidence.base is None or not isinstance(evidence.adapter, Adapter):
        return
    for module, update in evidence.adapter.targets.items():
        weight = evidence.base.norm(module)
        if weight is not None and weight < update.norm():
            yield Remark(f"{module}: |update| {update.norm():.3g} is more than |weight| {weight:.3g}", module)


@rule("base.fingerprint", "critical", hard=True)
def fingerprint_agrees(evidence: Evidence) -> Iterator[Remark]:
    """The adapter was made for another base model than the one given, as fingerprints tell.

    A fingerprint given alone is that of the adapter's index entry, or one made without the base's model type.
    """
    known = evidence.record.base_fingerprint if evidence.record is not None else ""
    if evidence.fingerprint:
        own = {known, base_fingerprint(_modules(evidence))} - {""}
        if own and evidence.fingerprint not in own:
            shown = ", ".join(sorted(one[:12] for one in own))
            yield Remark(f"its base has the fingerprint {shown}, not {evidence.fingerprint[:12]}")
    elif evidence.base is not None and evidence.record is not None and known:
        modules = evidence.record.modules
        fitting = {fingerprint_in(evidence.base, modules), base_fingerprint(modules)}
        if known not in fitting:
            yield Remark(f"the index knows it for a base with the fingerprint {known[:12]}, not {evidence.base.name}")


def _modules(evidence: Evidence) -> list[ModuleRecord]:
    """Return the targets as an index describes them."""
    return [
        ModuleRecord(name=module, kind=kind, in_features=wide, out_features=out)
        for module, (kind, out, wide) in _targets(evidence).items()
    ]


def _shapes(evidence: Evidence) -> dict[str, tuple[int, int]]:
    """Return module path -> ``(O, I)`` of the base's weight that the target must fit.

    An embedding's weight is (tokens, width), and its update reads tokens and writes the width.
    """
    found = _targets(evidence)
    return {module: (out, wide) if kind == "linear" else (wide, out) for module, (kind, out, wide) in found.items()}


def _targets(evidence: Evidence) -> dict[str, tuple[str, int, int]]:
    """Return module path -> (kind, ``O``, ``I``), as the loader reads them, else as the tensor names tell."""
    if isinstance(evidence.adapter, Adapter):
        updates = evidence.adapter.targets.items()
        return {module: (one.kind, one.out_features, one.in_features) for module, one in updates}
    if not isinstance(evidence.strict, str):
        headers = evidence.strict.targets.items()
        return {module: (one.kind, one.out_features, one.in_features) for module, one in headers}
    found = {}
    for module, one in evidence.halves.items():
        if one.fits and one.a is not None and one.b is not None:
            kind = "embedding" if "lora_embedding_" in one.a.name else "linear"
            found[module] = (kind, one.b.shape[0], one.a.shape[1])
    return found
