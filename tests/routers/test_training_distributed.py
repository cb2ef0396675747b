"""Two processes over gloo, as ``torchrun`` starts them: equal weights in both, and those of one process.

The model is in float64: Adam makes steps of one size from gradients of any size, those that are only rounding too.
"""

import os
import socket

import pytest
import torch

from compose.routers.training import train
from tests.routers.train_cases import SPECS, LetterTokenizer, attached_bank, records

PROGRAM = """
import sys, torch
sys.path.insert(0, {root!r})
from torch import distributed
from tests.conftest import TINY_MODELS
from tests.routers.train_cases import SPECS, LetterTokenizer, attached_bank, records
from compose.routers.training import train
torch.set_num_threads(1)
distributed.init_process_group("gloo")
torch.manual_seed(0)
model = TINY_MODELS["llama"]().eval().double()
torch.manual_seed(distributed.get_rank())
for name in {names!r}:
    attached = attached_bank(model)
    result = train(attached, SPECS[name], records(), tokenizer=LetterTokenizer(), checkpoint_dir={out!r} + "/" + name,
                   **{options!r})
    torch.save((result.routed.state_dict(), result.history), f"{out}/{{name}}-{{distributed.get_rank()}}.pt")
    attached.detach()
distributed.destroy_process_group()
"""
OPTIONS = {"steps": 4, "batch_size": 8, "accumulation": 2, "learning_rate": 0.01, "seed": 5}
NAMES = ("router", "both")


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path, tiny_model, request, warm_python) -> None:
    program = PROGRAM.format(root=str(request.config.rootpath), out=str(tmp_path), names=NAMES, options=OPTIONS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = [
        warm_python.start(program, env={**os.environ, **world, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"
    ]
    for process in running:
        assert process.wait() == 0, process.stderr[-3000:]
    for name in NAMES:
        (first, history), (second, same) = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1))
        for key, value in first.items():
            torch.testing.assert_close(second[key], value, rtol=0, atol=0)
        assert history == same
        attached = attached_bank(tiny_model("llama").double())
        alone = train(attached, SPECS[name], records(), tokenizer=LetterTokenizer(), **OPTIONS)
        for key, value in alone.routed.state_dict().items():
            torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-6)
        for one, other in zip(alone.history, history, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
            assert one["aux_loss"] == pytest.approx(other["aux_loss"], rel=1e-5)
            assert one["load"] == pytest.approx(other["load"], rel=1e-6)
            assert one["tokens"] == other["tokens"]
        assert [path.name for path in (tmp_path / name).iterdir()] == ["step-000000004"]
