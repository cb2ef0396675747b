"""ComPEFT folders (arXiv:2311.13171): ``compeft_config.json`` and ``adapter_model.compeft.safetensors``.

The configuration is a PEFT ``adapter_config.json`` under another name, so that neither PEFT nor the format ``peft``
takes the folder for one of theirs. Reading and writing are exact for every adapter; an adapter becomes small where its
factors are sparse and ternary, which `compose.formats.compeft_ternary.ternarize` makes them, with the loss reported.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import safetensors.torch

from compose.adapter import Adapter, LowRank, Source
from compose.errors import AdapterFormatError, DuplicateNameError
from compose.files import safetensors_file as files
from compose.files.memory import enough_memory
from compose.files.paths import exists, is_link
from compose.files.publish import publish_folder
from compose.files.strict_json import parse_object
from compose.formats import FORMATS, compeft_file
from compose.formats.compeft_ternary import Alpha, Scope, Ternarized, ternarize
from compose.formats.header import AdapterHeader, check_name
from compose.formats.magnitudes import check_updates
from compose.formats.peft import CONFIG_NAME as PEFT_CONFIG
from compose.formats.peft import WEIGHTS_NAME as PEFT_WEIGHTS
from compose.formats.peft import adapter_files, resolve_targets
from compose.formats.peft_config import parse_config
from compose.formats.peft_folder import MAX_CONFIG_BYTES
from compose.formats.peft_refusals import unknown_fields
from compose.formats.peft_write import weights_bytes

CONFIG_NAME = "compeft_config.json"
WEIGHTS_NAME = "adapter_model.compeft.safetensors"
RECORD_NAME = "compeft.json"


def inspect_compeft(folder: str | Path, *, name: str | None = None) -> AdapterHeader:
    """Read configuration and header of a ComPEFT folder; nothing is decoded.

    Raises:
        AdapterFormatError: Anything wrong with either file; the message names file, target and reason.
    """
    folder = Path(folder)
    checked_name = check_name(folder.resolve().name if name is None else name, folder)
    config_path = folder / CONFIG_NAME
    data = files.read_bytes(config_path, max_bytes=MAX_CONFIG_BYTES)
    files.refuse_pointer(data[:200], config_path)
    config = parse_object(data, config_path)
    try:
        parsed = parse_config(config)
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{config_path}: {error}") from error
    path = folder / WEIGHTS_NAME
    header = compeft_file.read_header(path)
    targets, full = resolve_targets(path, parsed, header.plain)
    notes = [_note(header)]
    notes += [f"full weights kept, never composed: {', '.join(full)}"] if full else []
    notes += [f"unknown configuration field {key!r} kept" for key in unknown_fields(config)]
    return AdapterHeader(
        name=checked_name,
        folder=folder,
        format="compeft",
        base=parsed.base,
        targets=targets,
        full_modules=full,
        config=config,
        config_text=data.decode(),
        num_bytes=header.plain.num_bytes,
        fingerprint=header.plain.fingerprint,
        notes=tuple(notes),
    )


def read_compeft(folder: str | Path, *, name: str | None = None, expected: AdapterHeader | None = None) -> Adapter:
    """Read a ComPEFT folder whole; see `compose.formats.peft.read_adapter`.

    Raises:
        AdapterFormatError: As `inspect_compeft`, and for a stream that is not the code of the tensors announced.
    """
    header = inspect_compeft(folder, name=name) if expected is None else expected
    with enough_memory(folder):
        content = compeft_file.load(Path(folder) / WEIGHTS_NAME, fingerprint=header.fingerprint)
    tensors = content.tensors
    targets = {
        path: LowRank(tensors[target.a_key], tensors[target.b_key], target.scaling, target.kind)
        for path, target in header.targets.items()
    }
    check_updates(targets, Path(folder) / WEIGHTS_NAME)
    return Adapter(
        name=header.name if name is None else check_name(name, folder),
        base=header.base,
        targets=targets,
        config=header.config,
        full_modules={path: tensors[full.key] for path, full in header.full_modules.items()},
        sha256=content.sha256,
        source=Source(header.config_text, tuple(header.targets)),
    )


def write_compeft(adapter: Adapter, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a ComPEFT folder whole or not at all and return its absolute path; values are written exactly.

    Factors that are not sparse and ternary are kept as they are: such an adapter gets no smaller (see
    `compose.formats.compeft_ternary.ternarize`).

    Raises:
        AdapterFormatError: As `compose.formats.peft.write_adapter`.
        DuplicateNameError: ``folder`` exists and ``overwrite`` is false, or it is no adapter folder.
    """
    return _publish(compeft_files(adapter), Path(folder), overwrite)


def compress_adapter(
    adapter: Adapter,
    folder: str | Path,
    *,
    density: float = 0.2,
    alpha: Alpha = "auto",
    scope: Scope = "tensor",
    overwrite: bool = False,
) -> Ternarized:
    """Make an adapter ternary, write it as a ComPEFT folder with a record of the loss, and return both.

    The record, ``compeft.json``, tells density, alpha, scope, the relative error of the deltas, the target that lost
    most, and the hash of the weight file the adapter was read from; no reader needs it.

    Args:
        adapter: In full precision.
        folder: See `write_compeft`.
        density: See `compose.formats.compeft_ternary.ternarize`, as alpha and scope.
        alpha: The size of kept entries.
        scope: What shares a threshold and a size.
        overwrite: Replace an existing adapter folder.

    Raises:
        IncompatibleError: As `compose.formats.compeft_ternary.ternarize`.
        AdapterFormatError: As `write_compeft`.
        DuplicateNameError: As `write_compeft`.
    """
    made = ternarize(adapter, density, alpha, scope=scope)
    record = {
        "density": density,
        "alpha": alpha,
        "scope": scope,
        "error": made.error,
        "worst_target": made.worst[0],
        "worst_error": made.worst[1],
        "source_sha256": adapter.sha256 or None,
    }
    files_made = {**compeft_files(made.adapter), RECORD_NAME: json.dumps(record, indent=2).encode()}
    _publish(files_made, Path(folder), overwrite)
    return made


def _publish(content: dict[str, bytes], folder: Path, overwrite: bool) -> Path:
    exists = folder.exists() and (folder.is_file() or any(folder.iterdir()))
    if overwrite and exists and not any(FORMATS[name].matches(folder) for name in FORMATS):
        raise DuplicateNameError(f"{folder} exists and is no adapter folder; it is not overwritten")
    return publish_folder(content, folder, overwrite=overwrite)


def compeft_files(adapter: Adapter) -> dict[str, bytes]:
    """Return the files of a ComPEFT folder, name -> content, checked as in `write_compeft` but not written."""
    plain = adapter_files(adapter)
    try:
        weights = _coded(plain[PEFT_WEIGHTS])
    except AdapterFormatError as error:
        raise AdapterFormatError(f"adapter {adapter.name!r} cannot be written as ComPEFT files: {error}") from error
    return {CONFIG_NAME: plain[PEFT_CONFIG], WEIGHTS_NAME: weights}


@FORMATS.register("compeft")
class _Compeft:
    """The functions above as a registry entry."""

    @staticmethod
    def matches(folder: Path) -> bool:
        return any(exists(folder / name) or is_link(folder / name) for name in (CONFIG_NAME, WEIGHTS_NAME))

    inspect = staticmethod(inspect_compeft)
    read = staticmethod(read_compeft)
    write = staticmethod(write_compeft)

    @staticmethod
    def sha256(adapter: Adapter) -> str:
        return hashlib.sha256(_coded(weights_bytes(adapter))).hexdigest()

    @staticmethod
    def file_sha256(header: AdapterHeader) -> str:
        return compeft_file.file_sha256(header.folder / WEIGHTS_NAME, fingerprint=header.fingerprint)


def _coded(weights: bytes) -> bytes:
    """Transcode a PEFT weight file, in its own order of tensors."""
    order = files.parse_header(weights, Path(PEFT_WEIGHTS)).tensors
    tensors = safetensors.torch.load(weights)
    return compeft_file.to_bytes({name: tensors[name] for name in order})


def _note(header: compeft_file.CompeftHeader) -> str:
    """How much of the file is ternary."""
    codes = [one.code for one in header.stored.values() if one.code is not None]
    entries = sum(one.size for one in header.stored.values() if one.code is not None)
    kept = sum(code.entries for code in codes)
    share = f", {100 * kept / entries:.3g} % of their entries kept" if entries else ""
    return f"ComPEFT: {len(codes)} of {len(header.stored)} tensors are ternary{share}"
