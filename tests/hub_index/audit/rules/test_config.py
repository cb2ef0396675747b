"""The configuration: hostile numbers, text, names and patterns. No pattern is ever run."""

import json
import time
from pathlib import Path

import pytest

from compose.hub_index.audit.rule import RULES


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"lora_alpha": 1e30}, "config.scaling"),
        ({"lora_alpha": float("nan")}, "config.scaling"),
        ({"lora_alpha": float("inf")}, "config.scaling"),
        ({"lora_alpha": 30_003}, "config.scaling"),
        ({"lora_alpha": 10**400}, "config.scaling"),
        ({"alpha_pattern": {"q_proj": -1e9}}, "config.scaling"),
        ({"r": 1025}, "config.rank"),
        ({"r": 0}, "config.rank"),
        ({"r": 2**31}, "config.rank"),
        ({"rank_pattern": {"q_proj": 400_000}}, "config.rank"),
        ({"peft_type": "EVIL"}, "config.kind"),
        ({"peft_type": None}, "config.kind"),
        ({"peft_type": ["LORA"]}, "config.kind"),
        ({"lora_alpha": float("nan")}, "config.text"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "config.targets"),
        ({"target_modules": ["q_proj"]}, "config.targets"),
        ({"use_qalora": True}, "config.refused"),
    ],
)
def test_what_must_not_be_loaded(make, edit, rules, fields: dict, expected: str) -> None:
    assert expected in rules(edit(make(), **fields))
    assert RULES[expected].hard


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"lora_alpha": -4}, "config.negative"),
        ({"base_model_name_or_path": "gemma3-270m-it"}, "config.base"),
        ({"base_model_name_or_path": "./models/llama"}, "config.base"),
        ({"base_model_name_or_path": None}, "config.base"),
        ({"base_model_name_or_path": "../../../../etc"}, "config.base-path"),
        ({"base_model_name_or_path": "..\\..\\etc"}, "config.base-path"),
        ({"revision": "main"}, "config.revision"),
        ({"auto_mapping": {"parent_library": "os", "base_model_class": "system"}}, "config.import"),
        ({"megatron_core": "antigravity"}, "config.import"),
        ({"tokenizer_kwargs": {"trust_remote_code": True}}, "config.import"),
        ({"target_modules": "(([a-z0-9_.])+)+X"}, "config.pattern"),
        ({"rank_pattern": {"([a-z]+)*b": 3}}, "config.pattern"),
    ],
)
def test_what_is_told(make, edit, rules, fields: dict, expected: str) -> None:
    assert expected in rules(edit(make(), **fields))
    assert not RULES[expected].hard


@pytest.mark.parametrize(
    "fields",
    [
        {"revision": "0" * 40},
        {"megatron_core": "megatron.core"},
        {"auto_mapping": {"parent_library": "transformers.models.llama"}},
        {"target_modules": r".*\.(q_proj|v_proj)"},
        {"lora_alpha": 29_997},
    ],
)
def test_what_is_usual_is_no_finding(make, edit, rules, fields: dict) -> None:
    assert {rule for rule in rules(edit(make(), **fields)) if rule.startswith("config.")} == set()


def test_the_rank_of_the_scaling_is_that_of_rslora(make, edit, rules) -> None:
    folder = edit(make(), use_rslora=True, lora_alpha=17_400)  # over sqrt(3): beyond 1e4; over 3 it would not be
    assert "config.scaling" in rules(folder)
    assert "config.scaling" not in rules(edit(folder, use_rslora=False))


def test_double_keys_are_refused_and_the_rest_is_still_judged(make, rules) -> None:
    folder = make()
    file = folder / "adapter_config.json"
    file.write_text(file.read_text().rstrip()[:-1] + ', "r": 3, "revision": "main"}')
    assert {"config.text", "config.revision"} <= rules(folder)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "null", "\x00"])
def test_text_that_is_no_object(make, rules, text: str) -> None:
    folder = make()
    (folder / "adapter_config.json").write_text(text)
    assert "config.text" in rules(folder)


def test_patterns_that_would_run_for_ever_cost_nothing(make, edit, rules) -> None:
    folder = edit(make(), target_modules="(([a-z0-9_.])+)+X", alpha_pattern={"(a+)+$" * 20: 8.0})
    started = time.process_time()
    rules(folder)
    assert time.process_time() - started < 1.0


def test_what_the_loader_refuses_is_always_a_hard_finding(make, edit, rules) -> None:
    folder = edit(make(), use_dora=True)
    found = rules(folder)
    assert "config.refused" in found
    assert "config.kind" not in found


def test_the_revision_of_an_index_counts(make, rules) -> None:
    from compose.hub_index.records import AdapterRecord

    record = AdapterRecord(name="one", sha256_weights="0" * 64, revision="main", license="mit")
    assert "config.revision" in rules(make(), record=record)


def test_the_configuration_of_the_fixture_is_strict_json(make) -> None:
    folder: Path = make()
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 3
