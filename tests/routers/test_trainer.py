"""Transformers' Trainer over a routed model: the same gradients as our loop, small checkpoints, resumed to the bit."""

import json

import pytest
import torch
from transformers import TrainingArguments

from compose.errors import IncompatibleError
from compose.routers.builder import build
from compose.routers.saved import load
from compose.routers.train_data import prepare
from compose.routers.train_settings import TrainSettings
from compose.routers.trainer import RouterTrainer, router_collator
from compose.text.encoding import PromptFormat
from tests.routers.train_cases import SPECS, LetterTokenizer, attached_bank, records

OPTIONS = {
    "per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 0.02, "logging_steps": 1, "report_to": "none",
    "use_cpu": True, "seed": 3, "save_steps": 3, "disable_tqdm": True,
}  # fmt: skip


def trainer_over(model, spec, folder, **options):
    attached = attached_bank(model)
    routed = build(attached, spec, seed=1)
    data = prepare(
        records(), LetterTokenizer(), PromptFormat(), config=model.config, spec=spec, experts=attached.bank.names,
        settings=TrainSettings(),
    )  # fmt: skip
    args = TrainingArguments(str(folder), **{**OPTIONS, **options})
    return RouterTrainer(routed, args, train_dataset=list(data.rows), data_collator=router_collator(data.collator))


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_it_trains_logs_and_saves_only_what_trained(name, tiny_model, tmp_path) -> None:
    model = tiny_model(name)
    trainer = trainer_over(model, SPECS["both"], tmp_path, max_steps=20, learning_rate=0.1)
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [entry["loss"] for entry in logs]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.25
    assert {"aux_loss", "switch_lb"} <= logs[0].keys()
    assert logs[0]["aux_loss"] == pytest.approx(0.1 * logs[0]["switch_lb"])
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert all(name.startswith("router.") or name.endswith(("a_RD", "b_RO")) for name in changed)
    saved = {path.name for path in (tmp_path / "checkpoint-20").iterdir()}
    assert {"mixture.json", "router.safetensors", "experts.safetensors", "trainer_state.json"} <= saved
    assert not {"model.safetensors", "pytorch_model.bin"} & saved


def test_resuming_is_equal_to_the_bit_and_the_folder_is_a_mixture(tiny_model, tmp_path) -> None:
    model = tiny_model("llama")
    trainer = trainer_over(model, SPECS["noisy"], tmp_path / "whole")
    trainer.train()
    whole = weights(trainer)
    trainer.model.attached.detach()
    again = trainer_over(model, SPECS["noisy"], tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, value in weights(again).items():
        torch.testing.assert_close(value, whole[name], rtol=0, atol=0)
    again.save_model(str(tmp_path / "final"))
    again.model.attached.detach()
    routed = load(attached_bank(model), tmp_path / "final")
    for name, value in routed.state_dict().items():
        torch.testing.assert_close(value, whole[name], rtol=0, atol=0)
    assert json.loads((tmp_path / "final" / "mixture.json").read_text())["format"] == "compose-mixture"


def test_accumulation_equals_the_large_batch(tiny_model, tmp_path) -> None:
    model = tiny_model("llama")
    found = []
    for rows, parts in ((8, 1), (4, 2)):
        trainer = trainer_over(
            model, SPECS["router"], tmp_path / str(parts), per_device_train_batch_size=rows,
            gradient_accumulation_steps=parts, max_steps=2,
        )  # fmt: skip
        trainer.train()
        found.append([entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry])
        trainer.model.attached.detach()
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_other_models_are_refused(tiny_model) -> None:
    with pytest.raises(IncompatibleError, match="trains a routed model, got LlamaForCausalLM"):
        RouterTrainer(tiny_model("llama"))
