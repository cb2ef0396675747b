"""Loading a base model with its tokenizer and prompt format."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from compose.errors import ComposeError
from compose.text.encoding import PromptFormat


class LoadedModel(NamedTuple):
    """A frozen model in evaluation mode, its tokenizer, and how its prompts are written."""

    model: Any
    tokenizer: Any
    prompt_format: PromptFormat


def load_model(path_or_id: str | Path, *, device: str = "cpu", dtype: str = "auto") -> LoadedModel:
    """Load a causal or encoder-decoder Transformers model, frozen, in evaluation mode; code beside it never runs.

    Args:
        path_or_id: A local folder, or an id in the local Hugging Face cache (``HF_HUB_OFFLINE`` is honoured).
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` ...
        dtype: ``"auto"`` (as stored; half precision becomes float32 on the CPU, where it is slow), ``"float32"``,
            ``"bfloat16"`` or ``"float16"``.

    Raises:
        ComposeError: There is no such model, or it is neither causal nor encoder-decoder.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    source = str(path_or_id)
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ComposeError(f"{source}: no config.json; give the folder of a Transformers model")
    if (Path(source) / "adapter_config.json").is_file():
        raise ComposeError(f"{source}: this is an adapter's folder; give the folder of its base model")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        stored = _dtype(dtype, config, device)
        model: Any = loader.from_pretrained(source, dtype=stored, config=config, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise ComposeError(f"cannot load the base model {source!r}: {first_line}") from error
    model = model.to(device).eval().requires_grad_(False)
    prompt_format = PromptFormat.of_folder(Path(source)) if Path(source).is_dir() else PromptFormat()
    return LoadedModel(model, tokenizer, prompt_format)


def _dtype(name: str, config: Any, device: str) -> torch.dtype:
    if name == "auto":
        stored = config.dtype or torch.float32
        half = stored in (torch.float16, torch.bfloat16)
        return torch.float32 if half and device == "cpu" else stored
    allowed = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in allowed:
        raise ComposeError(f"unknown dtype {name!r} (known: auto, {', '.join(allowed)})")
    return allowed[name]
