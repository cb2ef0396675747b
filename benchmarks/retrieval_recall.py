"""Retrieval on real text: how often the right adapter is found, by method, samples per adapter and shots of the task.

    python benchmarks/retrieval_recall.py --out benchmarks/results        # encodes once (minutes), then seconds
    python benchmarks/retrieval_recall.py --print benchmarks/retrieval_recall.jsonl

Adapters are stood in for by their training inputs, as retrieval sees nothing else: the 150 intents of CLINC150, its 10
domains, the 77 intents of BANKING77. Every adapter is embedded from ``m`` training utterances (drawn anew per draw),
or from the words of its name (``description``); queries are the whole test sets. ``in domain`` counts answers of the
right CLINC domain; ``OOD`` does so with the query's own intent excluded. Shots: queries of one task are averaged, 40
draws per task. Out of scope: CLINC's 1,000 texts that belong to no intent; thresholds are calibrated on ``val`` and
``oos_val``, never on test. Prints means over draws. Vectors are kept in --cache, by the encoder's fingerprint.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, pstdev
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent / "shared" / "data"
FILE = "retrieval_recall.jsonl"
TASK_DRAWS = 40
METHODS = (
    "description",
    "raw_mean",
    "mean",
    "nearest",
    "kmeans-2",
    "kmeans-3",
    "color",
    "lda-0.05",
    "lda-0.15",
    "lda-0.3",
    "logistic",
)
SCOPED = ("raw_mean", "mean", "nearest", "color", "lda-0.15", "logistic")
SETS = ("clinc-intents", "clinc-domains", "banking-intents")


class Split(NamedTuple):
    """Texts, and which adapter each belongs to."""

    texts: list[str]
    labels: list[str]


class DataSet(NamedTuple):
    """One set of adapters. ``groups``: adapter -> domain, where there are domains; ``outside``: of no adapter."""

    name: str
    train: Split
    val: Split
    test: Split
    outside_val: list[str]
    outside_test: list[str]
    groups: Mapping[str, str]


class Vectors(NamedTuple):
    """A data set in vectors; labels are indices of ``names``."""

    names: tuple[str, ...]
    train: tuple[np.ndarray, np.ndarray]
    val: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    outside_val: np.ndarray
    outside_test: np.ndarray
    groups: np.ndarray | None


def main() -> int:
    """Measure, or print the tables of rows measured before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with clinc150 and banking77")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help=f"folder of {FILE}")
    parser.add_argument("--cache", type=Path, default=HERE.parent / "runs" / "retrieval-vectors")
    parser.add_argument("--print", type=Path, dest="shown", metavar="FILE", help="only print the tables of these rows")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="a sentence-transformers name or folder")
    parser.add_argument(
        "--prompt", default=None, help="instruction; default: the model's own; 'task': LoraRetriever's"
    )
    parser.add_argument("--samples", nargs="+", type=int, default=[5, 10, 20])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    arguments = parser.parse_args()
    if arguments.shown is not None:
        print_tables([json.loads(line) for line in arguments.shown.read_text().splitlines()])
        return 0
    missing = [name for name in ("clinc150", "banking77") if not (arguments.data / name).is_dir()]
    if missing:
        print(f"skipped: {arguments.data} lacks {' and '.join(missing)}; see its README for the sources")
        return 0
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.path.insert(0, str(HERE))
    from run import make_compose_importable

    make_compose_importable()
    rows = list(measure_all(arguments))
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / FILE).open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    print_tables(rows)
    return 0


def measure_all(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row per set, samples, draw and method."""
    from compose.retriever.encoders import TASK_PROMPT, SentenceEncoder

    prompt = TASK_PROMPT if arguments.prompt == "task" else arguments.prompt
    encoder = SentenceEncoder(arguments.model, prompt=prompt, batch_size=128)
    for name in arguments.sets:
        found = encode_set(read_set(name, arguments.data), encoder, arguments.cache)
        for samples in arguments.samples:
            for draw in range(arguments.draws):
                kept = draw_samples(found, samples, draw)
                for method in arguments.methods:
                    head = {"set": name, "model": arguments.model, "prompt": encoder.prompt, "samples": samples}
                    yield {**head, "draw": draw, "method": method, **measure(found, kept, method, encoder)}
                print(f"{name}: {samples} samples, draw {draw} done", file=sys.stderr)


def measure(found: Vectors, kept: np.ndarray, method: str, encoder: Any) -> dict[str, Any]:
    """Return the numbers of one method fitted on the rows ``kept`` of the training vectors."""
    train, owners = found.train[0][kept], found.train[1][kept]
    queries, labels = found.test
    from compose.retriever.retriever import Retriever

    if method == "description":
        train, owners = encoder.encode([described(name) for name in found.names]), np.arange(len(found.names))
    retriever = Retriever.from_vectors(encoder, found.names, train, owners, method_of(method))
    numbers = recall(retriever.score_vectors(queries), labels, found.groups)
    numbers |= shots(retriever.score_vectors, found)
    return {**numbers, "scope": scope_numbers(retriever, found)} if len(found.outside_test) else numbers


def described(name: str) -> str:
    """Return an adapter's description: the words of its name, all that these data sets say of an intent."""
    return name.replace("_", " ").strip()


def recall(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray | None) -> dict[str, float]:
    """Return shares in percent: the right adapter among the first 1, 3, 5; the right domain first, IID and OOD."""
    order = np.argsort(-scores, axis=1, kind="stable")
    numbers = {f"top{k}": percent((order[:, :k] == labels[:, None]).any(axis=1)) for k in (1, 3, 5)}
    if groups is None:
        return numbers
    other = np.where(order[:, 0] == labels, order[:, 1], order[:, 0])
    right = groups[labels]
    return {
        **numbers,
        "domain1": percent(groups[order[:, 0]] == right),
        "ood_domain1": percent(groups[other] == right),
    }


def shots(score: Any, found: Vectors) -> dict[str, float]:
    """Return top-1 and top-3 of the mean of 1, 2 and 5 queries of one task, 40 draws per task."""
    queries, labels = found.test
    numbers = {}
    for count in (1, 2, 5):
        generator = np.random.default_rng(count)
        means, wanted = [], []
        for label in range(len(found.names)):
            own = np.flatnonzero(labels == label)
            for _ in range(TASK_DRAWS):
                means.append(queries[generator.choice(own, count, replace=False)].mean(axis=0))
                wanted.append(label)
        order = np.argsort(-score(np.array(means, np.float32)), axis=1, kind="stable")
        for k in (1, 3):
            numbers[f"shots{count}_top{k}"] = percent((order[:, :k] == np.array(wanted)[:, None]).any(axis=1))
    return numbers


def scope_numbers(retriever: Any, found: Vectors) -> dict[str, dict[str, float]]:
    """Return per measure: the area under the curve, and what a calibrated threshold keeps and refuses, in percent."""
    from sklearn.metrics import roc_auc_score

    from compose.retriever.scope import KINDS, calibrate, scope_scores

    numbers = {}
    for kind in KINDS if retriever.fitted.moments is not None else KINDS[:1]:
        inner, outer = (scope_scores(retriever.fitted, part, kind) for part in (found.test[0], found.outside_test))
        truth = np.concatenate([np.ones(len(inner)), np.zeros(len(outer))])
        auc = round(100 * float(roc_auc_score(truth, np.concatenate([inner, outer]))), 3)
        chosen = calibrate(retriever.fitted, found.val[0], None, keep=0.95, kind=kind)
        both = calibrate(retriever.fitted, found.val[0], found.outside_val, keep=0.95, kind=kind)
        numbers[kind] = {
            "auc": auc,
            "keep95_kept": percent(inner >= chosen.threshold),
            "keep95_refused": percent(outer < chosen.threshold),
            "both_kept": percent(inner >= both.threshold),
            "both_refused": percent(outer < both.threshold),
        }
    return numbers


def method_of(label: str) -> Any:
    """Return the method that a label such as ``lda-0.15`` or ``kmeans-3`` stands for."""
    from compose.retriever.embeddings import ADAPTER_EMBEDDINGS

    name, _, value = label.partition("-")
    options: dict[str, Any] = {}
    if value:
        options = {"shrinkage": float(value)} if name == "lda" else {"centroids": int(value)}
    return ADAPTER_EMBEDDINGS[name](**options)


def draw_samples(found: Vectors, count: int, draw: int) -> np.ndarray:
    """Return rows of the training vectors: ``count`` of every adapter."""
    generator = np.random.default_rng([draw, count])
    owners = found.train[1]
    groups = [np.flatnonzero(owners == label) for label in range(len(found.names))]
    return np.concatenate([np.sort(generator.choice(group, count, replace=False)) for group in groups])


def read_set(name: str, data: Path) -> DataSet:
    """Read one set of adapters."""
    if name == "banking-intents":
        train, test = (_read_csv(data / "banking77" / f"{split}.csv") for split in ("train", "test"))
        return DataSet(name, train, Split([], []), test, [], [], {})
    found = json.loads((data / "clinc150" / "data_full.json").read_text(encoding="utf-8"))
    domains = json.loads((data / "clinc150" / "domains.json").read_text(encoding="utf-8"))
    domain_of = {intent: domain for domain, intents in domains.items() for intent in intents}
    by_domain = name == "clinc-domains"

    def split(key: str) -> Split:
        texts, intents = zip(*found[key], strict=True)
        return Split(list(texts), [domain_of[intent] if by_domain else intent for intent in intents])

    outside = [[text for text, _ in found[key]] for key in ("oos_val", "oos_test")]
    return DataSet(name, split("train"), split("val"), split("test"), *outside, {} if by_domain else domain_of)


def encode_set(data: DataSet, encoder: Any, cache: Path) -> Vectors:
    """Return the vectors of a set, encoded where the cache lacks them."""
    names = tuple(sorted(set(data.train.labels)))
    index = {name: number for number, name in enumerate(names)}

    def both(split: Split) -> tuple[np.ndarray, np.ndarray]:
        return cached(split.texts, encoder, cache), np.array([index[label] for label in split.labels], np.int64)

    kinds = sorted(set(data.groups.values()))
    groups = np.array([kinds.index(data.groups[name]) for name in names]) if data.groups else None
    outside = (cached(part, encoder, cache) for part in (data.outside_val, data.outside_test))
    return Vectors(names, both(data.train), both(data.val), both(data.test), *outside, groups)


def cached(texts: Sequence[str], encoder: Any, cache: Path) -> np.ndarray:
    """Encode, or read what was encoded before under the same fingerprint, prompt and texts."""
    key = hashlib.sha256(json.dumps([encoder.fingerprint, encoder.prompt, list(texts)]).encode()).hexdigest()
    path = cache / f"{key[:32]}.npy"
    if path.is_file():
        return np.load(path)
    vectors = encoder.encode(texts)
    cache.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}.npy")
    np.save(fresh, vectors)
    fresh.replace(path)
    return vectors


def print_tables(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print recall per set, then what rejection keeps and refuses."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["set"], row["model"], row["prompt"], row["method"], row["samples"]].append(row)
    for head in dict.fromkeys(key[:3] for key in groups):
        print_recall(head, {key[3:]: found for key, found in groups.items() if key[:3] == head})
    print_scope(groups)


def print_recall(head: tuple[str, ...], found: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]) -> None:
    """Print one set's table: top-1 by samples per adapter, the other columns at the most samples."""
    sizes = sorted({samples for _, samples in found})
    draws = max(map(len, found.values()))
    print(f"\n{head[0]}, {head[1]}, prompt {head[2]!r}; means of {draws} draws\n")
    later = {
        "top3": "top-3", "shots5_top1": "5 shots: top-1", "shots5_top3": "top-3", "domain1": "in domain",
        "ood_domain1": "OOD in domain",
    }  # fmt: skip
    columns = [column for column in later if any(column in row for group in found.values() for row in group)]
    heads = [*(f"top-1, m = {samples}" for samples in sizes), *(later[column] for column in columns)]
    print(f"| method | {' | '.join(heads)} |\n| --- | {' | '.join('---:' for _ in heads)} |")
    for method in dict.fromkeys(method for method, _ in found):
        cells = [cell(found.get((method, samples), []), "top1", spread=True) for samples in sizes]
        cells += [cell(found.get((method, sizes[-1]), []), column) for column in columns]
        print(f"| {method} | {' | '.join(cells)} |")


def print_scope(groups: Mapping[tuple[Any, ...], Sequence[Mapping[str, Any]]]) -> None:
    """Print rejection at the most samples per adapter, of the methods that a default could be."""
    chosen = {key: found for key, found in groups.items() if "scope" in found[0] and key[3] in SCOPED}
    if not chosen:
        return
    most = max(key[4] for key in chosen)
    print(f"\nOut of scope, m = {most}; kept: percent of texts in scope, refused: percent of texts out of scope\n")
    print("| set | method | measure | AUC | 95 % of val kept: kept, refused | both kinds known: kept, refused |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    for key, found in chosen.items():
        for kind in found[0]["scope"] if key[4] == most and key[2] == "" else ():
            numbers = [row["scope"][kind] for row in found]
            auc, *rest = (mean(one[field] for one in numbers) for field in numbers[0])
            pairs = f"{rest[0]:.1f}, {rest[1]:.1f} | {rest[2]:.1f}, {rest[3]:.1f}"
            print(f"| {key[0]} | {key[3]} | {kind} | {auc:.1f} | {pairs} |")


def cell(rows: Sequence[Mapping[str, Any]], column: str, *, spread: bool = False) -> str:
    """Return a mean over draws, with its standard deviation where wanted; empty where it was not measured."""
    values = [row[column] for row in rows if column in row]
    if not values:
        return ""
    return f"{mean(values):.1f} ± {pstdev(values):.1f}" if spread else f"{mean(values):.1f}"


def percent(hits: np.ndarray) -> float:
    """Return the share of true entries, in percent."""
    return round(100 * float(np.mean(hits)), 3)


def _read_csv(path: Path) -> Split:
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return Split([row["text"] for row in rows], [row["category"] for row in rows])


if __name__ == "__main__":
    sys.exit(main())
