"""Adapters of an index, made from their number alone, so that any process can say what a record has to be."""

from __future__ import annotations

import hashlib
import random
import struct
from dataclasses import replace

from compose.hub_index.records import (
    AdapterRecord,
    AuditFinding,
    EmbeddingRecord,
    ExampleRecord,
    LineageRecord,
    ModuleRecord,
    ScoreRecord,
    StatRecord,
)

WORDS = (
    "summarise", "translate", "answer", "classify", "rewrite", "explain", "continue", "correct", "extract", "compare",
    "news", "dialogue", "sql", "maths", "poems", "french", "german", "spanish", "code", "tables", "reviews", "letters",
    "questions", "recipes", "contracts", "emails", "headlines", "tweets", "proofs", "logs",
)  # fmt: skip
LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "llama3")
TASKS = ("boolq", "piqa", "gsm8k", "xsum", "rte", "wic", "squad", "mmlu", "copa", "anli")
BASES = 7
ENCODER, ENCODER_SHA256 = "benchmark-encoder", "ab" * 32


def sha256(text: str) -> str:
    """Return a hash that stands for the bytes of some file."""
    return hashlib.sha256(text.encode()).hexdigest()


def vector(seed: object, entries: int = 16) -> EmbeddingRecord:
    """Return a vector of normal numbers, the same for the same seed."""
    draw = random.Random(f"vector {seed}")
    values = struct.pack(f"<{entries}f", *(draw.gauss(0, 1) for _ in range(entries)))
    return EmbeddingRecord(
        encoder_id=ENCODER, encoder_sha256=ENCODER_SHA256, kind="card", prompt="Represent: ", vector=values
    )


def make_record(number: int, *, modules: int = 4, entries: int = 16) -> AdapterRecord:
    """Return adapter ``number`` with ``modules`` targets and, where ``entries`` is not 0, a vector of so many."""
    draw = random.Random(f"adapter {number}")
    title = " ".join(draw.sample(WORDS, 3))
    rank = 4 << (number % 5)
    return AdapterRecord(
        name=f"adapter-{number:07d}",
        sha256_weights=sha256(f"weights {number}"),
        sha256_config=sha256(f"config {number}"),
        source="hub",
        repo_id=f"owner-{number % 97}/adapter-{number}",
        revision=sha256(f"revision {number}")[:40],
        path=f"adapters/{number}",
        format="peft-safetensors",
        num_bytes=2048 * modules * rank,
        num_tensors=2 * modules,
        num_params=1024 * modules * rank,
        dtype="BF16",
        base_id=f"organisation/base-{number % BASES}",
        base_fingerprint=sha256(f"base {number % BASES}"),
        peft_type="LORA",
        task_type="CAUSAL_LM",
        rank_min=rank,
        rank_max=rank,
        scaling={"": 2.0},
        title=title,
        summary=f"An adapter that can {title}, trained on {' '.join(draw.choices(WORDS, k=12))}.",
        license=LICENSES[number % len(LICENSES)],
        language=("en",),
        tags=("lora", draw.choice(WORDS)),
        datasets=(f"data-{number % 50}",),
        train_seed=number,
        hyper={"learning_rate": 2e-4, "epochs": 3},
        modules=tuple(_module(layer, rank) for layer in range(modules)),
        examples=(ExampleRecord(input=f"Please {title}: {number}", target="done"),),
        scores=(ScoreRecord(task=TASKS[number % len(TASKS)], metric="accuracy", value=draw.random(), n=100),),
        parents=(LineageRecord(parent_sha256=sha256(f"parent {number}"), weight=0.5, method="ties"),),
        stats=(StatRecord(module="layers.0", sigma1=1.0, fro=2.0, energy1=0.25, spec_entropy=1.5, kurtosis=3.0),),
        findings=(AuditFinding(rule="card.license", severity="info", detail="stated", at="2026-01-01"),),
        embeddings=(vector(number, entries),) if entries else (),
    )


def same(found: AdapterRecord, wanted: AdapterRecord) -> bool:
    """Return whether a record read from an index is the one that was added."""
    return replace(found, added_at="") == wanted


def number_of(name: str) -> int:
    """Return the number of a record of this module by its name."""
    return int(name.rpartition("-")[2])


def _module(layer: int, rank: int) -> ModuleRecord:
    return ModuleRecord(
        name=f"model.layers.{layer}.self_attn.q_proj", in_features=512, out_features=512, rank=rank, scaling=2.0
    )
