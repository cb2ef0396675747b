"""Files that look like adapters and are not readable ones: each recognised by name and refused with its next step."""

from __future__ import annotations

from pathlib import Path

from compose.errors import AdapterFormatError
from compose.files import safetensors_file as files
from compose.formats import FORMATS
from compose.formats.peft_folder import CONFIG_NAME, LEGACY_NAME, WEIGHTS_NAME
from compose.hub_index.refusals import AdapterRejectedError
from compose.hub_index.sources import check_link

_DIFFUSERS = "pytorch_lora_weights."
_DIFFUSERS_PARTS = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "diffusion_model.")
_KOHYA_PARTS = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_")
_LFS = b"version https://git-lfs.github.com/spec/"
_IMAGES = (
    "Compose composes adapters of language models. Use it with diffusers (pipe.load_lora_weights); or train an adapter"
    " of a language model with peft"
)


def refuse_foreign(folder: Path, root: Path) -> None:
    """Raise for a folder that no format here can read; nothing but the first bytes and headers of files is read.

    Args:
        folder: That looked like an adapter.
        root: Real path below which links may lead.

    Raises:
        AdapterRejectedError: Code ``pointer``, ``config_only``, ``weights_only``, ``pickle``, ``diffusers``,
            ``kohya``, ``mttl`` or ``unknown``; the message says what it is and what to do.
    """
    names = {one.name for one in folder.iterdir() if not one.is_dir()}
    for name in sorted(names):
        if name.endswith((".safetensors", ".bin", ".json")):
            _refuse_pointer(folder / name, root)
    config, weights = CONFIG_NAME in names, WEIGHTS_NAME in names
    if config and weights:
        return
    if not (config or weights or LEGACY_NAME in names) and any(FORMATS[name].matches(folder) for name in FORMATS):
        return
    for name in sorted(names):
        if name.endswith(".safetensors"):
            refuse_image_file(folder / name, root)
    raise _refusal(folder, names)


def _refusal(folder: Path, names: set[str]) -> AdapterRejectedError:
    """Return the error for a folder without both files of PEFT's."""
    config, weights = CONFIG_NAME in names, WEIGHTS_NAME in names
    if any(name.startswith(_DIFFUSERS) for name in names):
        return AdapterRejectedError("diffusers", f"{folder}: LoRA of an image model (diffusers). {_IMAGES}")
    if LEGACY_NAME in names and config:
        return AdapterRejectedError(
            "pickle",
            f"{folder / LEGACY_NAME}: pickled weights can run code and are not read. If you trust the file, add it "
            "with --allow-pickle; it is then converted to safetensors in a bounded process",
        )
    if config:
        others = sorted(name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".ckpt")))
        seen = f" (there is {', '.join(others[:5])})" if others else ""
        return AdapterRejectedError(
            "config_only",
            f"{folder}: an {CONFIG_NAME} without {WEIGHTS_NAME}{seen}; the weights were not downloaded or lie "
            "elsewhere. Run: hf download REPO, or git lfs pull, or copy them here",
        )
    if weights or LEGACY_NAME in names:
        return AdapterRejectedError(
            "weights_only",
            f"{folder}: adapter weights without {CONFIG_NAME}, so scaling and kind are unknown; copy the file that "
            "was saved with them, or save again with peft's save_pretrained",
        )
    if any(name.endswith(".meta") and f"{name[:-5]}.ckpt" in names for name in names):
        return AdapterRejectedError(
            "mttl",
            f"{folder}: experts of an mttl library (.meta and .ckpt), which are pickles and can run code; load them "
            "with mttl where you trust them and save each with peft",
        )
    return AdapterRejectedError(
        "unknown", f"{folder}: no adapter that is known here; a PEFT folder has {CONFIG_NAME} and {WEIGHTS_NAME}"
    )


def refuse_image_file(path: Path, root: Path) -> None:
    """Raise when a safetensors file is an image model's LoRA, by its metadata and tensor names; damaged files pass.

    Raises:
        AdapterRejectedError: Code ``kohya`` or ``diffusers``.
    """
    check_link(path, root)
    try:
        header = files.read_header(path)
    except AdapterFormatError:
        return
    names = list(header.tensors)
    kohya = any(key.startswith("ss_") for key in header.metadata) or any(
        name.startswith(_KOHYA_PARTS) for name in names
    )
    if kohya:
        base = header.metadata.get("ss_base_model_version", "")[:60]
        told = f" for {base!r}" if base else ""
        raise AdapterRejectedError("kohya", f"{path}: LoRA of an image model{told} (kohya sd-scripts). {_IMAGES}")
    if any(name.startswith(_DIFFUSERS_PARTS) and ".lora" in name for name in names):
        raise AdapterRejectedError("diffusers", f"{path}: LoRA of an image model (diffusers). {_IMAGES}")


def _refuse_pointer(path: Path, root: Path) -> None:
    check_link(path, root)
    if not path.exists():
        return
    with files.open_regular(path) as stream:
        start = stream.read(200) or b""
    if start.startswith(_LFS):
        try:
            files.refuse_pointer(start, path)
        except AdapterFormatError as error:
            raise AdapterRejectedError("pointer", str(error)) from None
