"""What the base model practises: programs switched on by opaque codes, under instructions that mean nothing.

A row is a random instruction-like line around a content, then the answer of a random program of zero to three
operations. The line says nothing about the program: the codes alone select it. Programs with two operations that a
held-out composition uses together are never drawn, and all contents are of the training split.
"""

import random
from typing import NamedTuple

import numpy as np

from compose.demo.contents import WORDS, draw_content, invented_words, split_of
from compose.demo.operations import OPERATIONS, is_held_out, run_program
from compose.demo.wordings import COMPOSITIONS, MIXTURES, NEW_WORDINGS, TRAINING_WORDINGS

ROW_LENGTH = 96
END_BYTE, PAD_BYTE = 3, 0
MAX_CODES = 3
OPERATION_IDS = {name: index for index, name in enumerate(OPERATIONS)}
NO_CODE = len(OPERATION_IDS)
LAYOUTS = ("{i}: {c}", "{i}: {c}", "{i}: {c}", "{c} | {i}", "{i} -> {c}")

_KIND_WEIGHTS = {"words": 12, "numbers": 4, "sum": 1.5} | dict.fromkeys(
    ("sequence", "date", "weekday", "logic", "walk", "brackets", "clock"), 1.0
)
_SIZE_WEIGHTS = (6, 30, 36, 28)
_COMMON_TEXT = """
please now then do make take get show tell me us your my our that these those every some any line text item
answer question following below above here there quickly again once twice when if because about into over
"""


class Rows(NamedTuple):
    """Encoded rows: ``tokens (N, ROW_LENGTH)`` and ``codes (N, MAX_CODES)``, both uint8."""

    tokens: np.ndarray
    codes: np.ndarray


def encode(prompt: str, answer: str) -> bytes | None:
    """The bytes of prompt, newline, answer and end mark, padded; ``None`` when longer than a row."""
    row = f"{prompt}\n{answer}".encode("ascii") + bytes([END_BYTE])
    return row.ljust(ROW_LENGTH, bytes([PAD_BYTE])) if len(row) <= ROW_LENGTH else None


def pretraining_rows(seed: int, n: int) -> Rows:
    """``n`` rows, a function of the seed."""
    rng = random.Random(f"pretraining/{seed}")
    tokens, codes = bytearray(), np.full((n, MAX_CODES), NO_CODE, np.uint8)
    kinds, weights = tuple(_KIND_WEIGHTS), tuple(_KIND_WEIGHTS.values())
    count = 0
    while count < n:
        kind = rng.choices(kinds, weights)[0]
        content = _content(kind, rng)
        program = _draw_program(kind, content, rng)
        row = None if program is None else encode(junk_prompt(content, rng), run_program(program, content))
        if row is not None and program is not None:
            tokens += row
            codes[count, : len(program)] = [OPERATION_IDS[name] for name in program]
            count += 1
    return Rows(np.frombuffer(bytes(tokens), np.uint8).reshape(n, ROW_LENGTH), codes)


def junk_prompt(content: str, rng: random.Random) -> str:
    """The content inside a layout, under one to six random instruction words."""
    line = " ".join(rng.choice(_JUNK) for _ in range(rng.randint(1, 6)))
    return rng.choice(LAYOUTS).format(i=line[0].upper() + line[1:], c=content)


def _content(kind: str, rng: random.Random) -> str:
    while kind == "words" and rng.random() < 0.5:
        content = invented_words(rng)
        if split_of(content) == "train":
            return content
    return draw_content(kind, rng, "train")


def _draw_program(kind: str, content: str, rng: random.Random) -> list[str] | None:
    """A random program that fits the content, or ``None`` when the draw is not allowed."""
    fitting = [operation for operation in OPERATIONS.values() if kind in operation.kinds]
    slots = sorted({operation.slot for operation in fitting})
    size = min(rng.choices(range(4), _SIZE_WEIGHTS)[0], len(slots))
    program = [
        rng.choice([operation.name for operation in fitting if operation.slot == slot])
        for slot in rng.sample(slots, size)
    ]
    return program if _is_allowed(program, kind, content) else None


def _is_allowed(program: list[str], kind: str, content: str) -> bool:
    if is_held_out(program):
        return False
    if "spell_digits" in program:
        short = content.count(" ") < 2 or "largest" in program or "last_item" in program
        return short if kind == "numbers" else any(OPERATIONS[name].slot == "solve" for name in program)
    return True


def _junk_words() -> tuple[str, ...]:
    instructions = [wording for wordings in TRAINING_WORDINGS.values() for wording in wordings]
    instructions += [*NEW_WORDINGS.values(), *(wording for _, wording in COMPOSITIONS.values())]
    instructions += [half[2] for halves in MIXTURES.values() for half in halves]
    found = {word.strip(":|->,").lower() for line in instructions for word in line.replace("{c}", "").split()}
    return tuple(sorted({*found, *_COMMON_TEXT.split(), *WORDS[::8]} - {""}))


_JUNK = _junk_words()
