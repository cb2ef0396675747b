"""What ``compose train`` was asked for: recipe and options, checked together before anything heavy is loaded."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.errors import ComposeError

if TYPE_CHECKING:
    from compose.routers.preset_options import Configured
    from compose.routers.recipe import TrainRecipe


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """One call.

    Attributes:
        recipe: The run, from file and options.
        configured: The preset with its options.
        device: Where to train.
        checkpoint_every: Steps.
        resume: Continue what is unfinished.
        force: Replace what is there.
        dry_run: Only plan.
    """

    recipe: TrainRecipe
    configured: Configured
    device: str
    checkpoint_every: int
    resume: bool
    force: bool
    dry_run: bool

    @classmethod
    def read(cls, config: Path | None, given: Mapping[str, Any], **more: Any) -> TrainRequest:
        """Return the request of a recipe file and the values of the command line.

        Raises:
            ComposeError: Keys, values or files that are missing or not allowed; all of them are listed.
        """
        from compose.routers.preset_options import configured
        from compose.routers.presets.registry import PRESETS
        from compose.routers.recipe import read_recipe

        recipe = read_recipe(config, given, presets=list(PRESETS))
        request = cls(recipe=recipe, configured=configured(recipe.preset, recipe.options), **more)
        if problems := [*request._input_problems(), *request._output_problems()]:
            raise ComposeError("; ".join(problems))
        return request

    def folders(self) -> dict[int, Path]:
        """Seed -> folder of its run."""
        if self.recipe.out is None:
            return {}
        out, seeds = self.recipe.out, self.recipe.seeds
        return {seeds[0]: out} if len(seeds) == 1 else {seed: out / f"seed-{seed}" for seed in seeds}

    def resume_command(self, arguments: Sequence[str]) -> str:
        """Return what to tell a person whose training was interrupted.

        Args:
            arguments: The command line after ``compose``.
        """
        partial = [folder.with_name(folder.name + ".partial") for folder in self.folders().values()]
        begun = [folder for folder in partial if any(folder.glob("checkpoints/step-*/training.json"))]
        if not begun:
            return "interrupted before the first checkpoint; nothing was saved"
        kept = [word for word in arguments if word not in ("--resume", "--force")]
        again = shlex.join(["compose", *kept, "--resume"])
        return f"interrupted; the last checkpoint is in {begun[-1]}. Resume with:\n  {again}"

    def _input_problems(self) -> list[str]:
        from compose.routers.presets.registry import PRESETS

        recipe, entry = self.recipe, PRESETS[self.recipe.preset]
        problems = []
        if self.configured.spec.train == "none" and not any(stage.train != "preset" for stage in recipe.stages):
            problems.append(
                f"preset {recipe.preset!r} trains nothing; compose.routers.build(attached, preset({recipe.preset!r})) "
                "is ready to use"
            )
        if self.configured.spec.gate_input == "text":
            problems.append(
                f"preset {recipe.preset!r} reads text embeddings of an encoder of your choice; train it in Python: "
                "compose.routers.train(..., text_embedding=...)"
            )
        if not recipe.bank and entry.experts is None:
            problems.append(f"preset {recipe.preset!r} works over a bank of trained adapters; give --bank DIR")
        problems += [f"--data: no such file or folder: {path}" for path in recipe.data if not path.exists()]
        return problems + [f"--bank: no such folder: {path}" for path in recipe.bank if not path.is_dir()]

    def _output_problems(self) -> list[str]:
        problems = []
        if self.recipe.out is None and not self.dry_run:
            problems.append("missing --out DIR, where the mixture goes (or --dry-run)")
        if self.resume and self.force:
            problems.append("--resume continues a run, --force starts again; give one of them")
        if self.dry_run and self.resume:
            problems.append("--dry-run does not train, so there is nothing to --resume")
        several = len(self.recipe.seeds) > 1
        for folder in self.folders().values():
            finished = self.resume and several  # of several runs those that are done stay
            if folder.exists() and not (self.force or self.dry_run or finished):
                problems.append(f"--out: {folder} exists; choose another folder, or pass --force to replace it")
        return problems


def read_options(settings: Sequence[str]) -> dict[str, Any]:
    """``OPTION=VALUE`` as values: numbers, true, false, none, JSON lists and objects, or text.

    Raises:
        ComposeError: There is no ``=``, or an option is given twice.
    """
    from compose.cli.merge_recipe import read_setting

    found: dict[str, Any] = {}
    for text in settings:
        name, value = read_setting(text)
        if name in found:
            raise ComposeError(f"the option {name!r} is given twice (--set {text!r})")
        if isinstance(value, str) and value[:1] in "[{" and value:
            try:
                value = json.loads(value)
            except ValueError as error:
                raise ComposeError(f"--set {text!r}: not valid JSON: {error}") from None
        found[name] = value
    return found


def read_columns(pairs: Sequence[str]) -> dict[str, str]:
    """``FIELD=NAME`` as a mapping.

    Raises:
        ComposeError: There is no ``=``, or a field is given twice.
    """
    found: dict[str, str] = {}
    for text in pairs:
        name, equals, column = text.partition("=")
        if not equals or not name or not column or name in found:
            raise ComposeError(f"cannot read --column {text!r}; write FIELD=NAME once for each, as in response=answer")
        found[name] = column
    return found
