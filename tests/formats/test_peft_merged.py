"""Fused LoRA of PEFT before 0.3: the grouped convolution of its MergedLinear is the oracle."""

import json

import pytest
import safetensors.torch
import torch
from torch.nn import functional
from torch.testing import assert_close

import compose
from compose.errors import AdapterFormatError
from compose.formats.peft import inspect_adapter, read_adapter, write_adapter
from compose.formats.peft_source import describe_kind

INPUTS, PART, RANK, ALPHA = 6, 5, 4, 10
PATH = "transformer.h.0.attn.c_attn"


def old_folder(folder, enabled, groups, *, flat=False, **fields):
    """A folder as peft 0.2 wrote it: no peft_version, no rank pattern, convolution weights of three dimensions."""
    chosen = sum(enabled)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(RANK * chosen, INPUTS, generator=generator, dtype=torch.float64)
    b = torch.randn(PART * chosen, RANK * chosen // groups, 1, generator=generator, dtype=torch.float64)
    config = {
        "base_model_name_or_path": "gpt2", "bias": "none", "enable_lora": enabled, "fan_in_fan_out": True,
        "inference_mode": True, "lora_alpha": ALPHA, "lora_dropout": 0.1, "merge_weights": False,
        "modules_to_save": None, "peft_type": "LORA", "r": RANK, "target_modules": ["c_attn"],
        "task_type": "CAUSAL_LM", **fields,
    }  # fmt: skip
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    key = f"base_model.model.{PATH}."
    saved = {key + "lora_A.weight": a, key + "lora_B.weight": b.squeeze(2) if flat else b}
    safetensors.torch.save_file(saved, folder / "adapter_model.safetensors")
    return a, b


def forward_of_peft(a, b, enabled, groups, x):
    """What MergedLinear adds to its output: grouped convolution, then zeros for the projections left out."""
    after = functional.conv1d((x @ a.T).transpose(-2, -1), b, groups=groups).transpose(-2, -1)
    result = x.new_zeros(*x.shape[:-1], PART * len(enabled))
    index = torch.zeros(len(enabled), PART, dtype=torch.bool)
    index[enabled] = True
    result[..., index.view(-1)] = after
    return result * (ALPHA / RANK)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("enabled", "groups"),
    [
        ([True, False, True], 2),  # query and value of GPT-2, as everyone used it
        ([True, True, True], 3),  # loralib: a group per projection
        ([False, True, True, True, True], 2),  # peft: two groups, whatever is enabled
        ([True], 1),
    ],
)
def test_the_update_is_that_of_merged_linear(tmp_path, enabled, groups, flat):
    a, b = old_folder(tmp_path / "old", enabled, groups, flat=flat)
    adapter = read_adapter(tmp_path / "old")
    update = adapter.targets[PATH]
    assert inspect_adapter(tmp_path / "old").targets[PATH][:6] == (
        "linear", RANK * sum(enabled), INPUTS, PART * len(enabled), ALPHA / RANK, torch.float64,
    )  # fmt: skip
    x = torch.randn(2, 3, INPUTS, dtype=torch.float64)
    assert_close(x @ update.delta().T, forward_of_peft(a, b, enabled, groups, x), rtol=1e-12, atol=1e-12)


def test_a_bank_opens_it_and_what_is_written_is_plain_lora(tmp_path):
    old_folder(tmp_path / "old", [True, False, True], 2)
    bank = compose.Bank.open(tmp_path / "old")
    written = write_adapter(bank["old"], tmp_path / "new")
    config = json.loads((written / "adapter_config.json").read_text())
    assert "enable_lora" not in config
    assert (config["r"], config["fan_in_fan_out"]) == (2 * RANK, True)
    delta = bank["old"].targets[PATH].delta()
    assert_close(read_adapter(written).targets[PATH].delta(), delta, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"enable_lora": [False, False]}, "enable_lora must be a list"),
        ({"enable_lora": [1, 0]}, "enable_lora must be a list"),
        ({"enable_lora": "query"}, "enable_lora must be a list"),
        ({"enable_lora": [True] * 65}, "at most 64"),
        ({"enable_lora": [True, True, True]}, r"do not fit rank 4 for 3 of 3 projections"),
        ({"r": 3}, "do not fit rank 3 for 2 of 3 projections"),
        ({"use_dora": True}, "enable_lora is set"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, fields, message):
    old_folder(tmp_path / "old", [True, False, True], 2, **fields)
    with pytest.raises(AdapterFormatError, match=message):
        inspect_adapter(tmp_path / "old")


def test_a_wide_kernel_is_a_convolution_and_refused(tmp_path):
    old_folder(tmp_path / "old", [True, False, True], 2)
    path = tmp_path / "old" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors[f"base_model.model.{PATH}.lora_B.weight"] = torch.ones(10, 4, 3, dtype=torch.float64)
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(AdapterFormatError, match="do not fit together"):
        inspect_adapter(tmp_path / "old")


def test_any_kind_can_be_described_from_headers(tmp_path, make_folder):
    old_folder(tmp_path / "old", [True, False, True], 2)
    described = describe_kind(tmp_path / "old")
    assert (described.title, described.next_step, dict(described.ranks)) == ("fused LoRA", "", {PATH: 2 * RANK})
    assert describe_kind(make_folder("plain")) is None
