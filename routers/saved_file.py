"""The files of a saved mixture as values, checked: strict JSON, safetensors whose every tensor has its place.

Shape letters: ``r`` rank of one expert, ``D`` in, ``O`` out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compose.adapter import Adapter, LowRank
from compose.errors import AdapterFormatError, ComposeError, IncompatibleError
from compose.files import safetensors_file
from compose.files.strict_json import parse_object
from compose.routers.spec import MixtureSpec

FORMAT, VERSION = "compose-mixture", 1
MIXTURE, ROUTER, EXPERTS = "mixture.json", "router.safetensors", "experts.safetensors"
MAX_JSON_BYTES = 64 * 2**20


@dataclass(frozen=True)
class SavedMixture:
    """What a folder holds.

    Attributes:
        folder: Where it was read.
        spec: The mixture.
        experts: Names, in order.
        routed: Targets with gates, in module order.
        targets: Target -> (input width, output width), of the whole bank.
        tasks: Names, in the order of task ids.
        clusters: Number of clusters.
        text_features: Width of text embeddings.
        base: What the bank or the model said its base is.
        hashes: Expert -> sha256 of its weight file; empty where the experts are in the folder.
        state: Name -> tensor, of router and mixer.
        factors: Expert -> target -> factors; None where the experts are the adapters of a bank.
    """

    folder: Path
    spec: MixtureSpec
    experts: tuple[str, ...]
    routed: tuple[str, ...]
    targets: Mapping[str, tuple[int, int]]
    tasks: tuple[str, ...]
    clusters: int
    text_features: int
    base: str
    hashes: Mapping[str, str]
    state: Mapping[str, torch.Tensor]
    factors: Mapping[str, Mapping[str, LowRank]] | None

    def adapters(self) -> list[Adapter]:
        """The experts in the folder, as adapters of a bank.

        Raises:
            IncompatibleError: The folder has none: the mixture stands over a bank.
        """
        if self.factors is None:
            raise IncompatibleError(
                f"{self.folder}: this mixture stands over a bank; give the bank of {list(self.experts)}"
            )
        return [Adapter(name, self.base, self.factors[name]) for name in self.experts]


def read_mixture(folder: str | Path) -> SavedMixture:
    """Read the files of a mixture, checked.

    Raises:
        AdapterFormatError: A file is missing, damaged or hostile, or belongs to another mixture.
    """
    folder = Path(folder)
    if not (folder / MIXTURE).is_file():
        raise AdapterFormatError(f"{folder}: no {MIXTURE}; give the folder of a saved mixture")
    where = folder / MIXTURE
    found = parse_object(safetensors_file.read_bytes(where, max_bytes=MAX_JSON_BYTES), where)
    if found.get("format") != FORMAT or found.get("version") != VERSION:
        raise AdapterFormatError(
            f"{where}: format {found.get('format')!r:.60} version {found.get('version')!r:.20}; "
            f"this program reads {FORMAT} version {VERSION}"
        )
    _check_fields(found, where)
    tensors = {name: _read_tensors(folder / name, digest) for name, digest in found["files"].items()}
    experts = tuple(found["experts"])
    targets = {target: (widths[0], widths[1]) for target, widths in found["targets"].items()}
    table = found["factors"]
    return SavedMixture(
        folder=folder,
        spec=_spec(found["spec"], where),
        experts=experts,
        routed=tuple(found["routed"]),
        targets=targets,
        tasks=tuple(found["tasks"]),
        clusters=found["clusters"],
        text_features=found["text_features"],
        base=found["base"],
        hashes=found["hashes"],
        state=tensors.get(ROUTER, {}),
        factors=None
        if table is None
        else _factors(table, experts, targets, tensors.get(EXPERTS, {}), folder / EXPERTS),
    )


def _read_tensors(path: Path, digest: str) -> dict[str, torch.Tensor]:
    content = safetensors_file.load(path)
    if content.sha256 != digest:
        raise AdapterFormatError(
            f"{path}: not the file that {MIXTURE} names (sha256 {content.sha256[:12]}..., expected {digest[:12]}...); "
            "the folder was changed or mixed from two"
        )
    return content.tensors


def _factors(
    table: Mapping[str, Mapping[str, Sequence[Any]]],
    experts: Sequence[str],
    targets: Mapping[str, tuple[int, int]],
    tensors: Mapping[str, torch.Tensor],
    path: Path,
) -> dict[str, dict[str, LowRank]]:
    """The experts of a table of ranks and scalings; every tensor has its place, and every place a tensor."""
    found: dict[str, dict[str, LowRank]] = {}
    left = dict(tensors)
    for name in experts:
        found[name] = {}
        for target, (rank, scaling) in table[name].items():
            width, out = targets[target]
            wanted = {"a": (rank, width), "b": (out, rank)}
            factors = {}
            for factor, shape in wanted.items():
                empty = torch.zeros(shape) if not rank else None
                value = left.pop(f"{name}:{target}:{factor}", empty)
                if value is None or value.shape != shape:
                    state = "missing" if value is None else f"{tuple(value.shape)}, not {shape}"
                    raise AdapterFormatError(f"{path}: {name}:{target}:{factor} is {state}")
                factors[factor] = value
            found[name][target] = LowRank(factors["a"], factors["b"], float(scaling))
    if left:
        raise AdapterFormatError(f"{path}: {sorted(left)[0]} belongs to no expert of {MIXTURE}")
    return found


def _spec(plain: Any, where: Path) -> MixtureSpec:
    try:
        return MixtureSpec.from_json(plain)
    except ComposeError as error:
        raise AdapterFormatError(f"{where}: {error}") from error
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise AdapterFormatError(f"{where}: the specification has a value of a wrong kind: {error}") from error


def _check_fields(found: Mapping[str, Any], where: Path) -> None:
    problems = [f"{name} must be {words}" for name, (fits, words) in _FIELDS.items() if not fits(found.get(name))]
    problems += [
        f"{name!r:.60} is no field" for name in found if name not in _FIELDS and name not in ("format", "version")
    ]
    if not problems:
        experts, targets = found["experts"], found["targets"]
        problems += ["experts are named twice"] * (len(set(experts)) != len(experts))
        problems += ["routed names what targets does not"] * (not set(found["routed"]) <= set(targets))
        problems += ["files may be router.safetensors and experts.safetensors"] * (
            not set(found["files"]) <= {ROUTER, EXPERTS}
        )
        problems += ["hashes must name the experts, or none"] * (
            bool(found["hashes"]) and set(found["hashes"]) != set(experts)
        )
        if found["factors"] is not None:
            named = set(found["factors"]) == set(experts)
            inside = all(set(one) <= set(targets) for one in found["factors"].values())
            problems += ["factors must name the experts and their targets"] * (not (named and inside))
    if problems:
        raise AdapterFormatError(f"{where}: {'; '.join(problems)}")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _mapping(value: Any, inner: Any) -> bool:
    return isinstance(value, dict) and all(inner(item) for item in value.values())


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_count(item) for item in value)


def _rank_and_scaling(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _count(value[0]) and type(value[1]) in (int, float)


_FIELDS = {
    "spec": (lambda value: isinstance(value, dict), "an object"),
    "experts": (lambda value: _texts(value) and bool(value), "a list of names"),
    "routed": (lambda value: _texts(value) and bool(value), "a list of paths"),
    "targets": (lambda value: _mapping(value, _pair), "an object of [input width, output width]"),
    "tasks": (_texts, "a list of names"),
    "clusters": (_count, "a number >= 0"),
    "text_features": (_count, "a number >= 0"),
    "base": (lambda value: isinstance(value, str), "text"),
    "hashes": (lambda value: _mapping(value, lambda item: isinstance(item, str)), "an object of hashes"),
    "factors": (
        lambda value: value is None or _mapping(value, lambda one: _mapping(one, _rank_and_scaling)),
        "null or an object of [rank, scaling] by expert and target",
    ),
    "files": (lambda value: _mapping(value, lambda item: isinstance(item, str)), "an object of hashes"),
}
