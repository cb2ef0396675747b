"""What cannot be built is refused with the next step to take."""

import pytest

from compose.engine.attach import attach
from compose.errors import IncompatibleError
from compose.routers.builder import build
from compose.routers.presets.registry import preset
from compose.routers.training import train
from tests.routers.train_cases import SPECS, LetterTokenizer, attached_bank, records


def test_a_model_without_a_bank_and_a_name_instead_of_a_specification(tiny_model, make_experts) -> None:
    model = tiny_model("llama")
    with pytest.raises(IncompatibleError, match=r"got LlamaForCausalLM; call attached = compose.attach"):
        build(model, preset("arrow"))
    with attach(model, make_experts(model)) as attached:
        with pytest.raises(IncompatibleError, match=r"got str 'arrow'; presets by name: compose.routers.preset"):
            build(attached, "arrow")
        with pytest.raises(IncompatibleError, match="presets by name"):
            train(attached, "arrow", records(), tokenizer=LetterTokenizer(), steps=1)
        assert attached.active is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mola", {}, "attach the bank with trainable=True"),
        ("moelora_task", {"train": "router"}, r"build\(..., tasks=...\)"),
        ("mocle", {"train": "router", "always_on": ()}, r"build\(..., clusters=...\)"),
        ("dlp", {}, r"build\(..., text_features=...\)"),
        ("molora", {"train": "router", "always_on": ("other",)}, "always_on names 'other', which is not in the bank"),
        ("arrow", {"targets": "nowhere"}, "no targets to route"),
    ],
)
def test_what_a_mixture_needs_is_named(name, options, message, tiny_model, make_experts) -> None:
    model = tiny_model("llama")
    with attach(model, make_experts(model)) as attached:
        with pytest.raises(IncompatibleError, match=message):
            build(attached, preset(name, **options))
        assert attached.active is None


def test_targets_of_another_bank_are_named(tiny_model, make_experts) -> None:
    model = tiny_model("llama")
    with attach(model, make_experts(model)) as attached, pytest.raises(IncompatibleError, match="is no target"):
        build(attached, preset("arrow"), targets=["x.y"])


def test_records_of_another_kind_and_misspelt_options(tiny_model) -> None:
    attached = attached_bank(tiny_model("llama"))
    options = {"tokenizer": LetterTokenizer(), "steps": 1}
    with pytest.raises(IncompatibleError, match=r"got dict; compose\.routers\.read_mixed reads"):
        train(attached, SPECS["router"], [{"task": "a", "prompt": "b", "response": "c"}], **options)
    with pytest.raises(IncompatibleError, match="no records to train on"):
        train(attached, SPECS["router"], [], **options)
    with pytest.raises(IncompatibleError, match=r"no option 'lr'.*learning_rate"):
        train(attached, SPECS["router"], records(), lr=1.0, **options)
