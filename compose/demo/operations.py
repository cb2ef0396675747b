"""The operations of the demo: small text functions in fixed slots, applied in slot order.

A *program* is a set of operation names, at most one per slot. It turns a content string such as
``"amber stone lake"`` into an output string. The empty program echoes the content.
"""

import ast
import calendar
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

SLOTS = ("solve", "select", "order", "transform", "spell", "case", "join", "wrap")
Slot = Literal["solve", "select", "order", "transform", "spell", "case", "join", "wrap"]

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WEEKDAYS = tuple(calendar.day_name)
MONTHS = tuple(calendar.month_name)[1:]
MONTH_LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}
STEPS = {"N": (0, 1), "S": (0, -1), "E": (1, 0), "W": (-1, 0)}


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One named step.

    Attributes:
        name: Unique name.
        slot: The slot that it fills.
        kinds: Kinds of content that it applies to.
        apply: Acts on the list of items; for slots "join" and "wrap" it acts on a one-item list.
    """

    name: str
    slot: Slot
    kinds: tuple[str, ...]
    apply: Callable[[list[str]], list[str]]


def run_program(names: Sequence[str], content: str) -> str:
    """Apply the operations in slot order and return the output text.

    Args:
        names: Operation names in any order, at most one per slot.
        content: Items separated by single spaces.
    """
    chosen = {OPERATIONS[name].slot: OPERATIONS[name] for name in names}
    if len(chosen) != len(names):
        raise ValueError(f"two operations share a slot: {sorted(names)}")
    items = content.split(" ")
    for slot in SLOTS:
        if slot == "join":
            items = [" ".join(items)] if slot not in chosen else chosen[slot].apply(items)
        elif slot in chosen:
            items = chosen[slot].apply(items)
    return items[0]


def _each(function: Callable[[str], str]) -> Callable[[list[str]], list[str]]:
    return lambda items: [function(item) for item in items]


def _join(separator: str) -> Callable[[list[str]], list[str]]:
    return lambda items: [separator.join(items)]


def _wrap(before: str, after: str) -> Callable[[list[str]], list[str]]:
    return lambda items: [before + items[0] + after]


def _drop_vowels(word: str) -> str:
    return word[0] + "".join(letter for letter in word[1:] if letter not in "aeiou")


def _shift(word: str) -> str:
    return "".join(chr((ord(letter) - 96) % 26 + 97) for letter in word)


def _spell(items: list[str]) -> list[str]:
    return [DIGIT_WORDS[int(letter)] if letter.isdigit() else letter for item in items for letter in item]


def _sum(items: list[str]) -> list[str]:
    return [str(sum(int(item) for item in items if item != "+"))]


def _next(items: list[str]) -> list[str]:
    return [str(2 * int(items[-1]) - int(items[-2]))]


def _add_days(items: list[str]) -> list[str]:
    day, month = int(items[0]) + int(items[3]), MONTHS.index(items[1])
    while day > MONTH_LENGTHS[month]:
        day, month = day - MONTH_LENGTHS[month], (month + 1) % 12
    return [str(day), MONTHS[month]]


def _add_weekdays(items: list[str]) -> list[str]:
    move = sum(int(sign + number) for sign, number in zip(items[1::2], items[2::2], strict=True))
    return [WEEKDAYS[(WEEKDAYS.index(items[0]) + move) % 7]]


def _add_minutes(items: list[str]) -> list[str]:
    hours, minutes = items[0].split(":")
    total = (60 * int(hours) + int(minutes) + int(items[2])) % 1440
    return [f"{total // 60:02d}:{total % 60:02d}"]


def _truth(node: ast.expr) -> bool:
    if isinstance(node, ast.BoolOp):
        combine = all if isinstance(node.op, ast.And) else any
        return combine(_truth(value) for value in node.values)
    if isinstance(node, ast.UnaryOp):
        return operator.not_(_truth(node.operand))
    return isinstance(node, ast.Name) and node.id == "true"


def _evaluate(items: list[str]) -> list[str]:
    return [str(_truth(ast.parse(" ".join(items), mode="eval").body)).lower()]


def _returns(items: list[str]) -> list[str]:
    moves = [STEPS[item] for item in items]
    home = sum(x for x, _ in moves) == 0 == sum(y for _, y in moves)
    return ["yes" if home else "no"]


def _close(items: list[str]) -> list[str]:
    open_marks: list[str] = []
    for item in items:
        if item in PAIRS:
            open_marks.append(item)
        else:
            open_marks.pop()
    return [PAIRS[mark] for mark in reversed(open_marks)]


_WORDS, _LISTS = ("words",), ("words", "numbers")
_NUMBERS = ("numbers",)
_ANY = ("words", "numbers", "sum", "sequence", "date", "weekday", "logic", "walk", "brackets", "clock")
_NAMED = ("words", "date", "weekday", "logic", "walk")

_TABLE: tuple[tuple[Slot, str, tuple[str, ...], Callable[[list[str]], list[str]]], ...] = (
    ("solve", "sum", ("sum",), _sum),
    ("solve", "next_number", ("sequence",), _next),
    ("solve", "add_days", ("date",), _add_days),
    ("solve", "add_weekdays", ("weekday",), _add_weekdays),
    ("solve", "truth", ("logic",), _evaluate),
    ("solve", "returns_home", ("walk",), _returns),
    ("solve", "close_brackets", ("brackets",), _close),
    ("solve", "add_minutes", ("clock",), _add_minutes),
    ("select", "last_item", _LISTS, lambda items: items[-1:]),
    ("select", "drop_first", _LISTS, lambda items: items[1:]),
    ("select", "longest", _WORDS, lambda items: [max(items, key=len)]),
    ("select", "largest", _NUMBERS, lambda items: [max(items, key=int)]),
    ("order", "reverse_order", _LISTS, lambda items: items[::-1]),
    ("order", "sort_words", _WORDS, sorted),
    ("order", "sort_numbers", _NUMBERS, lambda items: sorted(items, key=int)),
    ("order", "rotate", _LISTS, lambda items: items[1:] + items[:1]),
    ("transform", "reverse_letters", _WORDS, _each(lambda word: word[::-1])),
    ("transform", "pig_latin", _WORDS, _each(lambda word: word[1:] + word[0] + "ay")),
    ("transform", "drop_vowels", _WORDS, _each(_drop_vowels)),
    ("transform", "initials", _WORDS, _each(lambda word: word[0])),
    ("transform", "shift_letters", _WORDS, _each(_shift)),
    ("transform", "word_lengths", _WORDS, _each(lambda word: str(len(word)))),
    ("transform", "swap_ends", _WORDS, _each(lambda word: word[-1] + word[1:-1] + word[0])),
    ("transform", "add_one", _NUMBERS, _each(lambda number: str(int(number) + 1))),
    ("transform", "parity", _NUMBERS, _each(lambda number: "odd" if int(number) % 2 else "even")),
    ("spell", "spell_digits", ("numbers", "sum", "sequence"), _spell),
    ("case", "capitals", _NAMED, _each(str.upper)),
    ("case", "title_case", _WORDS, _each(str.title)),
    ("join", "dashes", _LISTS, _join("-")),
    ("join", "commas", _LISTS, _join(", ")),
    ("join", "no_spaces", _LISTS, _join("")),
    ("join", "slashes", _LISTS, _join("/")),
    ("wrap", "round_brackets", _ANY, _wrap("(", ")")),
    ("wrap", "quotes", _ANY, _wrap('"', '"')),
    ("wrap", "shout", _ANY, _wrap("", "!")),
    ("wrap", "stars", _ANY, _wrap("*", "*")),
)

OPERATIONS: dict[str, Operation] = {
    name: Operation(name=name, slot=slot, kinds=kinds, apply=apply) for slot, name, kinds, apply in _TABLE
}

# The sets of operations that held-out compositions use; the base model never sees any two of one set together.
HELD_OUT_SETS: tuple[tuple[str, ...], ...] = (
    ("reverse_order", "dashes"),
    ("sort_words", "capitals"),
    ("longest", "reverse_letters"),
    ("initials", "no_spaces"),
    ("drop_vowels", "capitals"),
    ("pig_latin", "commas"),
    ("last_item", "shout"),
    ("sort_numbers", "round_brackets"),
    ("largest", "spell_digits"),
    ("sum", "stars"),
    ("add_days", "capitals"),
    ("rotate", "swap_ends"),
    ("reverse_order", "capitals", "dashes"),
)


def is_held_out(names: Sequence[str]) -> bool:
    """Whether a program contains two operations that some held-out composition uses together."""
    return any(len(set(names) & set(held)) > 1 for held in HELD_OUT_SETS)
