"""PEFT variants that are not plain LoRA: each refused by name with what to do, never loaded as something else."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

_PLAIN_INITS = frozenset({"gaussian", "orthogonal", "eva", "true", "false"})

# Field -> why a value that is set cannot be honoured, and the next step.
_VARIANTS = {
    "use_dora": "DoRA rescales every row of the adapted weight; convert it with its base model (compose convert)",
    "lora_bias": "it adds a bias to lora_B; retrain without it",
    "use_qalora": "QALoRA pools the inputs of lora_A; retrain as plain LoRA",
    "use_bdlora": "block-diagonal LoRA changes the factors' layout; retrain as plain LoRA",
    "layer_replication": "its layer numbers belong to an expanded model; attach it to that model with PEFT",
    "target_parameters": "LoRA on bare parameters (fused experts) is position-coded; target the linear layers "
    "themselves",
    "trainable_token_indices": "trained token rows are not a low-rank update; resize the embedding and retrain "
    "without it",
    "alora_invocation_tokens": "activated LoRA acts only after its invocation tokens; use PEFT for it",
    "alora_invocation_string": "activated LoRA acts only after its invocation tokens; use PEFT for it",
    "arrow_config": "an Arrow router is not an adapter; open its experts as a bank and use a Compose router",
    "velora_config": "VeLoRA changes the forward pass; retrain as plain LoRA",
    "monteclora_config": "MonteCLoRA samples its weights; retrain as plain LoRA",
    "kasa_config": "KaSA truncates the base's weights; retrain as plain LoRA",
}
_MUTATING_INIT = (
    "this initialisation changes the base weights, so the factors alone are not the update; convert it with PEFT's "
    "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
)

COMMON_FIELDS = frozenset(
    [
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "target_modules",
        "bias",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "runtime_config",
    ]
)
KNOWN_FIELDS = (
    COMMON_FIELDS
    | frozenset(_VARIANTS)
    | frozenset(
        [
            "r",
            "exclude_modules",
            "lora_alpha",
            "lora_dropout",
            "fan_in_fan_out",
            "use_rslora",
            "init_lora_weights",
            "rank_pattern",
            "alpha_pattern",
            "megatron_config",
            "megatron_core",
            "loftq_config",
            "eva_config",
            "corda_config",
            "lora_ga_config",
            "qalora_group_size",
            "ensure_weight_tying",
            "enable_lora",
            "merge_weights",
            "ephemeral_gpu_offload",
        ]
    )
)
LYCORIS_FIELDS = COMMON_FIELDS | frozenset(
    [
        "r",
        "alpha",
        "rank_dropout",
        "rank_dropout_scale",
        "module_dropout",
        "use_effective_conv2d",
        "decompose_both",
        "decompose_factor",
        "exclude_modules",
        "init_weights",
        "rank_pattern",
        "alpha_pattern",
    ]
)


def refuse_variants(config: Mapping[str, Any], *, known: Collection[str] = KNOWN_FIELDS) -> list[str]:
    """Return one problem per field that makes the adapter something other than plain LoRA; empty when it is plain.

    Args:
        config: The configuration.
        known: Fields that may be switched on.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        known = "LORA, ADALORA, VERA, LOHA and LOKR, and DoRA and IA3 through 'compose convert'"
        return [f"peft_type {kind!r:.60} is not supported; supported are {known}"]
    problems = [f"{key} is set: {reason}" for key, reason in _VARIANTS.items() if _is_set(config.get(key))]
    problems += refuse_extras(config, known)
    init = config.get("init_lora_weights", True)
    if not isinstance(init, bool | None) and not (isinstance(init, str) and init.lower() in _PLAIN_INITS):
        problems.append(f"init_lora_weights {init!r:.60}: {_MUTATING_INIT}")
    if _is_set(config.get("enable_lora")):
        problems.append(
            "enable_lora is set: fused LoRA of PEFT before 0.3 has grouped factors and no use_dora; drop one of them"
        )
    return problems


def refuse_extras(config: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """Return one problem per field that no kind of adapter can honour: trained biases, unknown switches."""
    problems = [
        f"{key} is set: this field is unknown and looks like a variant; use PEFT for it"
        for key in _unknown_switches(config, known)
    ]
    bias = config.get("bias", "none")
    if bias not in (None, "none"):
        problems.append(
            f"bias {bias!r:.60}: it carries biases of the base model; only 'none' is supported, retrain with it"
        )
    return problems


def unknown_fields(config: Mapping[str, Any], known: Collection[str] = KNOWN_FIELDS) -> list[str]:
    """Return the fields that are set and unknown here; they are kept, and change nothing."""
    return [key for key, value in config.items() if key not in known and _is_set(value)]


def _unknown_switches(config: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """PEFT turns its variants on by ``use_x: true`` or ``x_config: {...}``; a new one must not pass for plain LoRA."""
    return [
        key
        for key in unknown_fields(config, known)
        if config[key] is True or (isinstance(config[key], dict) and key.endswith("_config"))
    ]


def _is_set(value: Any) -> bool:
    """Anything but absent, false and empty; the number 0 counts as set (a token or layer number)."""
    return value is not None and value is not False and value != [] and value != {} and value != ""
