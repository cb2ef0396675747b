"""Twenty inputs that would run code in a loader that trusts them, under an audit hook that sees code run.

The hook cannot be taken off again, so this runs in a process of its own (`tests.hostile.process.run_suite`). What the
same steps report for sound inputs is the baseline; an event beyond it is a failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compose.errors import ComposeError
from compose.fewshot.loading import load_model
from compose.formats import FORMATS
from compose.hub_index.unpickle_worker import convert
from compose.retriever.encoders import SentenceEncoder
from tests.hostile.adapters import files_of, lora_tensors, write
from tests.hostile.audit_hook import GADGETS, MODULE, Ears
from tests.hostile.figures import Figures
from tests.hostile.handmade_pickles import MARK, legacy_pickle, zip_pickle
from tests.hostile.ingesting import add
from tests.hostile.loading import load
from tests.hostile.recipes import merge_recipe


def run(folder: Path) -> Figures:
    """Load every canary and return what became of them; one that is heard, or leaves its mark, is a failure."""
    figures = Figures("S4")
    os.chdir(folder)
    steps = _steps(folder)
    ears = Ears()
    for run_one in _sound(folder):
        run_one()
        run_one()
    for name, step in steps.items():
        with ears.listening():
            figures.case(name, step, memory=True)
        if ears.heard:
            figures.other.append(f"{name}: {dict(ears.heard)}")
        if left := [str(path) for path in folder.rglob(f"*{MARK}*")]:
            figures.other.append(f"{name}: left {left}")
    return figures


def _steps(folder: Path) -> dict[str, Callable[[], object]]:
    """Write all canaries and return how each is opened."""
    (folder / "gadget.py").write_text(MODULE)
    steps: dict[str, Callable[[], object]] = {}
    for number, (name, make) in enumerate(GADGETS.items()):
        made = (legacy_pickle if number % 2 else zip_pickle)({"base_model.model.m.q.lora_A.weight": make()})
        steps[f"pickle: {name}"] = lambda data=made: _converted(data)  # type: ignore[misc]
    mapping = {"base_model_class": "X", "parent_library": "gadget"}
    steps["auto_mapping"] = _adapter(folder / "auto_mapping", auto_mapping=mapping)
    steps["megatron_core"] = _adapter(folder / "megatron_core", megatron_core="gadget", megatron_config={"a": 1})
    steps["modules.json"] = _modules(folder / "modules_json")
    steps["trust_remote_code"] = _remote_code(folder / "remote")
    steps["entry point"] = _entry_point(folder / "entry")
    steps["modules in the working folder"] = _shadowing(folder / "shadowing")
    steps["recipe with a tag"] = _recipe(folder / "tag", "method: !!python/object/apply:os.system ['true']\n")
    steps["recipe naming a function"] = _recipe(folder / "name", "method: os.system\nbase: gadget\n")
    return steps


def _sound(folder: Path) -> list[Callable[[], object]]:
    """The same steps with nothing wrong in them, and refusals: everything that is imported on the way is, after."""
    sound = write(folder / "sound", files_of(lora_tensors()))
    base = _base(folder / "base", {})
    weights = zip_pickle(lora_tensors())

    def refused(step: Callable[[], object]) -> Callable[[], object]:
        def attempt() -> None:
            with contextlib.suppress(ComposeError):
                step()

        return attempt

    return [
        lambda: load(sound),
        lambda: add(sound),
        lambda: convert(weights, 2**30),
        lambda: load_model(base),
        refused(_adapter(folder / "strange", peft_type="EVIL")),
        refused(lambda: convert(b"no pickle", 2**30)),
        refused(lambda: SentenceEncoder(write(folder / "no-encoder", {"modules.json": b"[]"}))),
        refused(lambda: load_model(write(folder / "no-base", {"config.json": b'{"model_type": "none"}'}))),
        refused(_recipe(folder / "wrong", "method: none\n")),
    ]


def _converted(data: bytes) -> None:
    """What the worker of ``--allow-pickle`` does with a file."""
    convert(data, 2**30)
    raise AssertionError("a pickle with a gadget was taken for tensors")


def _adapter(folder: Path, **fields: Any) -> Callable[[], object]:
    write(folder, files_of(lora_tensors(), **fields))

    def step() -> None:
        load(folder)
        add(folder)

    return step


def _modules(folder: Path) -> Callable[[], object]:
    """A list of classes, which sentence-transformers would import."""
    modules = [{"idx": 0, "name": "0", "path": "", "type": "gadget.Module"}]
    write(folder, {**files_of(lora_tensors()), "modules.json": json.dumps(modules).encode()})
    write(folder, {"gadget.py": MODULE.encode(), "config_sentence_transformers.json": b"{}"})

    def step() -> None:
        load(folder)
        add(folder)
        SentenceEncoder(folder)

    return step


def _base(folder: Path, more: dict[str, Any]) -> Path:
    """A tiny base model without a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="a").save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    return folder


def _remote_code(folder: Path) -> Callable[[], object]:
    """A base model whose configuration, model and tokenizer are classes of files beside it."""
    mapping = {"AutoConfig": "gadget.C", "AutoModelForCausalLM": "gadget.M", "AutoTokenizer": ["gadget.T", None]}
    _base(folder, {"model_type": "gadget", "auto_map": mapping, "trust_remote_code": True})
    write(folder, {"gadget.py": MODULE.encode()})
    return lambda: load_model(folder)


def _entry_point(folder: Path) -> Callable[[], object]:
    """An installed package that offers our formats, methods and commands under the names of ours."""
    info = folder / "gadget-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gadget\nVersion: 1.0\n")
    groups = ("compose.formats", "compose.merge_methods", "compose.routers", "compose.commands", "compose.plugins")
    (info / "entry_points.txt").write_text("".join(f"[{group}]\npeft = gadget_entry:run\n" for group in groups))
    (folder / "gadget_entry.py").write_text(MODULE)
    sound = write(folder / "sound", files_of(lora_tensors()))

    def step() -> None:
        sys.path.insert(0, str(folder))
        try:
            load(sound)
            assert FORMATS["peft"].__module__ == "compose.formats.peft"
        finally:
            sys.path.remove(str(folder))

    return step


def _shadowing(folder: Path) -> Callable[[], object]:
    """Modules called like those of ours and of what we import, in the adapter's folder, which is the current one."""
    names = ("torch", "json", "yaml", "safetensors", "compose", "peft", "kernels", "sitecustomize", "adapter_config")
    write(folder, {**files_of(lora_tensors()), **{f"{name}.py": MODULE.encode() for name in names}})

    def step() -> None:
        before = Path.cwd()
        os.chdir(folder)
        try:
            load(folder)
        finally:
            os.chdir(before)

    return step


def _recipe(folder: Path, text: str) -> Callable[[], object]:
    write(folder, {"recipe.yaml": f"bank: bank\nrank: 1\n{text}".encode()})
    (folder / "bank").mkdir()
    write(folder / "bank" / "one", files_of(lora_tensors()))
    return lambda: merge_recipe(folder / "recipe.yaml")
