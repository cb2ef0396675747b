"""Twelve regular expressions that backtrack for ever, in every field of a configuration that may hold one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.hostile.adapters import ALPHA, RANK, files_of, lora_tensors, write
from tests.hostile.figures import Figures
from tests.hostile.loading import load

MOST_SECONDS = 0.05

EXPRESSIONS = (
    "(([a-z0-9_.])+)+X",
    "(a+)+$",
    "([a-zA-Z]+)*X",
    "(a|aa)+$",
    "(a|a?)+X",
    "(.*a){25}X",
    "(.*)*X",
    "^(([a-z])+.)+[A-Z]([a-z])+$",
    "(m|.)*(l|.)*(q|.)*X",
    "((m\\.)?layers\\.?)*(.|q)*X",
    "(?:(?:(?:.?)*)*)*X",
    "(\\w+\\.?)+:",
)
FIELDS: dict[str, Any] = {
    "target_modules": lambda expression: {"target_modules": expression},
    "rank_pattern": lambda expression: {"rank_pattern": {expression: RANK}},
    "alpha_pattern": lambda expression: {"alpha_pattern": {expression: ALPHA}},
    "layers_pattern": lambda expression: {"layers_pattern": [expression], "layers_to_transform": [0]},
}


def run(folder: Path) -> Figures:
    """Load a sound adapter under every expression in every field; each is harmless, and accepted."""
    figures = Figures("S5")
    write(folder, files_of(lora_tensors()))
    load(folder)
    for field, make in FIELDS.items():
        for expression in EXPRESSIONS:
            write(folder, files_of(lora_tensors(), **make(expression)))
            figures.case(f"{field}: {expression}", lambda: load(folder))
    return figures
