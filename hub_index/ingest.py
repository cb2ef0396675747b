"""Taking adapters in: each lands in the index as active or quarantined, with the reasons, or is refused; never half.

The rules of the audit look at an adapter's files. A hard finding refuses it. What remains is hashed and described, and
quarantined (known, shown, and not used unless asked for) when

- it does not open as it is, since only its base model tells its update (DoRA, IA3 ...); the reason says what to do;
- nothing says what its base model is;
- a finding is as severe as ``quarantine_at``, or the adapter changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from compose.adapter import Adapter
from compose.errors import AdapterFormatError, ComposeError, DuplicateNameError, HubIndexError
from compose.files import safetensors_file as files
from compose.files.strict_json import parse_object
from compose.formats.header import AdapterHeader
from compose.formats.peft_folder import CONFIG_NAME, LEGACY_NAME, WEIGHTS_NAME, weights_path
from compose.formats.peft_source import KindHeader, describe_kind
from compose.hub_index.audit.evidence import Evidence
from compose.hub_index.audit.rule import finding, is_hard, run_rules
from compose.hub_index.cards import MAX_CARD_BYTES, Card, read_card
from compose.hub_index.converted import converted_folder
from compose.hub_index.describe import (
    config_fields,
    dtype_names,
    metadata_of,
    modules_of,
    modules_of_kind,
    shape_fields,
)
from compose.hub_index.fingerprint import base_fingerprint, fingerprint_in
from compose.hub_index.foreign import refuse_foreign, refuse_image_file
from compose.hub_index.lineage import read_lineage
from compose.hub_index.records import SEVERITIES, AdapterRecord, AuditFinding, ModuleRecord, Severity
from compose.hub_index.refusals import AdapterRejectedError, code_of
from compose.hub_index.sources import Candidate, check_links, names_of, reader, walk
from compose.hub_index.unpickle import convert_pickled

if TYPE_CHECKING:
    from compose.hub_index.audit.base_model import BaseModel
    from compose.hub_index.store import Index

State = Literal["active", "quarantined", "refused", "present"]
_ZERO_RULE = "values.zero"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How adapters are taken in.

    Attributes:
        base: The base model they are for; one that does not fit it is refused.
        full_modules: Take adapters that replace whole modules (``modules_to_save``); composition never applies these.
        allow_pickle: Convert ``adapter_model.bin`` in a bounded process.
        quarantine_at: Findings as severe as this quarantine.
        replace: Take the place of an adapter with the same name or content.
    """

    base: BaseModel | None = None
    full_modules: bool = False
    allow_pickle: bool = False
    quarantine_at: Severity = "high"
    replace: bool = False


class Outcome(NamedTuple):
    """What became of one adapter.

    Attributes:
        name: In the index; of a refused one, the name it would have had.
        state: ``"active"``, ``"quarantined"``, ``"refused"``, or ``"present"`` (the same content is there already).
        place: Folder or line it came from.
        reasons: Why it was refused or quarantined.
        code: Of the refusal, for programs; ``""`` otherwise.
        notes: What a person should know and nothing follows from.
    """

    name: str
    state: State
    place: str
    reasons: tuple[str, ...] = ()
    code: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Files:
    """What was read of an adapter's files, once."""

    modules: tuple[ModuleRecord, ...]
    config: Any
    config_text: str
    sha256: str
    num_bytes: int
    num_tensors: int
    num_params: int
    dtype: str
    format: str
    next_step: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def add_tree(
    index: Index,
    folder: Path,
    options: Options,
    *,
    name: str | None = None,
    on_adapter: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Take in an adapter folder, or every adapter of a tree of folders, one transaction each.

    Args:
        index: Open for writing.
        folder: An adapter or a tree; hidden folders are skipped, links that lead out of it are refused.
        options: How.
        name: Of a single adapter; its folder's name by default.
        on_adapter: Called with every outcome as it stands.

    Returns:
        What became of each, in the order of their paths.

    Raises:
        HubIndexError: There is no adapter, or a name was given for several.
    """
    found = walk(folder)
    if not found.candidates and not found.refused:
        raise HubIndexError(
            f"{folder}: no adapter in it (a PEFT folder has {CONFIG_NAME} and {WEIGHTS_NAME}); hidden folders are "
            "skipped"
        )
    if name is not None and len(found.candidates) != 1:
        raise HubIndexError(f"--name names one adapter, {folder} has {len(found.candidates)}; add them one by one")
    names = [name] if name is not None else names_of(found.candidates)
    outcomes = [
        Outcome(path.name, "refused", str(path), (str(error),), error.code) for path, error in found.refused.items()
    ]
    for candidate, chosen in zip(found.candidates, names, strict=True):
        outcomes.append(add_candidate(index, candidate, chosen, options))
        if on_adapter is not None:
            on_adapter(outcomes[-1])
    return outcomes


def add_file(path: Path) -> Outcome:
    """Return why a single file is no adapter, in words that fit what it is."""
    try:
        if path.suffix == ".safetensors":
            refuse_image_file(path, path.resolve().parent)
        raise AdapterRejectedError(
            "file", f"{path}: a file; give the folder that holds it and its {CONFIG_NAME}, or a .jsonl of descriptions"
        )
    except AdapterRejectedError as error:
        return Outcome(path.stem, "refused", str(path), (str(error),), error.code)


def add_candidate(index: Index, candidate: Candidate, name: str, options: Options) -> Outcome:
    """Take in one folder; an error about it is an outcome, not an exception."""
    try:
        record, notes = examine(index, candidate, name, options)
        return store(index, record, str(candidate.folder), notes, replace=options.replace)
    except AdapterFormatError as error:
        return Outcome(name or candidate.folder.name, "refused", str(candidate.folder), (str(error),), code_of(error))
    except (DuplicateNameError, HubIndexError) as error:
        code = "name_taken" if isinstance(error, DuplicateNameError) else "record"
        return Outcome(name or candidate.folder.name, "refused", str(candidate.folder), (str(error),), code)


def store(index: Index, record: AdapterRecord, place: str, notes: Iterable[str], *, replace: bool) -> Outcome:
    """Write a record and say what became of it.

    Raises:
        DuplicateNameError: Another adapter has its name.
    """
    added = index.add(record, replace=replace)
    if added.state == "present":
        told = (*notes, "the same weights and configuration are in the index already; nothing was written")
        return Outcome(added.name, "present", place, notes=told)
    return Outcome(added.name, record.status, place, record.reasons, notes=tuple(notes))  # type: ignore[arg-type]


def examine(index: Index, candidate: Candidate, name: str, options: Options) -> tuple[AdapterRecord, tuple[str, ...]]:
    """Return the record of one adapter folder, and notes; nothing is written but what `convert_pickled` makes.

    Raises:
        AdapterFormatError: It is refused.
        HubIndexError: A name or a text that no record can have.
    """
    if not name:
        raise AdapterRejectedError(
            "name", f"{candidate.folder}: its name has no letter or digit that a name may have; give one with --name"
        )
    folder, root = candidate.folder, candidate.root
    check_links(folder, root)
    card = read_card(folder, reader(root, MAX_CARD_BYTES))
    parents, lineage_notes = read_lineage(folder, reader(root, 64 * 2**20))
    findings: list[AuditFinding] = []
    pickled = options.allow_pickle and (folder / LEGACY_NAME).exists() and not (folder / WEIGHTS_NAME).exists()
    if pickled:
        converted = convert_pickled(folder, root, converted_folder(index.path))
        folder = root = converted.folder
        detail = f"converted from {LEGACY_NAME} with SHA-256 {converted.sha256_pickle}"
        findings.append(finding("files.converted", "info", detail))
    refuse_foreign(folder, root)
    evidence = Evidence(folder, name, base=options.base, full_modules=options.full_modules)
    found = run_rules(evidence)
    _refuse_hard(evidence, [one for one in found if is_hard(one) and one.rule != "config.refused"])
    read = _read(evidence)
    _check_base(folder, options.base, read.modules)
    findings += [one for one in found if one.rule != "config.refused"]
    described = _described(read, card, options, pickled)
    reasons = tuple(_reasons(read, described["base_id"], findings, options.quarantine_at))
    path = str(folder.relative_to(index.path.absolute().parent)) if pickled else str(folder)
    record = AdapterRecord(
        name=name,
        source="hub" if candidate.repo_id else "dir",
        repo_id=candidate.repo_id,
        revision=candidate.revision,
        path=path,
        parents=parents,
        findings=tuple(findings),
        status="quarantined" if reasons else "active",
        reasons=reasons,
        **described,
    )
    notes = [f"{one.rule}: {one.detail}" for one in findings if one.severity != "info"]
    return record, (*read.notes, *card.notes, *lineage_notes, *notes)


def _read(evidence: Evidence) -> _Files:
    """Read the weights of an adapter that opens as it is, or of another kind that is known.

    Raises:
        AdapterFormatError: The format refuses it, or its values.
    """
    assert evidence.folder is not None  # noqa: S101 - made with one
    header, adapter = evidence.strict, evidence.adapter
    if isinstance(header, str):
        kind = describe_or_none(evidence.folder)
        if kind is None or not kind.next_step:
            raise AdapterRejectedError("format", header)
        return _read_kind(evidence.folder, kind)
    if isinstance(adapter, str):
        raise AdapterRejectedError("format", adapter)
    return _read_adapter(header, adapter)


def describe_or_none(folder: Path | None) -> KindHeader | None:
    """Return what is known of an adapter of another kind than plain LoRA; None where it is none, or damaged."""
    if folder is None or not (folder / CONFIG_NAME).exists():
        return None
    try:
        return describe_kind(folder)
    except AdapterFormatError:
        return None


def _read_adapter(header: AdapterHeader, adapter: Adapter) -> _Files:
    metadata, tensors = {}, 2 * len(header.targets) + len(header.full_modules)
    if header.format == "peft":
        file = files.read_header(weights_path(header.folder), empty=True)
        metadata, tensors = metadata_of(file.metadata), len(file.tensors)
    full = sum(tensor.numel() for tensor in adapter.full_modules.values())
    return _Files(
        modules=modules_of(header),
        config=_source_config(header),
        config_text=header.config_text,
        sha256=adapter.sha256,
        num_bytes=header.num_bytes,
        num_tensors=tensors,
        num_params=adapter.num_parameters + full,
        dtype=dtype_names(one.dtype for one in header.targets.values()),
        format="peft-safetensors" if header.format == "peft" else header.format,
        metadata=metadata,
        notes=header.notes,
    )


def _read_kind(folder: Path, kind: KindHeader) -> _Files:
    content = files.load(weights_path(folder), fingerprint=kind.file.fingerprint)
    return _Files(
        modules=modules_of_kind(kind),
        config=kind.config,
        config_text=kind.config_text,
        sha256=content.sha256,
        num_bytes=kind.file.num_bytes,
        num_tensors=len(content.tensors),
        num_params=sum(tensor.numel() for tensor in content.tensors.values()),
        dtype=dtype_names(tensor.dtype for tensor in content.tensors.values()),
        format="peft-safetensors",
        next_step=kind.next_step,
        metadata=metadata_of(kind.file.metadata),
    )


def _source_config(header: AdapterHeader) -> Any:
    """Return the configuration as the file says it; a header of another kind than LoRA holds a LoRA one."""
    return parse_object(header.config_text.encode(), header.folder)


def _refuse_hard(evidence: Evidence, hard: list[AuditFinding]) -> None:
    """Raise where there are hard findings: the first one's rule is the code; the reader's own words go before all."""
    if not hard:
        return
    told = "; ".join(one.detail for one in hard[:5]) + (f"; and {len(hard) - 5} more" if len(hard) > 5 else "")
    kind = describe_or_none(evidence.folder)
    if isinstance(evidence.strict, str) and kind is None:
        raise AdapterRejectedError(hard[0].rule, evidence.strict)
    raise AdapterRejectedError(hard[0].rule, f"{evidence.folder}: {told}{_remedy(hard[0].rule)}")


def _check_base(folder: Path, base: BaseModel | None, modules: tuple[ModuleRecord, ...]) -> None:
    """Raise where the base model's own layers do not give the adapter's fingerprint."""
    if base is not None and fingerprint_in(base, modules) != base_fingerprint(modules, base.model_type):
        message = f"{folder}: its targets are not those of {base.name}; give the base model it was trained on"
        raise AdapterRejectedError("base.fingerprint", message)


def _remedy(rule: str) -> str:
    if rule == "tensors.foreign":
        return (
            ". Adapters that replace whole weights are taken with --allow-full-modules; composition leaves those out"
        )
    if rule.startswith("base."):
        return ". Give the base model it was trained on with --base"
    return ""


def _described(read: _Files, card: Card, options: Options, pickled: bool) -> dict[str, Any]:
    fields = config_fields(read.config)
    base = options.base
    if not fields["base_id"]:
        fields["base_id"] = base.name if base is not None else card.base_models[0] if card.base_models else ""
    flags = [*fields["flags"], *(["full_modules"] if any(one.kind == "full" for one in read.modules) else [])]
    hyper = {**card.hyper, **({"safetensors_metadata": read.metadata} if read.metadata else {})}
    old = "peft-legacy-merged" if "fused" in flags else read.format
    return {
        **fields,
        **shape_fields(read.modules),
        "flags": tuple(flags),
        "format": "peft-bin" if pickled else old,
        "sha256_weights": read.sha256,
        "sha256_config": hashlib.sha256(read.config_text.encode()).hexdigest(),
        "num_bytes": read.num_bytes,
        "num_tensors": read.num_tensors,
        "num_params": read.num_params,
        "dtype": read.dtype,
        "modules": read.modules,
        "base_fingerprint": base_fingerprint(read.modules, base.model_type if base is not None else ""),
        "base_relation": card.base_relation or "adapter",
        "title": card.title,
        "summary": card.summary,
        "license": card.license,
        "language": card.language,
        "tags": card.tags,
        "datasets": card.datasets,
        "train_seed": card.train_seed,
        "hyper": hyper,
        "scores": card.scores,
    }


def _reasons(read: _Files, base_id: str, findings: Iterable[AuditFinding], quarantine_at: Severity) -> Iterator[str]:
    least = SEVERITIES.index(quarantine_at)
    if read.next_step:
        yield read.next_step
    if not base_id:
        yield "neither the configuration nor the card names a base model; add it again with --base MODEL --replace"
    for one in findings:
        if SEVERITIES.index(one.severity) >= least or one.rule == _ZERO_RULE:
            yield f"{one.rule}: {one.detail}"


def outcome_of(error: ComposeError, place: str, name: str = "") -> Outcome:
    """Return the outcome of an adapter that could not even be looked at."""
    code = code_of(error) if isinstance(error, AdapterFormatError) else "source"
    return Outcome(name, "refused", place, (str(error),), code)
