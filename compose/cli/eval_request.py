"""What ``compose eval`` was asked for, checked together before anything heavy is loaded."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compose.errors import ComposeError

if TYPE_CHECKING:
    from compose.routers.recipe import TrainRecipe

MIXTURE, RECIPE, SUMMARY, HISTORY = "mixture.json", "recipe.json", "train.json", "history.jsonl"
SEEDS = (0, 1, 2)


class RouterFolder(NamedTuple):
    """A trained router.

    Attributes:
        folder: Of ``routed.save`` or ``compose train``.
        name: In the table.
        seed: It was trained with, or its number among those of its name.
        trained: Parameters that were trained; None: not known.
    """

    folder: Path
    name: str
    seed: int
    trained: int | None


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """One call.

    Attributes:
        base: Base model.
        bank: Folders of adapters.
        routers: In order.
        data: Records that are scored.
        choose: Records that choose.
        train: Records of the one LoRA.
        columns: Field of a record -> column.
        device: Where to run.
        dtype: Of the base model.
        merges: Merge methods.
        merge_rank: Rank of their results.
        ablations: Whether they are scored.
        recipe: How the one LoRA is trained; None: there is none, or ``steps`` say it.
        steps: Of its one stage, instead of the recipe's.
        learning_rate: Of the one LoRA; None: its stages'.
        seeds: Of the one LoRA.
        out: Folder of the result.
        resume: Continue what is unfinished.
        force: Replace what is there.
        dry_run: Only plan.
    """

    base: str
    bank: tuple[Path, ...]
    routers: tuple[RouterFolder, ...]
    data: tuple[Path, ...]
    choose: tuple[Path, ...]
    train: tuple[Path, ...]
    columns: Mapping[str, str]
    device: str
    dtype: str
    merges: tuple[str, ...]
    merge_rank: int
    ablations: bool
    recipe: TrainRecipe | None
    steps: int | None
    learning_rate: float | None
    seeds: tuple[int, ...]
    out: Path | None
    resume: bool
    force: bool
    dry_run: bool

    @classmethod
    def read(cls, **given: Any) -> EvalRequest:
        """Return the request of the command's options.

        Raises:
            ComposeError: Options or files that are missing or do not fit; all of them are listed.
        """
        from compose.cli.train_request import read_columns

        if problems := _problems(given):
            raise ComposeError("; ".join(problems))
        routers = router_folders(given["router"])
        recipe = _recipe(given["recipe"], routers[0].folder) if given["train"] else None
        if given["train"] and recipe is None and given["steps"] is None:
            raise ComposeError(
                f"--train: {routers[0].folder} has no {RECIPE} that says how; give --recipe FILE or --steps N"
            )
        values: dict[str, Any] = {name: given[name] for name in cls.__dataclass_fields__ if name in given}
        values |= {name: tuple(given[name] or ()) for name in ("bank", "data", "choose", "train")}
        values |= {"routers": routers, "recipe": recipe, "merges": _merges(given["merges"])}
        return cls(**values, columns=read_columns(given["column"] or ()), seeds=tuple(given["seed"] or SEEDS))

    def resume_command(self, arguments: Sequence[str]) -> str:
        """Return what to tell a person whose comparison was interrupted.

        Args:
            arguments: The command line after ``compose``.
        """
        partial = None if self.out is None else self.out.with_name(self.out.name + ".partial")
        if partial is None or not partial.exists():
            return "interrupted before the first row; nothing was saved"
        kept = [word for word in arguments if word not in ("--resume", "--force")]
        again = shlex.join(["compose", *kept, "--resume"])
        return f"interrupted; finished rows are in {partial}. Resume with:\n  {again}"


def router_folders(paths: Sequence[Path]) -> tuple[RouterFolder, ...]:
    """Return the routers of some folders; those trained alike, the seed aside, get one name.

    Raises:
        ComposeError: A folder holds no router, is damaged, or two are the same contender with the same seed.
    """
    from compose.routers.saved_file import read_mixture

    groups: dict[str, list[tuple[Path, int | None, int | None]]] = {}
    presets: dict[str, str] = {}
    for folder in [one for path in paths for one in _expanded(path)]:
        spec = read_mixture(folder).spec.to_json()
        summary, recipe = _json(folder / SUMMARY), _json(folder / RECIPE)
        about = {name: value for name, value in recipe.items() if name not in ("seeds", "out")}
        key = json.dumps([spec, about], sort_keys=True)
        presets[key] = str(spec["preset"]) or folder.name
        counts = summary.get("trained_parameters")
        trained = sum(counts.values()) if isinstance(counts, dict) else None
        groups.setdefault(key, []).append((folder, summary.get("seed"), trained))
    names = list(presets.values())
    found = []
    for key, members in groups.items():
        several = names.count(presets[key]) > 1
        name = f"{presets[key]} ({members[0][0]})" if several else presets[key]
        found += [
            RouterFolder(folder, name, number if seed is None else int(seed), trained)
            for number, (folder, seed, trained) in enumerate(members)
        ]
    _check_differ(found)
    return tuple(found)


def _check_differ(routers: Sequence[RouterFolder]) -> None:
    places: dict[tuple[str, int], Path] = {}
    for router in routers:
        key = router.name, router.seed
        if key in places:
            raise ComposeError(
                f"--router: {places[key]} and {router.folder} are both {router.name!r} trained alike with seed "
                f"{router.seed}; leave one of them"
            )
        places[key] = router.folder


def _expanded(path: Path) -> list[Path]:
    """The folder itself, or the runs of several seeds in it."""
    if (path / MIXTURE).is_file():
        return [path]
    runs = sorted(file.parent for file in path.glob(f"seed-*/{MIXTURE}"))
    if not runs:
        raise ComposeError(f"--router: {path} holds no {MIXTURE}; give the folder of a trained router")
    return runs


def _json(file: Path) -> dict[str, Any]:
    """The object in a file of a run folder; empty where there is none: mixtures may be saved without a run."""
    from compose.files.strict_json import parse_object

    return parse_object(file.read_bytes(), file) if file.is_file() else {}


def _problems(given: Mapping[str, Any]) -> list[str]:
    needed = {"base": "--base MODEL", "router": "--router DIR", "data": "--data FILE, the records that are scored"}
    problems = [f"missing {words}" for name, words in needed.items() if not given[name]]
    if given["out"] is None and not given["dry_run"]:
        problems.append("missing --out DIR, where rows and report go (or --dry-run)")
    for name in ("data", "choose", "train"):
        problems += [f"--{name}: no such file or folder: {path}" for path in given[name] or () if not path.exists()]
    problems += [f"--bank: no such folder: {path}" for path in given["bank"] or () if not path.is_dir()]
    if given["resume"] and given["force"]:
        problems.append("--resume continues a comparison, --force starts again; give one of them")
    if given["resume"] and given["dry_run"]:
        problems.append("--dry-run scores nothing, so there is nothing to --resume")
    if given["recipe"] is not None and given["steps"] is not None:
        problems.append("--recipe says the steps of the one LoRA; leave out --steps")
    only = [f"--{name.replace('_', '-')}" for name in ("recipe", "steps", "learning_rate", "seed") if given[name]]
    if only and not given["train"]:
        problems.append(f"{', '.join(only)} is for the one LoRA, which needs --train FILE")
    seeds = given["seed"] or SEEDS
    if len(set(seeds)) != len(seeds):
        problems.append(f"seeds must differ, got {list(seeds)}")
    rate = given["learning_rate"]
    if rate is not None and not 0 < rate < float("inf"):
        problems.append(f"--learning-rate must be a number > 0, got {rate}")
    return problems


def _merges(text: str | None) -> tuple[str, ...]:
    """The methods of ``--merges``.

    Raises:
        UnknownNameError: No such method.
        ComposeError: None is named.
    """
    from compose.evaluation.merges import MERGES
    from compose.merging.method import METHODS

    if text is None or text.strip() == "none":
        return tuple(MERGES) if text is None else ()
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ComposeError("--merges names none; give names with commas (compose merge --list), or none")
    for name in names:
        METHODS[name]
    return names


def _recipe(file: Path | None, folder: Path) -> TrainRecipe | None:
    """How the one LoRA is trained: a recipe that was given, or the first router's."""
    from compose.routers.recipe import read_recipe

    if file is None and not (folder / RECIPE).is_file():
        return None
    return read_recipe(folder / RECIPE if file is None else file)
