"""Switches between generated tokens: by hand, with and without a cache, per row and only as long as a row goes on."""

import pytest
import torch

from compose.errors import IncompatibleError
from compose.routers.gates.linear import LinearGate
from compose.routers.routing import Decisions
from compose.routers.site_sums import dominant_expert
from compose.routers.spec import MixtureSpec
from compose.routers.switching import generation_switches


def step(experts: list[int], site: str = "a") -> Decisions:
    """Decisions with the given dominant experts."""
    gates = torch.nn.functional.one_hot(torch.tensor(experts), 3).float()
    ones, unknown = torch.ones(len(experts), dtype=torch.bool), torch.full((len(experts),), -1)
    return Decisions(site, 0, gates, gates, gates, ones, ones, unknown, unknown, torch.ones(3, dtype=torch.bool))


CACHED = [step([0, 1, 1, 2, 2, 0]), step([1, 2]), step([2, 2]), step([2, 0])]  # rows end in 1 and 0
WHOLE = [step([0, 1, 1, 2, 2, 0]), step([0, 1, 1, 1, 2, 2, 0, 2]), step([0, 1, 1, 1, 2, 2, 2, 0, 2, 2])]


def test_by_hand() -> None:
    found = generation_switches(CACHED, rows=2)["a"]
    assert found.pairs_B.tolist() == [3, 3]
    assert found.switches_B.tolist() == [1, 2]  # 1 1 2 2 and 0 2 2 0


def test_without_a_cache_the_last_token_counts() -> None:
    cached = generation_switches(CACHED[:3], rows=2)["a"]
    whole = generation_switches(WHOLE, rows=2)["a"]
    assert whole.switches_B.tolist() == cached.switches_B.tolist() == [1, 1]


def test_a_row_that_ended_is_not_followed() -> None:
    found = generation_switches(CACHED, rows=2, lengths=[1, 2])["a"]
    assert found.pairs_B.tolist() == [1, 2]
    assert found.switches_B.tolist() == [0, 1]


def test_sites_that_decide_once_or_were_not_asked_for_are_left_out() -> None:
    given = [*CACHED, step([0, 1], "once"), step([0, 1], "other"), step([0, 1], "other")]
    assert set(generation_switches(given, rows=2)) == {"a", "other"}
    assert set(generation_switches(given, rows=2, sites=["a"])) == {"a"}


def test_another_number_of_rows_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="a: the decisions are not of 4 rows"):
        generation_switches(CACHED, rows=4)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["cache", "no-cache"])
def test_a_generation_equals_its_text_read_again(options, routed_over) -> None:
    routed = routed_over("llama", MixtureSpec(gate=LinearGate(init="normal", std=1.0)))
    prompts = [[5, 6, 7, 8], [9, 10]]
    with routed.recording() as decisions:
        answers = routed.generate(prompts, max_new_tokens=8, stop_ids=[1], **options)
    found = generation_switches(decisions, rows=2, lengths=[len(answer) for answer in answers])
    assert len(found) == len(routed.router.layout)
    total = 0
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        with torch.no_grad(), routed.recording() as again:
            routed(input_ids=torch.tensor([prompt + answer[:7]]))
        for each in again:
            experts = dominant_expert(each)[len(prompt) - 1 :]
            assert int(found[each.site].pairs_B[row]) == len(experts) - 1
            assert int(found[each.site].switches_B[row]) == int((experts[1:] != experts[:-1]).sum())
            total += int(found[each.site].switches_B[row])
    assert total > 0
