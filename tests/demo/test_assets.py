import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from compose.demo.assets import demo_bank, demo_base
from compose.demo.network import END_ID, Shape, hidden_states
from compose.demo.pretraining import to_ids
from compose.demo.pretraining_data import encode
from compose.demo.specs import BANK
from compose.demo.tasks import TASKS, test_items

ADAPTERS = sorted(folder.name for folder in demo_bank().iterdir() if folder.is_dir())


@pytest.fixture(scope="module")
def base():
    return AutoModelForCausalLM.from_pretrained(demo_base()).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_base())


def exact_match(model, task, items):
    rows = np.stack([np.frombuffer(encode(*item), np.uint8) for item in test_items(task, items)])
    ids = to_ids(rows, torch.device("cpu"))
    with torch.no_grad():
        guess = model(ids).logits[:, :-1].argmax(-1)
    response = ((ids == 10).cumsum(1)[:, :-1] > 0) & (ids[:, 1:] < 256) | (ids[:, 1:] == END_ID)
    return ((guess == ids[:, 1:]) | ~response).all(1).float().mean().item()


def test_the_shipped_files_are_small():
    files = [path for folder in (demo_base(), demo_bank()) for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 14_000_000


def test_the_bank_has_mixed_shapes_and_one_adapter_per_upstream_task():
    configs = {name: json.loads((demo_bank() / name / "adapter_config.json").read_text()) for name in ADAPTERS}
    assert len(ADAPTERS) >= 24
    assert set(ADAPTERS) == {spec.name for spec in BANK}
    assert set(ADAPTERS) <= {task.name for task in TASKS.values() if task.group == "upstream"}
    assert len({config["r"] for config in configs.values()}) >= 4
    assert len({tuple(config["target_modules"]) for config in configs.values()}) >= 4
    assert sum(config["use_rslora"] for config in configs.values()) == 1


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_file_is_finite_float16_of_its_rank(name):
    config = json.loads((demo_bank() / name / "adapter_config.json").read_text())
    with safe_open(demo_bank() / name / "adapter_model.safetensors", "pt") as file:
        assert len(list(file.keys())) == 2 * 6 * len(config["target_modules"])
        for key in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(key)
            assert tensor.dtype == torch.float16
            assert torch.isfinite(tensor).all()
            assert tensor.shape[0 if "lora_A" in key else 1] == config["r"]


def test_the_tokenizer_is_one_token_per_byte(tokenizer):
    text = "Write in capitals: amber 42 (stone)!\n"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.eos_token_id == END_ID
    template = json.loads((demo_base() / "compose.json").read_text())
    assert tokenizer(template["response_suffix"])["input_ids"] == [END_ID]


def test_the_training_network_is_the_hugging_face_model(base):
    ids = torch.randint(32, 127, (2, 24), generator=torch.Generator().manual_seed(0))
    parameters = dict(base.named_parameters())
    with torch.no_grad():
        mine = hidden_states(Shape(), parameters, parameters["model.embed_tokens.weight"][ids])
        torch.testing.assert_close(mine, base.model(ids).last_hidden_state, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ["capitals", "new_wording_sum", "reverse_order_and_dashes", "rule_a_or_b"])
def test_the_base_alone_solves_nothing(base, name):
    assert exact_match(base, TASKS[name], 40) <= 0.05


@pytest.mark.parametrize("name", ["reverse_order", "capitals", "sort_numbers", "quotes"])
def test_a_shipped_adapter_loaded_by_peft_solves_its_task(name):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(demo_base())
    model = peft.PeftModel.from_pretrained(model, demo_bank() / name).eval()
    assert exact_match(model, TASKS[name], 40) >= 0.9
