"""S3, texts: mutated cards become notes, mutated descriptions are refused whole, and none takes long."""

import time

import pytest

from compose.hub_index.cards import parse_card
from tests.hostile.cards import run, slow_cards

VOLUME = 3_000


def test_3_000_mutated_cards_results_and_descriptions(tmpfs):
    figures = run(VOLUME, 0, tmpfs)
    assert figures.other == []
    assert figures.cases == VOLUME
    assert figures.accepted >= 2 * VOLUME // 3  # every card, and some of the descriptions
    assert figures.refused > VOLUME // 10


@pytest.mark.parametrize("name", sorted(slow_cards()))
def test_a_card_that_is_built_to_be_slow_is_not(name):
    begun = time.process_time()
    parse_card(slow_cards()[name], "here")
    assert time.process_time() - begun < 1.0
