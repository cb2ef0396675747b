"""Strategies for configurations and recipes that nobody would write, and what is done with those that are accepted."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import hypothesis
import yaml
from hypothesis import strategies as st

from compose.bank import Bank
from compose.engine.merge import merge
from compose.formats import format_of
from compose.formats.peft import adapter_files
from compose.formats.peft_refusals import KNOWN_FIELDS, LYCORIS_FIELDS
from compose.merging.method import METHODS
from tests.hostile.adapters import CONFIG_NAME, SEEDS, files_of, lora_tensors, seed_files, write
from tests.hostile.figures import Figures
from tests.hostile.loading import check
from tests.hostile.recipes import check_merged, merge_recipe

NAMES = (
    "q",
    "v",
    "m.layers.0.q",
    "layers.0.v",
    "^m.layers.0.q",
    "embed_tokens",
    "score",
    "all-linear",
    ".*",
    "(a+)+$",
)
STEPS = ("sweeps", "max_iter")  # of a loop that the user asks for: small numbers only
KINDS = [kind for kind in SEEDS if CONFIG_NAME in seed_files(kind)]

whole = st.integers(-3, 70) | st.sampled_from([2**31, 2**53, 2**63, 2**64, 10**30, 10**400, 65_536, -(2**63)])
real = st.floats(-100, 100) | st.sampled_from([math.nan, math.inf, 1e-300, 1e30, 1e300, -0.0, 5e-324, 1e308])
words = st.sampled_from([*NAMES, "", "none", "LORA", "../..", "\x1b[31m", "\ud800", "a" * 5000])
text = words | words | st.text(st.characters(codec="ascii") | st.sampled_from("\u202eé\ud83d\0"), max_size=6)
scalar = st.none() | st.booleans() | whole | real | text
nested = st.recursive(
    scalar, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=4
)
patterns = st.dictionaries(st.sampled_from(NAMES) | text, st.integers(1, 4) | whole | real, max_size=4)
names = st.lists(st.sampled_from(NAMES) | text, max_size=4)
likely = st.sampled_from(
    [
        ("r", st.integers(1, 4) | whole),
        ("lora_alpha", st.integers(1, 64) | real | whole),
        ("alpha", real | whole),
        ("init_r", st.integers(1, 4) | whole),
        ("rank_pattern", patterns),
        ("alpha_pattern", patterns),
        ("target_modules", names | text),
        ("exclude_modules", names | text),
        ("modules_to_save", names),
        ("layers_to_transform", st.lists(st.integers(0, 3) | whole, max_size=3) | whole),
        ("layers_pattern", names | text),
        ("use_rslora", st.booleans()),
        ("use_dora", st.booleans()),
        ("peft_type", st.sampled_from(["LORA", "ADALORA", "VERA", "LOHA", "LOKR", "IA3", "DORA"]) | scalar),
        ("task_type", st.sampled_from(["CAUSAL_LM", "SEQ_CLS"])),
        ("init_lora_weights", st.sampled_from([True, False, "gaussian", "pissa", None])),
        ("projection_prng_key", whole),
        ("save_projection", st.booleans()),
        ("base_model_name_or_path", text),
    ]
).flatmap(lambda field: st.tuples(st.just(field[0]), field[1]))
anything = st.tuples(st.sampled_from(sorted(KNOWN_FIELDS | LYCORIS_FIELDS)) | text, nested)
edits = st.lists(likely | anything, min_size=1, max_size=4)


def _options(method: str) -> list[str]:
    return [field.name for field in fields(METHODS[method])]  # type: ignore[arg-type]


numbers = real | whole
weights = (
    st.none()
    | text
    | st.sampled_from(["one", "one - two", "1e300*one + 1e300*two", "0.5*one + nan*two", "9" * 400 + "*one"])
    | st.dictionaries(
        st.sampled_from(["one", "two", "*"]) | text,
        real
        | whole
        | st.dictionaries(st.sampled_from(["*", "m.*", "*.q", "[", "**"]) | text, real | whole, max_size=3),
        max_size=3,
    )
)
option_values = st.floats(0, 1) | real | whole | st.booleans() | st.sampled_from(["sum", "count", "weighted", "paper"])


@st.composite
def recipe(draw: st.DrawFn) -> dict[str, Any]:
    """A recipe beside a bank of two adapters; half of them have nothing strange but options of their method."""
    method = draw(st.sampled_from(sorted(METHODS)))
    made: dict[str, Any] = {"bank": "bank", "method": method, "rank": draw(st.integers(1, 3))}
    for name in draw(st.lists(st.sampled_from(_options(method) or ["none"]), max_size=2, unique=True)):
        made.setdefault("options", {})[name] = draw(st.integers(-2, 9) if name in STEPS else option_values)
    strange = {
        "weights": weights, "rank": whole | real, "energy": st.floats(0, 1) | real, "seed": whole,
        "space": st.sampled_from(["full", "knots", "core"]), "device": st.sampled_from(["cpu", "meta", "cuda:9"]),
        "method": text, "options": nested, "bank": text | names, "base": text, "data": text, "merge_method": text,
    }  # fmt: skip
    for key in draw(st.just([]) | st.lists(st.sampled_from(sorted(strange)), max_size=3)):
        made[key] = draw(strange[key])
    if draw(st.integers(0, 19)) == 0:
        made[draw(text)] = draw(nested)
    return made


def run_configs(volume: int, seed: int, folder: Path, *, strict: bool = False) -> Figures:
    """Load sound weights under ``volume`` drawn configurations, and merge what is accepted with a sound adapter.

    Args:
        volume: Examples.
        seed: Of the examples.
        folder: Where to write.
        strict: Raise at a failing example, made small, instead of counting it.
    """
    figures = Figures("S3 configurations")
    (folder / "bank").mkdir()
    partner = write(folder / "bank" / "sound", files_of(lora_tensors(seed=1)))
    sound = format_of(partner).inspect(partner)
    places = {kind: write(folder / kind.replace(" ", "-"), seed_files(kind)) for kind in KINDS}

    def one(example: tuple[str, list[tuple[str, Any]], int]) -> None:
        kind, changes, damage = example
        config = {**json.loads(seed_files(kind)[CONFIG_NAME]), **dict(changes)}
        (places[kind] / CONFIG_NAME).write_bytes(_damaged(json.dumps(config).encode(), damage))
        both = Bank.open([partner, places[kind]], names=["sound", "drawn"], base="toy")
        check(both, {"sound": sound, "drawn": format_of(places[kind]).inspect(places[kind])})
        merged = merge(both, "sum", {"sound": 0.5, "drawn": -0.5})
        check_merged(merged.adapter, both)
        adapter_files(merged.adapter)

    damages = st.integers(-20, 2**30)
    _drive(st.tuples(st.sampled_from(KINDS), edits, damages), one, volume, seed, figures, strict)
    return figures


def run_recipes(volume: int, seed: int, folder: Path, *, strict: bool = False) -> Figures:
    """Run ``volume`` drawn recipes of merges, as YAML or JSON; see `run_configs`."""
    figures = Figures("S3 recipes")
    (folder / "bank").mkdir()
    for number, name in enumerate(("one", "two")):
        write(folder / "bank" / name, files_of(lora_tensors(seed=number)))

    def one(example: tuple[dict[str, Any], bool, int]) -> None:
        made, as_yaml, damage = example
        written = yaml.dump(made, allow_unicode=False) if as_yaml else json.dumps(made)
        (folder / "recipe.yaml").write_bytes(_damaged(written.encode(), damage))
        merge_recipe(folder / "recipe.yaml")

    _drive(st.tuples(recipe(), st.booleans(), st.integers(-20, 2**30)), one, volume, seed, figures, strict)
    return figures


def _damaged(content: bytes, number: int) -> bytes:
    """Return the text; for one in ten numbers above 0, with a byte changed or left out."""
    if number <= 0 or number % 10:
        return content
    draw = random.Random(number)
    changed = bytearray(content)
    at = draw.randrange(len(changed))
    changed[at : at + draw.randint(0, 2)] = draw.choice((b"", b'"', b"{", b"]", b":", b"\xff", b"9" * 20, b"\n"))
    return bytes(changed)


def _drive(
    strategy: st.SearchStrategy[Any],
    one: Callable[[Any], None],
    volume: int,
    seed: int,
    figures: Figures,
    strict: bool,
) -> None:
    """Run hypothesis over a strategy, each example counted."""

    def body(example: Any) -> None:
        before = len(figures.other)
        figures.case(repr(example)[:300], lambda: one(example))
        if strict:
            assert len(figures.other) == before, figures.other[-1]

    shrinks = [hypothesis.Phase.shrink] if strict else []
    settings = hypothesis.settings(
        max_examples=volume,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate, *shrinks],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    with figures.whole():
        settings(hypothesis.seed(seed)(hypothesis.given(strategy)(body)))()
