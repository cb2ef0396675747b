"""Training a retriever: contrastive learning on inputs of tasks, as in LoraRetriever (arXiv:2402.09997, section 3.2).

Two inputs of one task are a positive pair, the other rows of the batch, each of another task, its negatives:

    L = -log( exp(s(x, x+) / t) / (exp(s(x, x+) / t) + sum_j exp(s(x, x_j+) / t)) )

with ``s`` the cosine of the encoder's vectors of ``prompt + text``. It runs in the trainer of sentence-transformers
with ``MultipleNegativesRankingLoss`` (``scale = 1 / t``). Differences from the paper: all-MiniLM-L6-v2 in place of
instructor-xl unless another model is given, and batches in which no task stands twice (`compose.retriever.pairs`).
"""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from compose.errors import BackendUnavailableError, ComposeError, DuplicateNameError
from compose.retriever.encoders import DEFAULT_MODEL, TASK_PROMPT, SentenceEncoder, load_sentence_transformer
from compose.retriever.pairs import Pairs, distinct_batches, draw_pairs
from compose.retriever.retriever import Retriever
from compose.retriever.task_texts import TaskSplit, TaskTexts, split_tasks

REPORT_FILE = "report.json"
PROMPT_NAME = "retrieval"
TOPS = (1, 3, 5)
METHODS = ("mean", "lda")
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a retriever is trained.

    Attributes:
        model: The encoder that is trained further: a name or a folder.
        prompt: Instruction before every text; it is saved with the model.
        unseen: Share of the tasks that training never sees, or their names.
        held_out: Share of every task's inputs that only ask.
        rounds: How often every input is used, about.
        batch_size: Pairs in one step at most; never more than there are tasks.
        learning_rate: Of AdamW, after a linear warm-up over a tenth of the steps, then falling linearly to 0.
        temperature: ``t``.
        samples: Inputs that represent an adapter in the measurement, at most.
        max_length: Tokens, longer texts are cut; None: the model's own.
        seed: Of splits, pairs, batches and dropout.
        device: A torch device.
    """

    model: str = DEFAULT_MODEL
    prompt: str = TASK_PROMPT
    unseen: float | tuple[str, ...] = 0.2
    held_out: float = 0.2
    rounds: int = 4
    batch_size: int = 64
    learning_rate: float = 2e-5
    temperature: float = 0.05
    samples: int = 20
    max_length: int | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least {least}, got {value}"
            for name, least in (("rounds", 1), ("batch_size", 2), ("samples", 1), ("max_length", 1), ("seed", 0))
            if (value := getattr(self, name)) is not None and value < least
        ]
        problems += [
            f"{name} must be above 0, got {value}"
            for name in ("learning_rate", "temperature")
            if not (value := getattr(self, name)) > 0
        ]
        if problems:
            raise ComposeError("; ".join(problems))


class TrainedRetriever(NamedTuple):
    """What training yields.

    Attributes:
        encoder: The trained encoder, with its prompt.
        report: What was done and measured; JSON values.
    """

    encoder: SentenceEncoder
    report: dict[str, Any]


def train_retriever(
    texts: Mapping[str, Sequence[str]],
    settings: TrainingSettings | None = None,
    *,
    out: str | Path,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> TrainedRetriever:
    """Train an encoder on inputs of tasks, measure it before and after, and save it.

    ``out`` becomes the folder of a sentence-transformers model, its prompt included, with ``report.json`` beside it;
    it appears whole or not at all. Recall is measured against all adapters, with queries of the tasks trained on
    ("seen") and of the others ("unseen") apart: a retriever is for adapters that did not exist when it was trained.

    Args:
        texts: Task -> distinct inputs, at least two each.
        settings: How.
        out: The folder.
        overwrite: Replace what is there.
        progress: Called with a line per stage.

    Raises:
        BackendUnavailableError: sentence-transformers or datasets is not installed.
        ComposeError: Too few tasks or inputs.
        DuplicateNameError: ``out`` exists, without ``overwrite``.
    """
    chosen = settings or TrainingSettings()
    folder = Path(out).absolute()
    if folder.exists() and not overwrite:
        raise DuplicateNameError(f"{folder} exists; choose another folder or pass overwrite=True")
    check_packages()
    with _same_random_state():
        return _trained(texts, chosen, folder, progress or (lambda line: None))


def _trained(
    texts: Mapping[str, Sequence[str]], chosen: TrainingSettings, folder: Path, tell: Progress
) -> TrainedRetriever:
    """Load, measure, train, measure again, write."""
    split = split_tasks(texts, unseen=chosen.unseen, held_out=chosen.held_out, seed=chosen.seed)
    model = load_sentence_transformer(chosen.model, device=chosen.device)
    if chosen.max_length is not None:
        model.max_seq_length = chosen.max_length
    encoder = SentenceEncoder.of_model(model, chosen.model, prompt=chosen.prompt)
    before_id = encoder.fingerprint
    tell("measuring the encoder as it is")
    before = measure(encoder, split, chosen)
    pairs = draw_pairs(split.train, chosen.rounds, chosen.seed)
    batches = distinct_batches(pairs.tasks, chosen.batch_size, chosen.seed)
    tell(f"training on {len(pairs.tasks)} pairs of {len(split.train)} tasks, {len(batches)} steps")
    started = time.monotonic()
    losses = _fit(model, pairs, batches, chosen)
    seconds = time.monotonic() - started
    trained = SentenceEncoder.of_model(model, str(folder), prompt=chosen.prompt)
    tell("measuring the trained encoder")
    report = {
        "settings": asdict(chosen),
        "tasks": {"seen": sorted(split.seen), "unseen": sorted(split.unseen)},
        "pairs": len(pairs.tasks),
        "pairs_left_out": len(pairs.tasks) - sum(map(len, batches)),
        "steps": len(batches),
        "seconds": seconds,
        "losses": losses,
        "before": before,
        "after": measure(trained, split, chosen),
        "fingerprint": {"before": before_id, "after": trained.fingerprint},
        "versions": _versions(),
    }
    _save(model, chosen.prompt, report, folder)
    return TrainedRetriever(trained, report)


def measure(encoder: SentenceEncoder, split: TaskSplit, settings: TrainingSettings) -> dict[str, Any]:
    """Return recall per group of queries and adapter embedding: shares of queries whose adapter is in the top 1, 3, 5.

    ``lda`` is left out where an adapter has fewer samples than it needs.
    """
    samples = {task: texts[: settings.samples] for task, texts in split.samples.items()}
    enough = min(map(len, samples.values())) >= 2
    vectors = encoder.encode([text for texts in samples.values() for text in texts])
    owners = np.repeat(np.arange(len(samples)), [len(texts) for texts in samples.values()])
    groups = {"seen": split.seen, "unseen": split.unseen}
    asked = {name: _asked(encoder, queries, list(samples)) for name, queries in groups.items() if queries}
    found: dict[str, Any] = {name: {"queries": len(labels)} for name, (_, labels) in asked.items()}
    for method in METHODS if enough else METHODS[:1]:
        retriever = Retriever.from_vectors(encoder, list(samples), vectors, owners, method)
        for name, (queries, labels) in asked.items():
            best = retriever.top_vectors(queries, max(TOPS)).indices
            found[name][method] = {f"top{k}": float((best[:, :k] == labels[:, None]).any(axis=1).mean()) for k in TOPS}
    return found


def check_packages() -> None:
    """Raise BackendUnavailableError where a package of the extra ``retriever-train`` is missing."""
    missing = [
        name for name in ("sentence_transformers", "datasets", "accelerate") if not importlib.util.find_spec(name)
    ]
    if missing:
        raise BackendUnavailableError(
            f"training a retriever needs {', '.join(missing)}: pip install 'adapter-compose[retriever-train]'"
        )


def _asked(encoder: SentenceEncoder, queries: TaskTexts, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    labels = np.repeat([names.index(task) for task in queries], [len(texts) for texts in queries.values()])
    return encoder.encode([text for texts in queries.values() for text in texts]), labels


def _fit(model: Any, pairs: Pairs, batches: list[list[int]], settings: TrainingSettings) -> list[float]:
    """Run the trainer over exactly these batches and return the loss of every step."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from transformers.trainer_callback import PrinterCallback

    with _quiet(), tempfile.TemporaryDirectory(prefix="compose-retriever-") as scratch:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=scratch,
            num_train_epochs=1,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            warmup_steps=max(1, len(batches) // 10),
            batch_sampler=_sampler(batches),
            prompts={"anchor": settings.prompt, "positive": settings.prompt},
            seed=settings.seed,
            data_seed=settings.seed,
            use_cpu=settings.device == "cpu",
            save_strategy="no",
            eval_strategy="no",
            logging_steps=1,
            logging_first_step=True,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = _trainer_class()(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict({"anchor": pairs.anchors, "positive": pairs.positives}),
            loss=MultipleNegativesRankingLoss(model, scale=1 / settings.temperature),
        )
        trainer.remove_callback(PrinterCallback)  # it prints every step's loss to standard output
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    model.eval()
    return losses


def _trainer_class() -> type:
    """Return the trainer without the callback that writes a model card, draws a bar for it, and asks the hub."""
    from sentence_transformers import SentenceTransformerTrainer
    from transformers import TrainerCallback

    class NoCard(TrainerCallback):
        """Takes the card's arguments and does nothing."""

        def __init__(self, defaults: Mapping[str, Any]) -> None: ...

    class Trainer(SentenceTransformerTrainer):
        """The trainer, without a card."""

        model_card_callback_class = NoCard  # type: ignore[assignment]

    return Trainer


def _sampler(batches: list[list[int]]) -> Callable[..., Any]:
    """Return what the trainer calls to get its batches."""
    from sentence_transformers.base.sampler import DefaultBatchSampler

    class Fixed(DefaultBatchSampler):
        """The batches as they were drawn."""

        def __iter__(self) -> Iterator[list[int]]:
            return iter(batches)

        def __len__(self) -> int:
            return len(batches)

    return Fixed


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep datasets and transformers from drawing progress bars."""
    import datasets
    from transformers.utils import logging

    shown, shown_by_models = datasets.utils.logging.is_progress_bar_enabled(), logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
        if shown_by_models:
            logging.enable_progress_bar()


@contextmanager
def _same_random_state() -> Iterator[None]:
    """Give back the global random states, which the trainer seeds."""
    import torch

    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _save(model: Any, prompt: str, report: Mapping[str, Any], folder: Path) -> None:
    """Write model and report into a hidden sibling and rename it; the model carries its prompt as its default."""
    model.prompts = {PROMPT_NAME: prompt}
    model.default_prompt_name = PROMPT_NAME
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:12]
    fresh, old = folder.with_name(f".{folder.name}.tmp-{mark}"), folder.with_name(f".{folder.name}.old-{mark}")
    try:
        with _quiet():
            model.save_pretrained(str(fresh), create_model_card=False, safe_serialization=True)
        text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
        (fresh / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("sentence-transformers", "transformers", "torch", "datasets")}
