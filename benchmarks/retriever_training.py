"""What training an encoder brings: recall on intents it was trained on, and on intents it never saw.

    python benchmarks/retriever_training.py --out benchmarks/results --seeds 1        # a quiet CPU: minutes per seed
    python benchmarks/retriever_training.py --print benchmarks/retriever_training.jsonl

Tasks are CLINC150's 150 intents or BANKING77's 77, ``--inputs`` utterances each, of which a fifth only asks; a fifth
of the intents is held out whole, drawn anew per seed. Candidates are always all intents. ``no training`` is the
encoder as it was, with and without the instruction before every text; ``trained`` is `compose.retriever.training` with
its defaults but ``--rounds``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).resolve().parent
FILE = "retriever_training.jsonl"
SETS = ("clinc-intents", "banking-intents")


def main() -> int:
    """Train and measure, or print the table of rows measured before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help=f"folder of {FILE}")
    parser.add_argument("--print", type=Path, dest="shown", metavar="FILE", help="only print the table of these rows")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--inputs", type=int, default=50, help="utterances per intent")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.shown is not None:
        print_table([json.loads(line) for line in arguments.shown.read_text().splitlines()])
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
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in arguments.sets:
        for seed in range(arguments.seeds):
            rows += measure(name, seed, arguments)
            with (arguments.out / FILE).open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in rows[-3:])
    print_table(rows)
    return 0


def measure(name: str, seed: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return three rows: no training without and with the instruction, and trained."""
    import numpy as np
    from retrieval_recall import read_set

    from compose.retriever.encoders import SentenceEncoder
    from compose.retriever.task_texts import split_tasks
    from compose.retriever.training import TrainingSettings, train_retriever
    from compose.retriever.training import measure as measure_encoder

    split = read_set(name, arguments.data).train
    texts: dict[str, list[str]] = defaultdict(list)
    for text, label in zip(split.texts, split.labels, strict=True):
        texts[label].append(text)
    generator = np.random.default_rng(seed)
    drawn = {}
    for label in sorted(texts):
        own = list(dict.fromkeys(texts[label]))
        drawn[label] = [own[index] for index in generator.permutation(len(own))[: arguments.inputs]]
    settings = TrainingSettings(rounds=arguments.rounds, seed=seed, device=arguments.device, max_length=64)
    with tempfile.TemporaryDirectory() as folder:
        _, report = train_retriever(drawn, settings, out=Path(folder) / "encoder", progress=_tell)
    bare = SentenceEncoder(prompt="", device=arguments.device)
    held = split_tasks(drawn, unseen=settings.unseen, held_out=settings.held_out, seed=seed)
    plain = measure_encoder(bare, held, replace(settings, prompt=""))
    head = {
        "set": name,
        "seed": seed,
        "inputs": arguments.inputs,
        "rounds": arguments.rounds,
        "steps": report["steps"],
    }
    found = (("no training", plain), ("no training, instruction", report["before"]), ("trained", report["after"]))
    return [{**head, "encoder": encoder, "recall": recall} for encoder, recall in found]


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one row per set, encoder and adapter embedding: top-1 and top-3 of seen and unseen intents."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["set"], row["encoder"]].append(row)
    print("| set | encoder | embedding | seen: top-1 | top-3 | unseen: top-1 | top-3 |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for (name, encoder), found in groups.items():
        for method in ("mean", "lda"):
            cells = [
                f"{100 * mean(row['recall'][group][method][top] for row in found):.1f}"
                for group in ("seen", "unseen")
                for top in ("top1", "top3")
            ]
            print(f"| {name} | {encoder} | {method} | {' | '.join(cells)} |")
    seeds = len({row["seed"] for row in rows})
    print(f"\nmeans of {seeds} seeds; {rows[0]['inputs']} utterances per intent, {rows[0]['rounds']} rounds")


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
