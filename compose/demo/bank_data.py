"""Training rows of each adapter: its own task under its three wordings, some under instructions that mean nothing.

The meaningless instructions teach an adapter that its skill does not hang on particular words; that is what carries
it to a new wording and into a composition.
"""

import random

import numpy as np

from compose.demo.pretraining_data import ROW_LENGTH, encode, junk_prompt
from compose.demo.tasks import TASKS, draw_program, upstream_kinds

JUNK_SHARE = 0.35


def adapter_rows(name: str, seed: int, n: int) -> np.ndarray:
    """``(n, ROW_LENGTH)`` uint8 rows for the adapter of this name, a function of name and seed."""
    rng = random.Random(f"adapter/{name}/{seed}")
    bare = draw_program((name,), upstream_kinds(name), ("{c}",))
    rows: list[bytes] = []
    while len(rows) < n:
        if rng.random() < JUNK_SHARE:
            content, answer = bare(rng, "train")
            row = encode(junk_prompt(content, rng), answer)
        else:
            row = encode(*TASKS[name].draw(rng, "train"))
        if row is not None:
            rows.append(row)
    return np.frombuffer(b"".join(rows), np.uint8).reshape(n, ROW_LENGTH)
