"""Retrieval per input on the demo's bank: mixed inputs of all upstream tasks, every row with its own adapters.

    python benchmarks/retrieval_study.py --out benchmarks/results                  # a CPU: about 20 minutes
    python benchmarks/retrieval_study.py --out OUT --device cuda
    python benchmarks/retrieval_study.py ... (the same again)         # runs what OUT/retrieval_study.jsonl lacks
    python benchmarks/retrieval_study.py --print benchmarks/retrieval_study_cpu.jsonl
    python benchmarks/retrieval_study.py --print benchmarks/retrieval_study_cpu.jsonl --write retriever/README.md

In the shape of LoraRetriever's table (arXiv:2402.09997). Settings: ``IID``, a row's own adapter is in the bank;
``OOD``, it is taken out for that row; ``new wording``, the skill of an upstream task asked in words that no sample
has. Every retriever sees 20 training inputs per adapter. Scores are exact matches of generated text, macro means over
tasks; ``±`` is the standard deviation over draws of samples and test items. Nothing is chosen on test items.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SAMPLES = 20
"""Inputs per adapter that a retriever is fitted on, as LoraRetriever."""

K = 3
SOUP = 5
"""Adapters that AdapterSoup takes at most (arXiv:2302.07027; recalled, not verified)."""

SETTINGS = {"IID": "upstream", "OOD": "upstream", "new wording": "wording"}
"""Setting -> group of the demo's tasks."""

RANKED = ("IID", "new wording")
"""Settings in which every item has one right adapter that the bank holds."""

MINILM, HIDDEN = "MiniLM", "hidden states"
CONFIGS = {f"{MINILM}, lda": 1.0, f"{MINILM}, mean": 0.05, f"{HIDDEN}, lda": 1.0}
"""Encoder and adapter embedding of the generated rows -> temperature of similarity weights: ``lda`` scores are
logarithms of probabilities, so 1; cosines need a small one."""

RECALLS = ("lda", "mean", "raw_mean", "nearest", "color", "k-means", "GMM")
REFERENCES = "without retrieval"
MARKS = ("<!-- retrieval study -->", "<!-- end of retrieval study -->")
"""The tables stand between them in retriever/README.md."""


class Items(NamedTuple):
    """Test items of one setting: texts, answers, tasks, the adapter of each, and what it must not get."""

    texts: list[str]
    outputs: list[str]
    tasks: list[str]
    own: list[str]
    exclude: list[str] | None


class Method(NamedTuple):
    """A row of the table: options of the composer, and whether it is told which inputs are one task."""

    options: dict[str, Any]
    told: bool = False


def methods(temperature: float) -> dict[str, Method]:
    """The rows of one configuration."""
    similar = {"weights": "similarity", "temperature": temperature}
    return {
        "selection": Method({"mode": "selection"}),
        f"fusion, k = {K}": Method({"mode": "fusion", "k": K}),
        f"fusion, k = {K}, by similarity": Method({"mode": "fusion", "k": K, **similar}),
        f"mixture, k = {K}": Method({"mode": "mixture", "k": K}),
        f"mixture, k = {K}, by similarity": Method({"mode": "mixture", "k": K, **similar}),
        "SMEAR-like: all, fusion by similarity": Method({"mode": "fusion", "k": None, **similar}),
        "AdapterSoup, a corpus per task (told)": Method({"mode": "soup", "k": SOUP}, told=True),
        "AdapterSoup, all inputs one corpus": Method({"mode": "soup", "k": SOUP}),
    }


def main() -> None:
    """Run the study and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of retrieval_study.jsonl")
    parser.add_argument("--print", type=Path, dest="shown", metavar="FILE", help="only print the tables of these rows")
    parser.add_argument("--write", type=Path, metavar="FILE", help="with --print: put the tables between its marks")
    parser.add_argument("--only", nargs="+", default=[REFERENCES, *CONFIGS], metavar="NAME", help="configurations")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--items", type=int, default=3, help="test items per task")
    arguments = parser.parse_args()
    if arguments.shown is not None:
        shown = tables([json.loads(line) for line in arguments.shown.read_text().splitlines()])
        print(shown)
        if arguments.write is not None:
            write_between_marks(arguments.write, shown)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "retrieval_study.jsonl"
    print(tables(run(arguments, file)))
    print(f"\nrows in {file}; {arguments.items} test items per task, device {arguments.device}")


def run(arguments: argparse.Namespace, file: Path) -> list[dict[str, Any]]:
    """Measure every (configuration, seed) that ``file`` lacks and append its rows as they come."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    if arguments.device == "cpu":
        torch.set_num_threads(1)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    finished = {(row["config"], row["seed"]) for row in rows}
    jobs = [(config, seed) for seed in range(arguments.seeds) for config in arguments.only]
    started = time.monotonic()
    with warnings.catch_warnings(), file.open("a") as stream:
        warnings.simplefilter("ignore")  # of packages that only come along
        study = Study(arguments.device, arguments.items)
        for job in jobs:
            if job in finished:
                continue
            found = list(study.rows(*job))
            rows += found
            stream.writelines(json.dumps(row) + "\n" for row in found)
            stream.flush()
            print(f"[{(time.monotonic() - started) / 60:5.1f} min] {job[0]} {job[1]}", file=sys.stderr, flush=True)
    return rows


class Study:
    """The demo's base with its whole bank attached, and the encoders."""

    def __init__(self, device: str, items: int) -> None:
        import compose
        from compose.demo.assets import demo_bank, demo_base
        from compose.fewshot.loading import load_model

        self.loaded = load_model(demo_base(), device=device)
        self.attached = compose.attach(self.loaded.model, compose.Bank.open(demo_bank()))
        self.device, self.items = device, items
        self._encoders: dict[str, Any] = {}

    def rows(self, config: str, seed: int) -> Iterator[dict[str, Any]]:
        """One row per method and setting, and one per adapter embedding with its recalls."""
        settings = {name: items_of(name, self.items, seed) for name in SETTINGS}
        about = {"config": config, "seed": seed}
        if config == REFERENCES:
            for setting, items in settings.items():
                for name, weights in self._references(items, oracle=setting in RANKED).items():
                    yield {**about, "method": name, "setting": setting, **self._scored(items, weights, "outputs")}
            return
        retriever = self._retrievers(config, seed)
        for name, method in methods(CONFIGS[config]).items():
            for setting, items in settings.items():
                weights, combine = composed(retriever[config.split(", ")[1]], items, method)
                yield {**about, "method": name, "setting": setting, **self._scored(items, weights, combine)}
        for embedding, one in retriever.items():
            for setting in RANKED:
                yield {**about, "embedding": embedding, "setting": setting, "recall": recalls(one, settings[setting])}

    def _references(self, items: Items, *, oracle: bool) -> dict[str, list[dict[str, float]]]:
        names = self.attached.bank.names
        uniform = []
        for row in range(len(items.texts)):
            kept = [name for name in names if items.exclude is None or name != items.exclude[row]]
            uniform.append(dict.fromkeys(kept, 1.0 / len(kept)))
        found = {"base model": [{}] * len(items.texts), "uniform merge of the bank": uniform}
        if oracle:
            found["oracle: the row's own adapter"] = [{name: 1.0} for name in items.own]
        return found

    def _retrievers(self, config: str, seed: int) -> dict[str, Any]:
        from compose.demo.tasks import TASKS
        from compose.retriever.clusters import ClusterRetriever
        from compose.retriever.retriever import Retriever

        encoder = self._encoder(config.split(", ")[0])
        names = self.attached.bank.names
        texts = {
            name: [item.input for item in TASKS[name].sample(f"retrieval {seed}", SAMPLES, "train")] for name in names
        }
        found: dict[str, Any] = {}
        for method in RECALLS:
            if method in ("k-means", "GMM"):
                kind: Any = "kmeans" if method == "k-means" else "gmm"
                found[method] = ClusterRetriever.fit(encoder, texts, num_clusters=2 * len(names), method=kind)
            else:
                found[method] = Retriever.fit(encoder, texts, method)
        return found

    def _encoder(self, name: str) -> Any:
        from compose.retriever.encoders import HiddenStateEncoder, SentenceEncoder

        if name not in self._encoders:
            if name == MINILM:
                encoder: Any = SentenceEncoder(device=self.device)
            else:
                encoder = HiddenStateEncoder(self.attached, self.loaded.tokenizer)
            self._encoders[name] = Remembers(encoder)
        return self._encoders[name]

    def _scored(self, items: Items, weights: list[dict[str, float]], combine: Any) -> dict[str, Any]:
        """Exact match by task, all items in one batch."""
        from compose.text.encoding import end_ids, prompt_ids
        from compose.text.examples import Example

        tokenizer, written = self.loaded.tokenizer, self.loaded.prompt_format
        prompts = [prompt_ids(Example(text, ""), tokenizer, written, encoder_decoder=False) for text in items.texts]
        longest = max(len(tokenizer(output).input_ids) for output in items.outputs)
        rows = self.attached.generate(
            prompts, weights, max_new_tokens=longest + 2, stop_ids=end_ids(tokenizer, written), combine=combine
        )
        texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
        right = [text.strip() == output.strip() for text, output in zip(texts, items.outputs, strict=True)]
        by_task = {task: float(np.mean(part)) for task, part in grouped(items.tasks, right).items()}
        return {"exact": float(np.mean(list(by_task.values()))), "tasks": by_task}


class Remembers:
    """An encoder that encodes every text once."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self._known: dict[str, np.ndarray] = {}
        self.dim = encoder.dim

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors ``(N, D)``."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known |= dict(zip(new, self._encoder.encode(new), strict=True))
        return np.stack([self._known[text] for text in texts])


def items_of(setting: str, count: int, seed: int) -> Items:
    """Test items of a setting, shuffled over its tasks."""
    from compose.demo.tasks import TASKS

    found = [
        (item.input, item.output, task.name, task.skills[0])
        for task in TASKS.values()
        if task.group == SETTINGS[setting]
        for item in task.sample(f"retrieval {seed}", count, "test")
    ]
    order = np.random.default_rng(seed).permutation(len(found))
    texts, outputs, tasks, own = map(list, zip(*(found[place] for place in order), strict=True))
    return Items(texts, outputs, tasks, own, own if setting == "OOD" else None)


def composed(retriever: Any, items: Items, method: Method) -> tuple[list[dict[str, float]], str]:
    """Weights of every row, and what is summed."""
    from compose.retriever.composition import Composer

    composer = Composer(**method.options)
    if not method.told:
        return composer(retriever, items.texts, items.exclude).rows(), composer.combine
    weights: list[dict[str, float]] = [{} for _ in items.texts]
    for places in grouped(items.tasks, range(len(items.texts))).values():
        exclude = None if items.exclude is None else [items.exclude[place] for place in places]
        part = composer(retriever, [items.texts[place] for place in places], exclude)
        for place, row in zip(places, part.rows(), strict=True):
            weights[place] = row
    return weights, composer.combine


def recalls(retriever: Any, items: Items) -> dict[str, float]:
    """Share of items whose own adapter is among the first 1, 3, 5."""
    found = retriever.top(items.texts, 5).names
    return {
        str(k): float(np.mean([own in names[:k] for own, names in zip(items.own, found, strict=True)]))
        for k in (1, 3, 5)
    }


def grouped(keys: Sequence[str], values: Sequence[Any]) -> dict[str, list[Any]]:
    """Values by key, in order of appearance."""
    found: dict[str, list[Any]] = {}
    for key, value in zip(keys, values, strict=True):
        found.setdefault(key, []).append(value)
    return found


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Exact match per method and setting, and recalls, as two tables."""
    configs = [config for config in CONFIGS if any(row["config"] == config for row in rows)]
    lines = [f"| retriever | method | {' | '.join(SETTINGS)} |", "| --- | --- |" + " ---: |" * len(SETTINGS)]
    for config in (REFERENCES, *configs):
        mine = [row for row in rows if row["config"] == config and "method" in row]
        for method in dict.fromkeys(row["method"] for row in mine):
            own = [row for row in mine if row["method"] == method]
            cells = [cell([row["exact"] for row in own if row["setting"] == setting]) for setting in SETTINGS]
            lines.append(f"| {config} | {method} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *recall_lines(rows, configs)])


def recall_lines(rows: Sequence[dict[str, Any]], configs: Sequence[str]) -> list[str]:
    """Recall@1/3/5 per encoder and adapter embedding."""
    lines = [f"| encoder | adapter embedding | {' | '.join(f'{name} @1 | @3 | @5' for name in RANKED)} |"]
    lines.append("| --- | --- |" + " ---: |" * 6)
    for encoder in dict.fromkeys(config.split(", ")[0] for config in configs):
        config = next(config for config in configs if config.startswith(f"{encoder}, "))
        mine = [row for row in rows if row["config"] == config and "embedding" in row]
        for embedding in dict.fromkeys(row["embedding"] for row in mine):
            own = [row for row in mine if row["embedding"] == embedding]
            cells = [
                cell([row["recall"][k] for row in own if row["setting"] == setting])
                for setting in RANKED
                for k in ("1", "3", "5")
            ]
            lines.append(f"| {encoder} | {embedding} | {' | '.join(cells)} |")
    return lines


def write_between_marks(file: Path, text: str) -> None:
    """Replace what stands between the two marks of a document."""
    before, rest = file.read_text(encoding="utf-8").split(MARKS[0])
    _, after = rest.split(MARKS[1])
    file.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}", encoding="utf-8")


def cell(values: Sequence[float]) -> str:
    """Mean, and the spread over seeds where there are several."""
    if not values:
        return "-"
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
