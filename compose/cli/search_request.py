"""What ``compose search`` was asked for: all options checked together before anything heavy is loaded."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compose.errors import ComposeError

if TYPE_CHECKING:
    from compose.bank import Bank
    from compose.fewshot.loading import LoadedModel
    from compose.fewshot.preselect import Ranker
    from compose.fewshot.settings import SearchSettings
    from compose.text.examples import Example

DEMO_SHOTS = 5


class SearchInputs(NamedTuple):
    """What a search works on; ``ranker``: what orders the bank, where it is preselected by embedding."""

    loaded: LoadedModel
    bank: Bank
    examples: list[Example]
    test: list[Example]
    ranker: Ranker | None = None


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """The options of one call, as typed.

    Raises:
        ComposeError: Options are missing, contradict each other, or name files that are not there; all are listed.
    """

    base: str | None
    bank: Sequence[Path] | None
    examples: Path | None
    test: Path | None
    demo: str | None
    shots: int | None
    draw: int | None
    device: str
    dtype: str
    strategy: str
    combine: str
    layers: str | None
    budget: float | None
    candidates: int
    preselect: str
    retriever: Path | None
    folds: int
    l1: float
    seed: int
    controls: str
    rank: int | None
    out: Path | None
    resume: bool
    force: bool
    dry_run: bool

    def __post_init__(self) -> None:
        problems = [*self._input_problems(), *self._retriever_problems(), *self._output_problems()]
        if problems:
            raise ComposeError("; ".join(problems))

    def settings(self) -> SearchSettings:
        """Return the settings of the search.

        Raises:
            ComposeError: A value is out of range, or a name unknown.
        """
        from compose.fewshot.settings import SearchSettings
        from compose.search.strategy import STRATEGIES

        if self.strategy != "auto":
            STRATEGIES[self.strategy]
        return SearchSettings(
            strategy=self.strategy,
            combine=self.combine,  # type: ignore[arg-type]
            layers=self._layers(),  # type: ignore[arg-type]
            budget=self.budget,
            candidates=self.candidates,
            preselect=self.preselect,  # type: ignore[arg-type]
            folds=self.folds,
            l1=self.l1,
            seed=self.seed,
            rank=self.rank,
            controls=self._controls(),
        )

    def load(self) -> SearchInputs:
        """Load examples, bank and model, the cheap ones first.

        Raises:
            ComposeError: Any of them is not there or not readable.
        """
        from compose.bank import Bank
        from compose.cli.loading import load_base
        from compose.text.examples import read_examples

        if self.demo is not None:
            from compose.cli.demo_files import demo_examples, demo_paths, demo_task

            shots = DEMO_SHOTS if self.shots is None else self.shots
            examples, test = demo_examples(demo_task(self.demo), shots, self.draw or 0)
            base, bank_folder = demo_paths()
            bank = Bank.open(bank_folder)
        else:
            examples = read_examples(_given(self.examples))
            test = [] if self.test is None else read_examples(self.test)
            bank = Bank.open(list(self.bank or []))
            base = _given(self.base)
        loaded = load_base(base, device=self.device, dtype=self.dtype)
        return SearchInputs(loaded, bank, examples, test, self._ranker(loaded, bank.names))

    def _ranker(self, loaded: LoadedModel, names: Sequence[str]) -> Ranker | None:
        if self.preselect != "embedding" or self.dry_run or len(names) <= self.candidates:
            return None
        from compose.cli.retriever_source import RetrieverSource

        source = RetrieverSource(self.retriever, demo=self.retriever is None)
        return source.open(lambda: (loaded.model, loaded.tokenizer)).ranker(names)

    def _input_problems(self) -> list[str]:
        paths = {"--base": self.base, "--bank": self.bank, "--examples": self.examples, "--test": self.test}
        if self.demo is not None:
            given = [name for name, value in paths.items() if value]
            ranges = [("--shots", self.shots, 1), ("--draw", self.draw, 0)]
            return [f"--demo brings its own files; leave out {', '.join(given)}"] * bool(given) + [
                f"{name} must be at least {least}, got {value}"
                for name, value, least in ranges
                if value is not None and value < least
            ]
        problems = [f"--{name} goes with --demo only" for name in ("shots", "draw") if getattr(self, name) is not None]
        missing = [name for name in ("--base", "--bank", "--examples") if not paths[name]]
        if missing:
            problems.append(f"missing {', '.join(missing)} (or --demo TASK for a shipped task)")
        files = {"--examples": self.examples, "--test": self.test}
        problems += [f"{name}: no such file: {path}" for name, path in files.items() if path and not path.is_file()]
        return problems + [f"--bank: no such folder: {path}" for path in self.bank or [] if not path.is_dir()]

    def _retriever_problems(self) -> list[str]:
        if self.retriever is not None and self.preselect != "embedding":
            return [f"--retriever goes with --preselect embedding, not {self.preselect}"]
        if self.retriever is not None and not self.retriever.is_dir():
            return [f"--retriever: no such folder: {self.retriever}"]
        if self.preselect == "embedding" and self.retriever is None and self.demo is None:
            return ["--preselect embedding needs --retriever FOLDER (compose retrieve ... --save FOLDER makes one)"]
        return []

    def _output_problems(self) -> list[str]:
        problems = []
        if self.out is None and not self.dry_run:
            problems.append("missing --out DIR, where the adapter and the report go (or --dry-run)")
        if self.resume and self.force:
            problems.append("--resume continues a run, --force starts again; give one of them")
        if self.dry_run and self.resume:
            problems.append("--dry-run does not search, so there is nothing to --resume")
        if self.out is not None and self.out.exists() and not self.force and not self.dry_run:
            problems.append(f"--out: {self.out} exists; choose another folder, or pass --force to replace it")
        return problems

    def _layers(self) -> int | str | None:
        if self.layers is None or self.layers == "each":
            return self.layers
        if not self.layers.isdecimal():
            raise ComposeError(f"--layers must be 'each' or a number of groups, got {self.layers!r}")
        return int(self.layers)

    def _controls(self) -> tuple[str, ...] | None:
        from compose.fewshot.settings import CONTROLS

        words = {"auto": None, "all": CONTROLS, "none": ()}
        if self.controls in words:
            return words[self.controls]
        return tuple(name.strip().replace("-", "_") for name in self.controls.split(",") if name.strip())


def resume_command(request: SearchRequest, arguments: Sequence[str]) -> str:
    """Return what to tell a person whose search was interrupted.

    Args:
        request: What was running.
        arguments: The command line after ``compose``.
    """
    partial = None if request.out is None else request.out.with_name(request.out.name + ".partial")
    if partial is None or not (partial / "events.jsonl").is_file():
        return "interrupted before the first evaluation; nothing was saved"
    kept = [word for word in arguments if word not in ("--resume", "--force")]
    again = shlex.join(["compose", *kept, "--resume"])
    return f"interrupted; every evaluation is saved in {partial}. Resume with:\n  {again}"


def _given(value: Any) -> Any:
    if value is None:
        raise AssertionError("checked in __post_init__")
    return value
