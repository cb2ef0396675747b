"""YAML without its traps: small, at most 64 levels, no duplicate keys, no aliases, no tags; keys are text.

Reading YAML takes 10 microseconds a byte, so that only JSON may have 1 MiB; a number has at most 100 characters and
fits into 64 bits or float64.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from compose.errors import AdapterFormatError, ComposeError
from compose.files.paths import is_file
from compose.files.strict_json import parse_object

MOST_BYTES = 2**20
"""Of JSON, which is read as such."""

MOST_YAML_BYTES = 2**16
MOST_LEVELS = 64
MOST_DIGITS = 100


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the mapping of a YAML (or JSON) file; ``1e-3`` is a number in it.

    Raises:
        ComposeError: No such file, too large, not YAML, more than one document, an alias, a duplicate key, a key that
            is not text, a tag, a number beyond 64 bits or float64, or no mapping.
    """
    if not is_file(file):
        raise ComposeError(f"{file}: no such file; give a recipe, a YAML file of keys and values")
    if file.stat().st_size > MOST_BYTES:
        raise ComposeError(f"{file}: {file.stat().st_size} bytes; a recipe must have at most {MOST_BYTES}")
    found = parse_yaml(file.read_bytes(), f"{file}: not a recipe")
    if not isinstance(found, dict):
        kind = "nothing" if found is None else type(found).__name__
        raise ComposeError(f"{file}: a recipe is a mapping of keys to values, got {kind}")
    return found


def parse_yaml(data: bytes, where: str) -> Any:
    """Return the value of one YAML document, whatever it is.

    Args:
        data: UTF-8, at most `MOST_YAML_BYTES`; a JSON object at most `MOST_BYTES`.
        where: What the bytes are and what is wrong with them if they cannot be read, the beginning of the message.

    Raises:
        ComposeError: Too large, nested too deeply, or anything of `read_yaml`.
    """
    if len(data) > MOST_BYTES:
        raise ComposeError(f"{where}: {len(data)} bytes; at most {MOST_BYTES} are allowed")
    if data.lstrip()[:1] == b"{":
        with suppress(AdapterFormatError):  # else it is a mapping in YAML's own braces
            return _bounded(parse_object(data, where), where)
    if len(data) > MOST_YAML_BYTES:
        raise ComposeError(
            f"{where}: {len(data)} bytes of YAML; at most {MOST_YAML_BYTES} are allowed; write it as JSON"
        )
    try:
        return yaml.load(data.decode("utf-8"), Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        raise ComposeError(f"{where}: {' '.join(str(error).split())}; fix the file") from None
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ComposeError(f"{where}: {error}; fix the file") from None


def _bounded(value: Any, where: str) -> Any:
    """Return a value of JSON, whose levels are bounded, with the numbers that YAML may have too."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _bounded(item, where)
    elif type(value) is int and not _fits(value):
        raise ComposeError(f"{where}: a number of {value.bit_length()} bits; only 64 are allowed")
    return value


def _fits(number: int) -> bool:
    return -(2**63) <= number < 2**64


class _RecipeLoader(yaml.SafeLoader):
    """PyYAML's safe loader, stricter."""

    levels = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.levels == MOST_LEVELS:
            raise yaml.composer.ComposerError(
                None, None, f"nested more than {MOST_LEVELS} levels deep", self.peek_event().start_mark
            )
        self.levels += 1
        try:
            return self._compose_node(parent, index)
        finally:
            self.levels -= 1

    def _compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "aliases (*name) are not allowed; write the value out", event.start_mark
            )
        if event.tag is not None:
            raise yaml.composer.ComposerError(None, None, f"tags ({event.tag}) are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_number(self, node: Any) -> Any:
        """A number that every later step can compute with and show."""
        whole = node.tag.endswith("int")
        if len(node.value) <= MOST_DIGITS:
            number = self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)
            if _fits(number) if whole else math.isfinite(number):
                return number
        raise yaml.constructor.ConstructorError(
            None,
            None,
            f"the number {node.value[:40]!r} is beyond {'64 bits' if whole else 'float64'}",
            node.start_mark,
        )

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} reads as {name!r}; put it in quotes", key.start_mark
                )
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {name!r}", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


for _kind in ("int", "float"):
    _RecipeLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _RecipeLoader.construct_number)
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
