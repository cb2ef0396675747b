"""Recipes of ``compose train``: one YAML (or JSON) file, options of the command line above it.

Keys are the fields of `TrainRecipe`; paths in a file are relative to its folder::

    preset: meteora
    options: {top_k: 2}
    base: ../model
    bank: ../bank
    data: [mixed.jsonl]
    columns: {prompt: question, response: answer}
    out: run
    seeds: [0, 1, 2]
    sampling: {by: sqrt, batch: homogeneous}
    batch_size: 16
    stages:
      - {name: router, train: router, steps: 300, learning_rate: 1e-3, schedule: cosine, warmup: 30}
      - {name: joint, train: both, steps: 100, learning_rate: 1e-4}

A run of one stage may leave ``stages`` out and give the keys of a stage (`SINGLE_STAGE`) at the top.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from compose.errors import ComposeError, unknown_name
from compose.routers.collate import Truncate
from compose.routers.records import check_columns
from compose.routers.sampling import Sampling
from compose.routers.stages import Stage, check_stages
from compose.text.yaml_file import read_yaml

Precision = Literal["float32", "bfloat16"]

SINGLE_STAGE = (
    "train", "steps", "epochs", "learning_rate", "expert_learning_rate", "schedule", "warmup", "final"
)  # fmt: skip
"""Keys of a stage that may stand at the top, for a run of one stage; without steps and epochs it is one epoch."""

_PATHS = ("bank", "data", "out")
_MERGED = ("options", "columns", "sampling")


@dataclass(frozen=True, kw_only=True)
class TrainRecipe:
    """One training run as asked for.

    Attributes:
        preset: Name of the mixture.
        base: Folder of the base model, or its name on a hub.
        data: JSONL files or folders of mixed-task records.
        bank: Folders of adapters; empty where the mixture makes its own experts.
        options: The preset's.
        columns: Field of a record -> column; see `compose.routers.records.read_mixed`.
        out: Folder of the result.
        seeds: One run for each.
        stages: One after the other; empty: as the preset says.
        sampling: Of stages that say nothing else; so are the next two.
        batch_size: Records per step, of all processes.
        accumulation: Micro-batches per step.
        max_length: Most tokens of a record; None: no limit.
        truncate: What to do with longer ones: ``"refuse"`` or ``"prompt_left"``.
        precision: Of the base model's weights and activations.
    """

    preset: str
    base: str
    data: tuple[Path, ...]
    bank: tuple[Path, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    out: Path | None = None
    seeds: tuple[int, ...] = (0,)
    stages: tuple[Stage, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    batch_size: int = 16
    accumulation: int = 1
    max_length: int | None = None
    truncate: Truncate = "refuse"
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        problems = []
        if self.batch_size < 1 or self.accumulation < 1 or self.batch_size % self.accumulation:
            problems.append(
                "batch_size must be a multiple of accumulation, both at least 1; "
                f"got {self.batch_size} and {self.accumulation}"
            )
        if self.max_length is not None and self.max_length < 2:
            problems.append(f"max_length must be at least 2, got {self.max_length}")
        if len(set(self.seeds)) != len(self.seeds):
            problems.append(f"seeds must differ, got {list(self.seeds)}")
        try:
            check_columns(self.columns)
        except ComposeError as error:
            problems.append(str(error))
        try:
            check_stages(self.stages, empty=True)
        except ComposeError as error:
            problems.append(str(error))
        if problems:
            raise ComposeError("; ".join(problems))

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as plain values, paths absolute; written to a file it reads back as the same run."""
        plain = {name: value for name, value in asdict(self).items() if value not in (None, ())}
        for name in _PATHS:
            if name in plain:
                given = plain[name]
                plain[name] = str(given.absolute()) if name == "out" else [str(one.absolute()) for one in given]
        if Path(self.base).exists():
            plain["base"] = str(Path(self.base).absolute())
        plain["sampling"] = _said(plain["sampling"])
        if self.stages:
            plain["stages"] = [_said(stage) for stage in plain["stages"]]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def read_recipe(
    file: Path | None, given: Mapping[str, Any] | None = None, *, presets: Collection[str] | None = None
) -> TrainRecipe:
    """Return the recipe of a file with the values of the command line above it.

    Args:
        file: YAML or JSON; None: there is only ``given``.
        given: Keys of a recipe, None for those not given. ``options``, ``columns`` and ``sampling`` are added to the
            file's, name by name; everything else replaces what the file says, and ``steps`` and ``epochs`` each other.
        presets: Names that are known, to tell a wrong one with the other problems; None: any.

    Raises:
        ComposeError: The file cannot be read, or keys or values are missing or not allowed; all of them are listed.
    """
    values = {} if file is None else _from_folder(read_yaml(file), file.parent)
    values = _overridden(values, {name: value for name, value in (given or {}).items() if value is not None})
    reader = _Reader()
    preset = values.get("preset")
    if presets is not None and isinstance(preset, str) and preset not in presets:
        reader.problems.append(unknown_name("preset", preset, sorted(presets)))
    recipe = reader.section(TrainRecipe, _with_stages(values, reader.problems), "", also=SINGLE_STAGE)
    if recipe is None or reader.problems:
        source = "" if file is None else f"{file}: "
        raise ComposeError(source + "; ".join(reader.problems))
    return recipe


def _from_folder(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Values of a file with its paths taken from its folder; what is no path is left for the reader to refuse."""
    found = {name: value for name, value in values.items() if value is not None}
    for name in _PATHS:
        value = found.get(name)
        if isinstance(value, str):
            found[name] = folder / value
        elif isinstance(value, list):
            found[name] = [folder / one if isinstance(one, str) else one for one in value]
    base = found.get("base")
    if isinstance(base, str) and ((folder / base).exists() or base.startswith((".", "/"))):
        found["base"] = str(folder / base)
    return found


def _overridden(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(values)
    for name, other in (("steps", "epochs"), ("epochs", "steps")):
        if name in given and other not in given:
            found.pop(other, None)
    for name, value in given.items():
        before = found.get(name)
        both = name in _MERGED and isinstance(before, Mapping) and isinstance(value, Mapping)
        found[name] = {**before, **value} if both and isinstance(before, Mapping) else value
    return found


def _with_stages(values: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Values with the keys of a single stage made into one."""
    single = {name: values[name] for name in SINGLE_STAGE if name in values}
    if not single:
        return dict(values)
    if "stages" in values:
        problems.append(f"stages say for themselves what the keys {', '.join(single)} say; leave these out")
        return {name: value for name, value in values.items() if name not in single}
    stage = {"name": "train", **({} if "steps" in single or "epochs" in single else {"epochs": 1}), **single}
    return {**{name: value for name, value in values.items() if name not in single}, "stages": [stage]}


class _Reader:
    """Makes dataclasses of plain values, collecting what is wrong with them."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def section(self, kind: type, values: Mapping[str, Any], place: str, also: Sequence[str] = ()) -> Any:
        """The instance of ``kind`` that ``values`` say; None, with problems, where there is none.

        ``also`` are further keys to name in suggestions.
        """
        before = len(self.problems)
        hints = get_type_hints(kind)
        inside = f"{place}." if place else ""
        named = {}
        for name, value in values.items():
            if name not in hints:
                self.problems.append((place and f"{place}: ") + unknown_name("key", name, [*hints, *also]))
            elif value is not None:
                named[name] = self._value(value, hints[name], inside + name)
        for each in fields(kind):
            required = each.default is MISSING and each.default_factory is MISSING
            if required and each.name not in named:
                self.problems.append(f"{inside}{each.name} is missing")
        if len(self.problems) > before:
            return None
        try:
            return kind(**named)
        except ComposeError as error:
            self.problems.append(f"{place}: {error}" if place else str(error))
            return None

    def _value(self, value: Any, hint: Any, place: str) -> Any:
        sections = [kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)]
        many = get_origin(hint) is tuple
        if sections and many and isinstance(value, list | tuple) and value:
            return tuple(self._part(each, sections[0], f"{place}[{number}]") for number, each in enumerate(value))
        if sections and not many:
            return self._part(value, sections[0], place)
        try:
            return _plain(value, hint)
        except TypeError:
            self.problems.append(f"{place} must be {_words(hint)}, got {_shown(value)}")
            return None

    def _part(self, value: Any, kind: Any, place: str) -> Any:
        if isinstance(value, kind):
            return value
        if isinstance(value, Mapping):
            return self.section(kind, value, place)
        self.problems.append(f"{place} must be a mapping of {', '.join(get_type_hints(kind))}; got {_shown(value)}")
        return None


def _plain(value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint``; a TypeError where it is of another."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _plain(value, next(part for part in parts if part is not type(None)))
    if origin is Literal and isinstance(value, str) and value in parts:
        return value
    if origin is tuple:
        items = list(value) if isinstance(value, list | tuple) else [value]
        if items:
            return tuple(_plain(item, parts[0]) for item in items)
    if origin is not None and isinstance(value, Mapping) and issubclass(origin, Mapping):
        return {_plain(name, parts[0]): _plain(item, parts[1]) for name, item in value.items()}
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint in (int, str) and isinstance(value, hint) and not isinstance(value, bool):
        return value
    raise TypeError


def _words(hint: Any) -> str:
    """What a value of a type is called."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _words(next(part for part in parts if part is not type(None)))
    if origin is Literal:
        return f"one of {', '.join(parts)}"
    if origin is tuple:
        many = {int: "integers", str: "texts", Path: "paths"}
        return f"a list of {many[parts[0]]}, or one" if parts[0] in many else "a list of mappings"
    if origin is not None:
        return "a mapping of names to values" if parts[1] is Any else "a mapping of names to names"
    return {int: "an integer", float: "a number", str: "text", Path: "a path"}[hint]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _said(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that say something, as plain values."""
    found = {name: value for name, value in values.items() if value not in (None, ())}
    return {
        name: _said(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value
        for name, value in found.items()
    }
