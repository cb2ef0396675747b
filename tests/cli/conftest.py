"""A tiny random Llama with a character tokenizer, a bank of three adapters, examples; a way to call the program."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compose.adapter import Adapter, LowRank
from compose.formats.peft import write_adapter

COMPOSE = "from compose.cli.main import main; main()"
CHARACTERS = ["<pad>", "<eos>", " ", *"abcdefghijklmnopqrstuvwxyz:"]


class Workspace(NamedTuple):
    """Folders and files of one tiny problem."""

    base: Path
    bank: Path
    examples: Path
    test: Path


def save_base(folder: Path) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512}
    tokens = {"vocab_size": len(CHARACTERS), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens))
    model.save_pretrained(folder)
    core = Tokenizer(models.WordLevel({text: index for index, text in enumerate(CHARACTERS)}, unk_token=" "))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    return model


def make_adapter(name: str, rank: int, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    targets = {
        f"model.layers.{layer}.self_attn.{part}_proj": LowRank(
            torch.randn(rank, 16, generator=generator), torch.randn(16, rank, generator=generator), 0.5
        )
        for layer in range(2)
        for part in "qv"
    }
    return Adapter(name, "tiny-base", targets)


def write_lines(path: Path, pairs: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"input": given, "output": wanted}) + "\n" for given, wanted in pairs))
    return path


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root = tmp_path_factory.mktemp("workspace")
    save_base(root / "base")
    for seed, (name, rank) in enumerate({"alpha": 2, "beta": 4, "gamma": 2}.items()):
        write_adapter(make_adapter(name, rank, seed), root / "bank" / name)
    examples = write_lines(root / "few.jsonl", [("say a b:", "b a"), ("say c d:", "d c"), ("say e f:", "f e")])
    test = write_lines(root / "test.jsonl", [("say g h:", "h g"), ("say i j:", "j i")])
    return Workspace(root / "base", root / "bank", examples, test)


@pytest.fixture(scope="session")
def strong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank whose two adapters change what the tiny model says."""
    folder = tmp_path_factory.mktemp("strong")
    for seed, name in enumerate(("one", "two")):
        generator = torch.Generator().manual_seed(seed)
        targets = {
            f"model.layers.{layer}.mlp.down_proj": LowRank(
                torch.randn(2, 24, generator=generator), torch.randn(16, 2, generator=generator), 50.0
            )
            for layer in range(2)
        }
        write_adapter(Adapter(name, "tiny-base", targets), folder / name)
    return folder


@pytest.fixture
def search_options(workspace: Workspace) -> list[str]:
    """The options of a small search, all but ``--out``."""
    inputs = ["--base", str(workspace.base), "--bank", str(workspace.bank), "--examples", str(workspace.examples)]
    return ["search", *inputs, "--test", str(workspace.test), "--budget", "30"]


@pytest.fixture
def start_compose(warm_python):
    """Start the program in its own process, away from the checkout: ``start_compose("search", ...)``."""

    def start(*arguments: object, cwd: Path | str = "/", stdin: str = ""):
        return warm_python.start(COMPOSE, *arguments, cwd=cwd, stdin=stdin)

    return start


@pytest.fixture
def call(start_compose):
    """Run the program to its end; see `start_compose`."""

    def run(*arguments: object, **how: Any):
        process = start_compose(*arguments, **how)
        process.wait()
        return process

    return run
