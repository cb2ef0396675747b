"""The presets that stand on further architectures show every kind there is."""

from compose.routers.presets.registry import PRESETS
from tests.routers.preset_kinds import kinds, on_architectures, one_of_each_kind

NAMES = list(PRESETS)


def shown(names):
    return set().union(*map(kinds, names))


def test_every_kind_is_shown_by_fewer_presets() -> None:
    chosen = one_of_each_kind(NAMES)
    assert shown(chosen) == shown(NAMES)
    assert len(set(chosen)) == len(chosen) < len(NAMES)


def test_every_place_input_gate_and_selector_is_a_kind() -> None:
    specs = [PRESETS[name].spec for name in one_of_each_kind(NAMES)]
    for part in ("site", "scope", "gate_input", "pooling", "structure", "combine", "train"):
        assert {getattr(spec, part) for spec in specs} == {getattr(PRESETS[name].spec, part) for name in NAMES}
    for part in ("gate", "select"):
        assert {type(getattr(spec, part)) for spec in specs} == {
            type(getattr(PRESETS[name].spec, part)) for name in NAMES
        }


def test_llama_has_every_preset() -> None:
    pairs = on_architectures(NAMES, "t5", "bert")
    assert [name for name, architecture in pairs if architecture == "llama"] == NAMES
    assert [name for name, architecture in pairs if architecture == "bert"] == one_of_each_kind(NAMES)


def test_a_preset_of_a_new_kind_joins() -> None:
    without = [name for name in NAMES if PRESETS[name].spec.structure != "ia3"]
    (new,) = (name for name in NAMES if name not in without)
    assert new in one_of_each_kind(NAMES)
