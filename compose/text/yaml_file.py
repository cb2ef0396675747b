"""YAML without its traps: at most 1 MiB and 64 levels, no duplicate keys, no aliases, no objects; keys are text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from compose.errors import ComposeError

MOST_BYTES = 2**20
MOST_LEVELS = 64


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the mapping of a YAML (or JSON) file; ``1e-3`` is a number in it.

    Raises:
        ComposeError: No such file, too large, not YAML, more than one document, an alias, a duplicate key, a key that
            is not text, a tag, or no mapping.
    """
    if not file.is_file():
        raise ComposeError(f"{file}: no such file; give a recipe, a YAML file of keys and values")
    if file.stat().st_size > MOST_BYTES:
        raise ComposeError(f"{file}: {file.stat().st_size} bytes; a recipe has at most {MOST_BYTES}")
    found = parse_yaml(file.read_bytes(), f"{file}: not a recipe")
    if not isinstance(found, dict):
        kind = "nothing" if found is None else type(found).__name__
        raise ComposeError(f"{file}: a recipe is a mapping of keys to values, got {kind}")
    return found


def parse_yaml(data: bytes, where: str) -> Any:
    """Return the value of one YAML document, whatever it is.

    Args:
        data: UTF-8, at most `MOST_BYTES`.
        where: What the bytes are and what is wrong with them if they cannot be read, the beginning of the message.

    Raises:
        ComposeError: Too large, nested too deeply, or anything of `read_yaml`.
    """
    if len(data) > MOST_BYTES:
        raise ComposeError(f"{where}: {len(data)} bytes, at most {MOST_BYTES}")
    try:
        return yaml.load(data.decode("utf-8"), Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        raise ComposeError(f"{where}: {' '.join(str(error).split())}") from None
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ComposeError(f"{where}: {error}") from None


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
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "aliases (*name) are not allowed; write the value out", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

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


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
