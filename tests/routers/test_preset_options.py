"""Options of presets from plain values: what is replaced, what is refused."""

import pytest

from compose.errors import IncompatibleError, UnknownNameError
from compose.routers.preset_options import configured
from compose.routers.presets.registry import PRESETS


def test_without_options_it_is_the_preset() -> None:
    for name in PRESETS:
        spec, experts = configured(name, {})
        assert spec == PRESETS[name].spec
        assert experts == PRESETS[name].experts


def test_options_replace_fields_of_the_mixture_its_components_and_its_experts() -> None:
    spec, experts = configured("mola", {"top_k": 1, "num_experts": [2, 4], "rank": 4, "noise": 0.5})
    assert (spec.select.k, spec.noise) == (1, 0.5)
    assert (experts.num_experts, experts.rank, experts.alpha) == ((2, 4), 4, PRESETS["mola"].experts.alpha)
    assert configured("xlora", {"gate": {"depth": 2}}).spec.gate.depth == 2
    assert configured("xlora", {"gate": "linear"}).spec.gate.bias is False
    assert configured("xlora", {"select": {"name": "top_k", "k": 3}}).spec.select.k == 3


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("xlora", {"top_k": 2}, "give select instead"),
        ("xlora", {"rank": 2, "nois": 1}, "unknown option of preset 'xlora' 'rank'.*did you mean 'noise'"),
        ("molora", {"noise": -1}, "noise must be >= 0"),
        ("molora", {"noise": "much"}, "wrong kind"),
        ("molora", {"select": "top"}, "unknown selector 'top'"),
        ("molora", {"gate": {"name": "linear", "width": 3}}, "no option 'width'"),
    ],
)
def test_what_cannot_be_is_refused(name, options, words) -> None:
    with pytest.raises(IncompatibleError, match=words):
        configured(name, options)


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'xlora'"):
        configured("xlra", {})
