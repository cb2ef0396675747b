"""S2: mutated adapters through the full loader are refused by a `ComposeError`, or finite and of the shapes told."""

import random

import pytest

from tests.hostile.adapters import SEEDS, WEIGHTS_NAME, seed_files
from tests.hostile.mutations import MUTATORS, mutate, run

VOLUME = 20_000
MOST_BYTES = 256 * 2**20


def test_20_000_mutated_adapters(tmpfs):
    figures = run(VOLUME, 0, tmpfs)
    assert figures.other == []
    assert figures.cases == VOLUME == figures.accepted + figures.refused
    assert figures.accepted > VOLUME // 100  # not everything stops at the first check
    assert figures.extra_bytes < MOST_BYTES


@pytest.mark.parametrize("mutator", MUTATORS, ids=lambda mutator: mutator.__name__)
def test_a_mutator_changes_files_and_gives_the_same_again(mutator):
    sound = seed_files("float32")[WEIGHTS_NAME]
    made = [mutator(sound, random.Random(seed)) for seed in range(50)]
    assert made == [mutator(sound, random.Random(seed)) for seed in range(50)]
    assert sum(one != sound for one in made) >= 45
    assert sum(MUTATORS.values()) == 100


def test_every_kind_of_adapter_is_mutated(tmpfs):
    assert run(len(SEEDS), 1, tmpfs).cases == len(SEEDS)
    assert mutate(b"\x02" + bytes(7) + b"{}", random.Random(3)) != b""
