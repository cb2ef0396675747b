"""10 recipes of merges and files of examples: YAML, JSON and JSONL."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from compose.text.examples import read_examples
from tests.hostile.adapters import files_of, lora_tensors, write
from tests.hostile.handmade import Case
from tests.hostile.recipes import merge_recipe


def _recipe(name: str, text: str | Callable[[], str], reason: str, file: str = "recipe.yaml") -> Case:
    """A case of a recipe beside a bank of one sound adapter."""

    def make(folder: Path) -> Path:
        (folder / "bank").mkdir()
        write(folder / "bank" / "one", files_of(lora_tensors()))
        (folder / file).write_text("bank: bank\n" + (text if isinstance(text, str) else text()))
        return folder / file

    return Case(name, make, reason, merge_recipe)


def _alias_bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 10)]
    return "\n".join(lines)


def _written(folder: Path) -> Path:
    """A ``merge.json`` with a weight beyond every float."""
    (folder / "bank").mkdir()
    write(folder / "bank" / "one", files_of(lora_tensors()))
    record = {"method": "sum", "parents": [{"name": "one", "weight": 10**400}]}
    (folder / "merge.json").write_text(json.dumps(record))
    return folder / "merge.json"


def _with_bank(file: Path) -> object:
    return merge_recipe(file, bank=file.parent / "bank")


def _examples(folder: Path) -> Path:
    lines = ['{"input": ' + "[" * 100_000, '{"input": "\\ud800", "output": "a"}', '{"input": NaN, "output": "a"}']
    (folder / "examples.jsonl").write_text("\n".join([*lines, '{"input": ' + "9" * 5000 + "}"]))
    return folder / "examples.jsonl"


TEXTS = [
    _recipe("aliases that expand to 9^9 values", _alias_bomb, "aliases .* are not allowed"),
    _recipe("brackets nested 3,000 times", "weights: " + "[" * 3000, "nested"),
    _recipe("a key twice", "seed: 1\nseed: 2", "duplicate key 'seed'"),
    _recipe("a tag that calls a function", "method: !!python/object/apply:os.system [ls]", "tag"),
    _recipe("2 MiB", lambda: "#" * 2**21, "must have at most"),
    _recipe("a tag that does not fit its value", "report: !!bool x", "tag"),
    _recipe("a number in base 60 of 20,000 digits", lambda: "seed: 1" + ":11" * 20_000, "seed|number"),
    _recipe("a number of 40,000 hexadecimal digits", lambda: "rank: 0x" + "f" * 40_000, "number"),
    Case("a written recipe with a weight of 10^400", _written, "number of 1329 bits", _with_bank),
    Case("examples nested, no text, no numbers", _examples, "not valid JSON", read_examples),
]
