"""The shipped bank: one adapter per operation, with mixed ranks, target sets and scalings."""

from compose.demo.bank_training import AdapterSpec
from compose.demo.network import TARGETS
from compose.demo.wordings import TRAINING_WORDINGS

ATTENTION = TARGETS[:4]
MLP = TARGETS[4:]
QUERY_VALUE = (TARGETS[0], TARGETS[2])
VALUE_OUT_DOWN = (TARGETS[2], TARGETS[3], TARGETS[6])

_SHAPES: dict[str, tuple[int, tuple[str, ...]]] = {
    "sum": (8, TARGETS),
    "next_number": (8, ATTENTION),
    "add_days": (8, TARGETS),
    "add_weekdays": (4, TARGETS),
    "truth": (4, TARGETS),
    "returns_home": (4, ATTENTION),
    "close_brackets": (4, MLP),
    "add_minutes": (8, ATTENTION),
    "last_item": (4, TARGETS),
    "drop_first": (4, ATTENTION),
    "longest": (4, TARGETS),
    "largest": (4, TARGETS),
    "reverse_order": (8, TARGETS),
    "sort_words": (8, TARGETS),
    "sort_numbers": (4, TARGETS),
    "rotate": (8, ATTENTION),
    "reverse_letters": (8, TARGETS),
    "pig_latin": (8, TARGETS),
    "drop_vowels": (4, TARGETS),
    "initials": (4, TARGETS),
    "shift_letters": (8, MLP),
    "word_lengths": (4, ATTENTION),
    "swap_ends": (4, TARGETS),
    "add_one": (4, MLP),
    "parity": (16, QUERY_VALUE),
    "spell_digits": (4, TARGETS),
    "capitals": (8, MLP),
    "title_case": (2, TARGETS),
    "dashes": (4, TARGETS),
    "commas": (4, VALUE_OUT_DOWN),
    "no_spaces": (4, TARGETS),
    "slashes": (16, QUERY_VALUE),
    "round_brackets": (4, TARGETS),
    "quotes": (8, QUERY_VALUE),
    "shout": (2, TARGETS),
    "stars": (4, ATTENTION),
}
_RANK_STABILISED = {"sort_numbers": 8.0}
_OTHER_ALPHA = {"initials": 2.0, "quotes": 32.0}

BANK: tuple[AdapterSpec, ...] = tuple(
    AdapterSpec(
        name=name,
        rank=_SHAPES[name][0],
        targets=_SHAPES[name][1],
        alpha=_RANK_STABILISED.get(name, _OTHER_ALPHA.get(name, 2.0 * _SHAPES[name][0])),
        rank_stabilised=name in _RANK_STABILISED,
    )
    for name in TRAINING_WORDINGS
)
