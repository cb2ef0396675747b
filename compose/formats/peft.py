"""PEFT folders (``adapter_config.json``, ``adapter_model.safetensors``), read and written without peft.

Plain LoRA is read here, the other kinds whose update is exactly low rank (AdaLoRA, VeRA, small LoHa and LoKr) through
``peft_source``; what is written is always plain LoRA. Everything else, every unused tensor and every unmet target is
refused by name: loading part of an adapter is loading another adapter.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from compose.adapter import Adapter, LowRank, Source
from compose.errors import AdapterFormatError, DuplicateNameError
from compose.files import safetensors_file as files
from compose.files.memory import enough_memory
from compose.files.paths import exists, is_link
from compose.files.publish import publish_folder
from compose.files.strict_json import parse_object
from compose.formats import FORMATS, discover
from compose.formats.header import (
    SAVE_AGAIN,
    AdapterHeader,
    FullTensorHeader,
    TargetHeader,
    check_name,
    join_problems,
    natural_key,
)
from compose.formats.magnitudes import check_updates
from compose.formats.peft_config import LoraConfig, check_full_modules, check_targets, check_work, parse_config
from compose.formats.peft_folder import (
    CONFIG_NAME,
    LEGACY_NAME,
    WEIGHTS_NAME,
    read_config,
    weights_path,
)
from compose.formats.peft_keys import Pair, check_leftovers, parse_keys
from compose.formats.peft_kinds import kind_of
from compose.formats.peft_refusals import unknown_fields
from compose.formats.peft_source import inspect_kind, is_other_kind, read_kind
from compose.formats.peft_write import config_bytes, weights_bytes


def inspect_adapter(folder: str | Path, *, name: str | None = None) -> AdapterHeader:
    """Read configuration and weight header of a PEFT folder; no weight byte is read.

    Args:
        folder: The adapter's folder.
        name: Its name; the folder's name by default.

    Raises:
        AdapterFormatError: Anything wrong with either file; the message names file, target and reason.
    """
    folder = Path(folder)
    checked_name = check_name(folder.resolve().name if name is None else name, folder)
    file = read_config(folder)
    config = file.fields
    if kind_of(config) is not None:
        return inspect_kind(folder, checked_name, file)
    try:
        parsed = parse_config(config)
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{file.path}: {error}") from error
    path = weights_path(folder)
    header = files.read_header(path)
    targets, full = resolve_targets(path, parsed, header)
    notes = [f"full weights kept, never composed: {', '.join(full)}"] if full else []
    notes += [f"unknown configuration field {key!r} kept" for key in unknown_fields(config)]
    return AdapterHeader(
        name=checked_name,
        folder=folder,
        format="peft",
        base=parsed.base,
        targets=targets,
        full_modules=full,
        config=config,
        config_text=file.text,
        num_bytes=header.num_bytes,
        fingerprint=header.fingerprint,
        notes=tuple(notes),
    )


def read_adapter(folder: str | Path, *, name: str | None = None, expected: AdapterHeader | None = None) -> Adapter:
    """Read a PEFT folder whole; every tensor owns its memory and nothing stays mapped to the file.

    Args:
        folder: The adapter's folder.
        name: Its name; the folder's name by default.
        expected: A header from `inspect_adapter`; the configuration is then not read again, and a weight file whose
            header differs is refused.

    Raises:
        AdapterFormatError: As `inspect_adapter`, and for values that are not finite, or give an update that is not.
    """
    header = inspect_adapter(folder, name=name) if expected is None else expected
    with enough_memory(folder):
        if is_other_kind(header):
            return read_kind(Path(folder), header, header.name if name is None else check_name(name, folder))
        content = files.load(weights_path(Path(folder)), fingerprint=header.fingerprint)
    tensors = content.tensors
    targets = {
        path: LowRank(tensors[target.a_key], tensors[target.b_key], target.scaling, target.kind)
        for path, target in header.targets.items()
    }
    if not content.moderate:
        check_updates(targets, weights_path(Path(folder)))
    return Adapter(
        name=header.name if name is None else check_name(name, folder),
        base=header.base,
        targets=targets,
        config=header.config,
        full_modules={path: tensors[full.key] for path, full in header.full_modules.items()},
        sha256=content.sha256,
        source=Source(header.config_text, tuple(header.targets)),
    )


def write_adapter(adapter: Adapter, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a PEFT LoRA folder that PEFT loads with equal outputs; it appears whole or not at all.

    The source configuration is kept, verbatim while it still describes the tensors. Scalings are written as
    ``lora_alpha`` / ``alpha_pattern``; one that no float64 alpha gives exactly is off by one rounding of float64.

    Args:
        adapter: Ranks and scalings may differ between targets.
        folder: Must not exist (or be empty) unless ``overwrite``, which replaces it whole.
        overwrite: Replace an existing adapter folder.

    Returns:
        The absolute path of ``folder``.

    Raises:
        AdapterFormatError: No targets, a rank of 0, values that are not finite, a dtype or a path the format cannot
            hold.
        DuplicateNameError: ``folder`` exists and ``overwrite`` is false, or it is no adapter folder.
    """
    folder = Path(folder)
    foreign = folder.exists() and not (folder / CONFIG_NAME).exists() and (folder.is_file() or any(folder.iterdir()))
    if overwrite and foreign:
        raise DuplicateNameError(f"{folder} exists and is no adapter folder; it is not overwritten")
    return publish_folder(adapter_files(adapter), folder, overwrite=overwrite)


def adapter_files(adapter: Adapter) -> dict[str, bytes]:
    """Return the files of a PEFT LoRA folder, name -> content, checked as in `write_adapter` but not written."""
    _check_writable(adapter)
    weights = weights_bytes(adapter)
    try:
        config = config_bytes(adapter)
        _check_round_trip(adapter, weights, config)
    except AdapterFormatError as error:
        raise AdapterFormatError(f"adapter {adapter.name!r} cannot be written as PEFT files: {error}") from error
    return {CONFIG_NAME: config, WEIGHTS_NAME: weights}


def scan(folder: str | Path) -> list[Path]:
    """Return ``folder`` itself if it is a PEFT folder, else its PEFT subfolders sorted by name.

    Raises:
        AdapterFormatError: There is none.
    """
    return discover(Path(folder), ["peft"])


@FORMATS.register("peft")
class _Peft:
    """The functions above as a registry entry."""

    @staticmethod
    def matches(folder: Path) -> bool:
        return any(
            exists(folder / name) or is_link(folder / name) for name in (CONFIG_NAME, WEIGHTS_NAME, LEGACY_NAME)
        )

    inspect = staticmethod(inspect_adapter)
    read = staticmethod(read_adapter)
    write = staticmethod(write_adapter)

    @staticmethod
    def sha256(adapter: Adapter) -> str:
        return hashlib.sha256(weights_bytes(adapter)).hexdigest()

    @staticmethod
    def file_sha256(header: AdapterHeader) -> str:
        return files.file_sha256(weights_path(header.folder), fingerprint=header.fingerprint)


def resolve_targets(
    where: object, parsed: LoraConfig, header: files.FileHeader
) -> tuple[Mapping[str, TargetHeader], Mapping[str, FullTensorHeader]]:
    """Return targets and whole modules that a configuration and a weight header describe together.

    Raises:
        AdapterFormatError: They do not fit; everything that is wrong is named, after ``where``.
    """
    try:
        return _resolve(parsed, header)
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{where}: {error}") from error


@lru_cache(maxsize=16)  # the adapters of a bank mostly agree in both; they then share one table
def _resolve(
    parsed: LoraConfig, header: files.FileHeader
) -> tuple[Mapping[str, TargetHeader], Mapping[str, FullTensorHeader]]:
    """Bring configuration and tensor names to one table of targets and one of full weights, nothing left over."""
    tensors = header.tensors
    keys = parse_keys(tensors)
    check_work(parsed, len(keys.pairs), len(keys.full))
    problems: list[str] = [] if keys.pairs else ["no LoRA tensors"]
    targets: dict[str, TargetHeader] = {}
    for path in sorted(keys.pairs, key=natural_key):
        try:
            targets[path] = _target(parsed, path, keys.pairs[path], tensors)
        except AdapterFormatError as error:
            problems.append(str(error))
    embeddings = {path for path, target in targets.items() if target.kind == "embedding"}
    full = {path: FullTensorHeader(*tensors[name], name) for path, name in keys.full.items()}
    problems += check_targets(parsed, list(keys.pairs)) + check_full_modules(parsed, list(full))
    problems += check_leftovers(parsed, keys.full, embeddings)
    if problems:
        raise AdapterFormatError(f"{join_problems(problems)}; {SAVE_AGAIN}")
    return MappingProxyType(targets), MappingProxyType(full)


def _target(parsed: LoraConfig, path: str, pair: Pair, tensors: Mapping[str, files.TensorSpec]) -> TargetHeader:
    a, b = tensors[pair.a], tensors[pair.b]
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise AdapterFormatError(
            f"target {path}: factors of shapes {a.shape} and {b.shape}; only linear layers and embeddings (2 "
            "dimensions) are supported, not convolutions"
        )
    if a.shape[0] != b.shape[1]:
        raise AdapterFormatError(
            f"target {path}: A {a.shape} and B {b.shape} differ in rank; A is (rank, in), B (out, rank)"
        )
    if a.dtype != b.dtype:
        raise AdapterFormatError(f"target {path}: A is {a.dtype} and B {b.dtype}; save both in one dtype")
    rank = a.shape[0]
    return TargetHeader(pair.kind, rank, a.shape[1], b.shape[0], parsed.scaling(path, rank), a.dtype, pair.a, pair.b)


def _check_writable(adapter: Adapter) -> None:
    if not adapter.targets:
        raise AdapterFormatError(f"adapter {adapter.name!r} has no targets; there is nothing to write")
    for path, update in adapter.targets.items():
        if update.rank == 0:
            raise AdapterFormatError(
                f"adapter {adapter.name!r}, target {path}: rank 0 has no PEFT form; leave the target out"
            )
        if not math.isfinite(update.scaling):
            raise AdapterFormatError(
                f"adapter {adapter.name!r}, target {path}: scaling {update.scaling} is not finite"
            )
        if update.a.dtype not in files.DTYPES.values() or update.b.dtype != update.a.dtype:
            raise AdapterFormatError(
                f"adapter {adapter.name!r}, target {path}: dtypes {update.a.dtype} and {update.b.dtype}; both "
                f"factors must have one of {', '.join(map(str, files.DTYPES.values()))}"
            )
        files.check_finite({"A": update.a, "B": update.b}, f"adapter {adapter.name!r}, target {path}")
    files.check_finite(adapter.full_modules, f"adapter {adapter.name!r}")


def _check_round_trip(adapter: Adapter, weights: bytes, config: bytes) -> None:
    """What was built must read back as the same adapter; a difference here would be a wrong adapter on disk."""
    fields = parse_object(config, CONFIG_NAME)
    targets, full = _resolve(parse_config(fields), files.parse_header(weights, Path(WEIGHTS_NAME)))
    wrong = [
        path
        for path, update in adapter.targets.items()
        if path not in targets
        or (targets[path].kind, targets[path].rank) != (update.kind, update.rank)
        or not math.isclose(targets[path].scaling, update.scaling, rel_tol=1e-15, abs_tol=0.0)
    ]
    if wrong or targets.keys() != adapter.targets.keys() or full.keys() != adapter.full_modules.keys():
        raise AdapterFormatError(
            f"{', '.join(wrong[:5]) or 'its module paths'} would read back differently (a path that starts with a "
            "wrapper's prefix, or two that are one)"
        )
