"""Where a command's retriever comes from: a folder, labelled examples of a bank, or the demo's tasks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.cli.console import note
from compose.errors import ComposeError

if TYPE_CHECKING:
    from compose.retriever.encoders import Encoder
    from compose.retriever.retriever import Retriever

DEMO_SAMPLES = 20
_HIDDEN = re.compile(r"hidden-states:.*:layer=(-?\d+):pooling=(mean|last)", re.DOTALL)
_SHOWN_NAMES = 5

LoadBase = Callable[[], tuple[Any, Any]]
"""Returns a model (or the handle of an attached bank) and its tokenizer."""


@dataclass(frozen=True)
class RetrieverSource:
    """What the options say.

    Attributes:
        folder: A saved retriever; then nothing is fitted.
        bank: Names of the bank's adapters; None: any name.
        examples: JSONL with ``input`` and ``adapter`` (or ``task``).
        demo: Fit on the demo's tasks.
        encoder: For fitting: a sentence-transformers model, or ``hidden-states``; None: the default one.
        method: For fitting: an adapter embedding.
    """

    folder: Path | None = None
    bank: Sequence[str] | None = None
    examples: Path | None = None
    demo: bool = False
    encoder: str | None = None
    method: str = "auto"

    def open(self, load_base: LoadBase | None) -> Retriever:
        """Load or fit the retriever.

        Args:
            load_base: For encoders that are the base model itself; None: there is none.

        Raises:
            ComposeError: Nothing to fit on, no such folder or encoder, or bad examples: all of them with their lines.
        """
        from compose.retriever.retriever import Retriever

        if self.folder is not None:
            return Retriever.load(self.folder, stored_encoder(self.folder, load_base))
        texts = demo_inputs() if self.demo else self._inputs()
        return Retriever.fit(named_encoder(self.encoder, load_base), texts, self.method)

    def _inputs(self) -> dict[str, list[str]]:
        from compose.retriever.task_texts import read_task_texts

        if self.examples is None:
            raise ComposeError("missing --retriever FOLDER, or --examples FILE to fit one on (or --demo)")
        found = read_task_texts([self.examples], known=self.bank)
        if without := [name for name in self.bank or () if name not in found]:
            more = f" and {len(without) - _SHOWN_NAMES} more" if len(without) > _SHOWN_NAMES else ""
            note(f"without examples, so never retrieved: {', '.join(without[:_SHOWN_NAMES])}{more}", "yellow")
        names = found if self.bank is None else [name for name in self.bank if name in found]
        return {name: found[name] for name in names}


def demo_inputs() -> dict[str, list[str]]:
    """Training inputs of the demo's tasks, by adapter."""
    from compose.bank import Bank
    from compose.cli.demo_files import demo_paths
    from compose.demo.tasks import TASKS

    names = Bank.open(demo_paths()[1]).names
    return {name: [item.input for item in TASKS[name].sample("retriever", DEMO_SAMPLES)] for name in names}


def named_encoder(name: str | None, load_base: LoadBase | None) -> Encoder:
    """The encoder of ``--encoder``.

    Raises:
        ComposeError: There is none of this name, or it is the base model and no base is given.
    """
    from compose.retriever.encoders import DEFAULT_MODEL, HIDDEN_STATES, HiddenStateEncoder, SentenceEncoder

    if name == HIDDEN_STATES:
        return HiddenStateEncoder(*_base(load_base, f"--encoder {HIDDEN_STATES}"))
    return SentenceEncoder(DEFAULT_MODEL if name is None else name)


def stored_encoder(folder: Path, load_base: LoadBase | None) -> Encoder:
    """The encoder that a saved retriever names, with its prompt; loading the retriever checks that it is the same.

    Raises:
        ComposeError: There is no such folder or encoder, or it is the base model and no base is given.
    """
    from compose.retriever.encoders import HiddenStateEncoder, SentenceEncoder
    from compose.retriever.storage import FACTS_FILE, read_facts

    if not (folder / FACTS_FILE).is_file():
        raise ComposeError(
            f"--retriever: no {FACTS_FILE} in {folder}; give the folder of a saved retriever "
            "(compose retrieve ... --save FOLDER makes one)"
        )
    known = read_facts(folder)["encoder"]
    name, prompt = str(known.get("id")), str(known.get("prompt", ""))
    if hidden := _HIDDEN.fullmatch(name):
        model, tokenizer = _base(load_base, f"the retriever's encoder ({name})")
        layer, pooling = int(hidden[1]), "mean" if hidden[2] == "mean" else "last"
        return HiddenStateEncoder(model, tokenizer, layer=layer, pooling=pooling, prompt=prompt)  # type: ignore[arg-type]
    return SentenceEncoder(name, prompt=prompt)


def _base(load_base: LoadBase | None, what: str) -> tuple[Any, Any]:
    if load_base is None:
        raise ComposeError(f"{what} reads hidden states of the base model; give --base MODEL")
    return load_base()
