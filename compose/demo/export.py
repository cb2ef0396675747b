"""Writes the base as a Hugging Face folder and the adapters as PEFT folders."""

import json
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from compose.demo.bank_training import AdapterSpec, StackedAdapters
from compose.demo.network import END_ID, PAD_ID, Shape

END_TOKEN, PAD_TOKEN = "<end>", "<pad>"
BASE_NAME = "compose-demo-base"


def export_base(shape: Shape, parameters: dict[str, Tensor], folder: Path) -> None:
    """Write weights (float16), configuration, tokenizer and ``compose.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().cpu().contiguous() for name, value in parameters.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=256,
        rms_norm_eps=shape.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        eos_token_id=END_ID,
        bos_token_id=None,
        dtype="float32",
    )
    config.save_pretrained(folder)
    generation = {"eos_token_id": END_ID, "pad_token_id": PAD_ID, "do_sample": False, "max_new_tokens": 48}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    _tokenizer().save_pretrained(folder)
    template = {"prompt_template": "{input}\n", "response_suffix": END_TOKEN}
    (folder / "compose.json").write_text(json.dumps(template, indent=2) + "\n")


def export_adapters(adapters: StackedAdapters, folder: Path) -> None:
    """Write one PEFT folder per adapter, float16, without the rows that pad the stack."""
    for index, spec in enumerate(adapters.specs):
        place = folder / spec.name
        place.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for target in spec.targets:
            a_LRI = adapters.a[target][:, index, : spec.rank].half().cpu()
            b_LOR = adapters.b[target][:, index, :, : spec.rank].half().cpu()
            for layer in range(len(a_LRI)):
                prefix = f"base_model.model.model.layers.{layer}.{target}"
                tensors[f"{prefix}.lora_A.weight"] = a_LRI[layer].contiguous()
                tensors[f"{prefix}.lora_B.weight"] = b_LOR[layer].contiguous()
        save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
        (place / "adapter_config.json").write_text(json.dumps(_peft_config(spec), indent=2) + "\n")


def _peft_config(spec: AdapterSpec) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE_NAME,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": spec.rank_stabilised,
        "target_modules": [target.rsplit(".", 1)[1] for target in spec.targets],
    }


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, whose id is the byte; then the padding and end tokens."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {PAD_TOKEN: PAD_ID, END_TOKEN: END_ID}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def _byte_characters() -> list[str]:
    """The stand-in of every byte in the byte-level alphabet: itself, or the next code point from 256."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]
