"""PEFT folders of other kinds than plain LoRA, read as the low-rank updates they are."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compose.adapter import Adapter, LowRank, Source
from compose.errors import AdapterFormatError
from compose.files import safetensors_file as files
from compose.files.memory import enough_memory
from compose.files.paths import exists
from compose.files.strict_json import parse_object
from compose.formats.header import (
    SAVE_AGAIN,
    AdapterHeader,
    FullTensorHeader,
    TargetHeader,
    join_problems,
    natural_key,
)
from compose.formats.magnitudes import check_updates
from compose.formats.peft_config import LoraConfig, check_full_modules, check_targets, check_work
from compose.formats.peft_folder import ConfigFile, read_config, weights_path
from compose.formats.peft_keys import check_leftovers, parse_parts
from compose.formats.peft_kinds import Found, Kind, KindTarget, Opened, Widths, kind_of

_KEPT = ("base_model_name_or_path", "fan_in_fan_out", "modules_to_save", "revision", "task_type")


@dataclass(frozen=True, eq=False)
class PeftSource:
    """An adapter of another kind than plain LoRA, with its tensors.

    Attributes:
        title: Of its kind.
        needs_base: Whether the updates depend on the base model's weights.
        base: Identifier of the base model, ``""`` when unknown.
        targets: Module path -> what is known of the target, in natural order.
        tensors: Name in the file -> tensor.
        full_modules: Parameter path -> full replacement weight.
        config: The fields that a LoRA configuration of the same updates shares with the source's.
    """

    title: str
    needs_base: bool
    base: str
    targets: Mapping[str, KindTarget]
    tensors: Mapping[str, torch.Tensor]
    full_modules: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]


def read_source(folder: str | Path, *, widths: Widths | None = None) -> PeftSource | None:
    """Read an adapter of another kind than plain LoRA, exactly representable or not; None for everything else.

    Args:
        folder: The adapter's folder.
        widths: Of the base model's layers; kinds whose files do not tell all widths take them from there.

    Raises:
        AdapterFormatError: Damaged, hostile or incomplete.
    """
    folder = Path(folder)
    if not exists(folder / "adapter_config.json"):
        return None
    file = read_config(folder)
    kind = kind_of(file.fields)
    if kind is None:
        return None
    parsed = _parse(kind, file)
    path = weights_path(folder)
    header = files.read_header(path, empty=kind.empty)
    targets, full = _resolve(kind, file.fields, parsed, header.tensors, path, widths)
    with enough_memory(folder):
        tensors = files.load(path, fingerprint=header.fingerprint).tensors
    weights = {parameter: tensors[one.key] for parameter, one in full.items()}
    config = _lora_config(file.fields, targets)
    return PeftSource(kind.title, bool(kind.needs_base), parsed.base, targets, tensors, weights, config)


def inspect_kind(folder: Path, name: str, file: ConfigFile) -> AdapterHeader:
    """Read the weight header of an adapter whose updates are exactly low rank; no weight byte is read.

    Raises:
        AdapterFormatError: Damaged, hostile or incomplete; or its updates are not exactly low rank, or only the base
            model tells them: the message names ``compose convert``.
    """
    kind = kind_of(file.fields)
    assert kind is not None  # noqa: S101 - asked for by the caller
    parsed = _parse(kind, file)
    if kind.needs_base:
        named = "" if kind.title == "DoRA" else f"peft_type {file.fields['peft_type']!r}: "
        raise AdapterFormatError(f"{file.path}: {named}{kind.needs_base}; {_next_step(folder, parsed.base)}")
    path = weights_path(folder)
    header = files.read_header(path, empty=kind.empty)
    targets, full = _resolve(kind, file.fields, parsed, header.tensors, path, None)
    _refuse_inexact(targets, folder, f"{path} (peft_type {file.fields['peft_type']!r})", parsed.base)
    kept = {module: target for module, target in targets.items() if target.rank}
    notes = [f"{kind.title}, opened as the low-rank update it is"]
    if pruned := len(targets) - len(kept):
        notes.append(f"{pruned} targets are pruned to rank 0 and left out")
    if kind.title == "VeRA":
        notes.append(
            "the file does not tell input widths, every target is taken to be as wide as vera_A; if the base model's "
            "layers differ, 'compose convert --base MODEL' takes theirs"
        )
    notes += [f"full weights kept, never composed: {', '.join(full)}"] if full else []
    return AdapterHeader(
        name=name,
        folder=folder,
        format="peft",
        base=parsed.base,
        targets={
            module: TargetHeader(one.kind, one.rank, one.in_features, one.out_features, one.scaling, one.dtype, "", "")
            for module, one in kept.items()
        },
        full_modules=full,
        config=_lora_config(file.fields, kept),
        config_text=file.text,
        num_bytes=header.num_bytes,
        fingerprint=header.fingerprint,
        notes=tuple(notes),
    )


@dataclass(frozen=True, eq=False)
class KindHeader:
    """An adapter of another kind than plain LoRA without its weights, whether it opens as it is or not.

    Attributes:
        title: Of its kind.
        next_step: Why it does not open as it is and what to do; ``""`` when it does.
        base: Identifier of the base model, ``""`` when unknown.
        targets: Module path -> what is known of the target, in natural order.
        ranks: Module path -> rank of the exact factors, or the configuration's own where there are none (IA3: 0).
        full_modules: Parameter path -> `FullTensorHeader`.
        file: Header of the weight file.
        config: The whole source configuration.
        config_text: The configuration file verbatim.
    """

    title: str
    next_step: str
    base: str
    targets: Mapping[str, KindTarget]
    ranks: Mapping[str, int]
    full_modules: Mapping[str, FullTensorHeader]
    file: files.FileHeader
    config: Mapping[str, Any]
    config_text: str


def describe_kind(folder: str | Path) -> KindHeader | None:
    """Read configuration and weight header of any known kind but plain LoRA; None for everything else.

    Raises:
        AdapterFormatError: Damaged, hostile or incomplete; not for being full rank or in need of the base model.
    """
    folder = Path(folder)
    file = read_config(folder)
    kind = kind_of(file.fields)
    if kind is None:
        return None
    parsed = _parse(kind, file)
    path = weights_path(folder)
    header = files.read_header(path, empty=kind.empty)
    targets, full = _resolve(kind, file.fields, parsed, header.tensors, path, None)
    own = "r" in file.fields
    ranks = {module: one.rank or (parsed.declared_rank(module) if own else 0) for module, one in targets.items()}
    next_step = ""
    try:
        inspect_kind(folder, "adapter", file)
    except AdapterFormatError as error:
        next_step = str(error)
    return KindHeader(kind.title, next_step, parsed.base, targets, ranks, full, header, file.fields, file.text)


def is_other_kind(header: AdapterHeader) -> bool:
    """Return whether `inspect_kind` made this header."""
    return all(not target.a_key for target in header.targets.values())


def read_kind(folder: Path, header: AdapterHeader, name: str) -> Adapter:
    """Read an adapter that `inspect_kind` described, as `compose.formats.peft.read_adapter`.

    Raises:
        AdapterFormatError: The file changed since, or holds values that are not finite.
    """
    path = weights_path(folder)
    config = parse_object(header.config_text.encode(), path)
    kind = kind_of(config)
    assert kind is not None  # noqa: S101 - it was when the header was made
    content = files.load(path, fingerprint=header.fingerprint)
    specs = {key: files.TensorSpec(tuple(one.shape), one.dtype) for key, one in content.tensors.items()}
    resolved, _ = _resolve(kind, config, kind.parse(config), specs, path, None)
    targets = {}
    for module in header.targets:
        target = resolved[module]
        assert target.factors is not None  # noqa: S101 - refused by inspect_kind
        a, b = target.factors(content.tensors)
        targets[module] = LowRank(a.contiguous(), b.contiguous(), target.scaling, target.kind)
    files.check_finite({module: one.a for module, one in targets.items()}, path)
    files.check_finite({module: one.b for module, one in targets.items()}, path)
    check_updates(targets, path)
    return Adapter(
        name=name,
        base=header.base,
        targets=targets,
        config=header.config,
        full_modules={parameter: content.tensors[one.key] for parameter, one in header.full_modules.items()},
        sha256=content.sha256,
        source=Source(header.config_text, tuple(header.targets)),
    )


def _parse(kind: Kind, file: ConfigFile) -> LoraConfig:
    try:
        return kind.parse(file.fields)
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{file.path}: {error}") from error


def _resolve(
    kind: Kind,
    config: Mapping[str, Any],
    parsed: LoraConfig,
    specs: Mapping[str, files.TensorSpec],
    where: Path,
    widths: Widths | None,
) -> tuple[dict[str, KindTarget], dict[str, FullTensorHeader]]:
    """Bring configuration and tensor names to one table of targets and one of full weights, nothing left over."""
    prefix = f"{where} (peft_type {config['peft_type']!r})"
    try:
        keys = parse_parts(specs, kind.parts, kind.shared)
        check_work(parsed, len(keys.parts), len(keys.full))
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{prefix}: {error}") from error
    parts = {
        path: {part: Found(name, *specs[name]) for part, name in keys.parts[path].items()}
        for path in sorted(keys.parts, key=natural_key)
    }
    shared = {part: Found(name, *specs[name]) for part, name in keys.shared.items()}
    opened = Opened(config, parsed, parts, shared, widths)
    problems = [] if parts else [f"no {kind.title} tensors"]
    targets: dict[str, KindTarget] = {}
    for path in parts:
        try:
            targets[path] = kind.target(opened, path)
        except AdapterFormatError as error:
            problems.append(str(error))
    full = {path: FullTensorHeader(*specs[name], name) for path, name in keys.full.items()}
    embeddings = {path for path, target in targets.items() if target.kind == "embedding"}
    problems += check_targets(parsed, list(parts)) + check_full_modules(parsed, list(full))
    problems += check_leftovers(parsed, keys.full, embeddings)
    problems += [f"{one.key} is empty (a shard not gathered before saving)" for one in full.values() if 0 in one.shape]
    if parts and targets and all(target.factors and not target.rank for target in targets.values()):
        problems.append("every target is pruned to rank 0; the adapter changes nothing")
    if problems:
        raise AdapterFormatError(f"{prefix}: {join_problems(list(dict.fromkeys(problems)))}; {SAVE_AGAIN}")
    return targets, full


def _refuse_inexact(targets: Mapping[str, KindTarget], folder: Path, where: str, base: str) -> None:
    problems = [f"target {module}: {target.reason}" for module, target in targets.items() if target.factors is None]
    unknown = any(target.factors is None and target.dense is None for target in targets.values())
    size = sum(one.rank * (one.in_features + one.out_features) * one.dtype.itemsize for one in targets.values())
    if not problems and size > files.MAX_FILE_BYTES:
        problems = [f"its exact factors take {size:,} bytes, more than the limit of {files.MAX_FILE_BYTES:,}"]
    if problems:
        raise AdapterFormatError(
            f"{where}: {join_problems(problems, 3)}; {_next_step(folder, base, model=unknown, cut=not unknown)}"
        )


def _next_step(folder: Path, base: str, *, model: bool = True, cut: bool = True) -> str:
    options = f" --base {shlex.quote(base) if base else 'MODEL'}" if model else ""
    options += " --rank R" if cut else ""
    return f"convert it once: compose convert {shlex.quote(str(folder))} --out DIR{options}"


def _lora_config(config: Mapping[str, Any], targets: Mapping[str, KindTarget]) -> dict[str, Any]:
    kept = {key: config[key] for key in _KEPT if config.get(key) is not None}
    return {**kept, "peft_type": "LORA", "target_modules": list(targets)}
