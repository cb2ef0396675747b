"""The plan of a run: numbers, and that making it changes nothing."""

import torch

from compose.routers.builder import build
from compose.routers.stages import Stage
from compose.routers.train_data import prepare
from compose.routers.train_plan import plan_of
from compose.routers.train_settings import TrainSettings
from compose.routers.training import Run
from compose.text.encoding import PromptFormat
from tests.routers.train_cases import SPECS, LetterTokenizer, attached_bank, records


def test_a_plan_counts_and_changes_nothing(tiny_model) -> None:
    model = tiny_model("llama")
    settings = TrainSettings(batch_size=6, accumulation=2)
    attached = attached_bank(model)
    data = prepare(
        records(), LetterTokenizer(), PromptFormat(), config=model.config, spec=SPECS["noisy"],
        experts=attached.bank.names, settings=settings,
    )  # fmt: skip
    routed = build(attached, SPECS["noisy"], tasks=data.tasks)
    stages = (Stage(name="a", train="router", steps=2), Stage(name="b", epochs=1))
    run = Run(routed, data, stages, settings)
    before = {key: value.clone() for key, value in routed.state_dict().items()}
    state = torch.get_rng_state()
    plan = plan_of(run)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in routed.state_dict().items())
    assert all(parameter.grad is None for parameter in routed.parameters())
    assert plan["steps"] == 6
    assert [stage["trains"] for stage in plan["stages"]] == ["router", "both"]
    assert plan["stages"][1]["tasks"] == {"say": 16, "turn": 8}
    widths = sum(layer.in_features + layer.out_features for layer in attached.layers.values())
    inputs = sum(layer.in_features for layer in attached.layers.values())
    assert plan["trained_parameters"] == {"router": 3 * inputs, "experts": 3 * 2 * widths}
    attached.detach()
    assert plan["base_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert plan["predicted_tokens"] == sum(len(row.response) for row in data.rows)
