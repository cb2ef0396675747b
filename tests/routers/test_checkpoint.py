"""Checkpoints: the latest is kept, others' and damaged ones are refused."""

import json

import pytest
import torch

from compose.errors import AdapterFormatError, ComposeError, RunFolderError
from compose.routers.checkpoint import (
    Position,
    latest_checkpoint,
    read_position,
    restore_checkpoint,
    write_checkpoint,
)
from compose.routers.gates.linear import LinearGate
from compose.routers.optimiser import Optimiser
from compose.routers.spec import MixtureSpec

SPEC = MixtureSpec(gate=LinearGate(init="normal"))
FINGERPRINT = {"settings": {"seed": 1, "betas": [0.9, 0.99]}, "data": "abc"}


@pytest.fixture
def begun(routed_over):
    """A mixture and its optimiser, after one step."""
    routed = routed_over("llama", SPEC)
    optimiser = Optimiser(routed.trained_parameters())
    for parameter in routed.trained_parameters().values():
        parameter.grad = torch.ones_like(parameter)
    optimiser.set_rates(0.1, 0.1)
    optimiser.step(None)
    return routed, optimiser


def test_only_the_latest_is_kept(begun, tmp_path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    (tmp_path / "step-x").mkdir()
    for step in (2, 10, 11):
        write_checkpoint(tmp_path, *begun, Position(step, 0, [{"step": step}]), FINGERPRINT)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000000011"
    assert {path.name for path in tmp_path.iterdir()} == {"step-x", "step-000000011"}
    assert read_position(tmp_path / "step-000000011", FINGERPRINT) == Position(11, 0, [{"step": 11}])


def test_tensors_come_back(begun, routed_over, tmp_path) -> None:
    routed, optimiser = begun
    path = write_checkpoint(tmp_path, routed, optimiser, Position(1, 0, []), FINGERPRINT)
    wanted, state = {key: value.clone() for key, value in routed.state_dict().items()}, optimiser.state()
    for parameter in routed.trained_parameters().values():
        parameter.data.zero_()
    fresh = Optimiser(routed.trained_parameters())
    restore_checkpoint(path, routed, fresh)
    for key, value in routed.state_dict().items():
        assert torch.equal(value, wanted[key])
    assert fresh.state().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in fresh.state().items())
    other = routed_over("llama", MixtureSpec(gate=LinearGate(bias=True)))
    with pytest.raises(AdapterFormatError, match="is not this one"):
        restore_checkpoint(path, other, None)


def test_another_run_is_told_by_what_differs(begun, tmp_path) -> None:
    path = write_checkpoint(tmp_path, *begun, Position(1, 0, []), FINGERPRINT)
    now = {"settings": {"seed": 2, "betas": [0.9, 0.95]}, "data": "abc", "more": 1}
    words = r"more was null, is 1; settings.betas\[1\] was 0.99, is 0.95; settings.seed was 1, is 2"
    with pytest.raises(RunFolderError, match=words):
        read_position(path, now)


@pytest.mark.parametrize("change", [{"version": 9}, {"step": "1"}, {"step": -1}, {"history": None}])
def test_damaged_checkpoints_are_refused(change, begun, tmp_path) -> None:
    path = write_checkpoint(tmp_path, *begun, Position(1, 0, []), FINGERPRINT)
    file = path / "training.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ComposeError):
        read_position(path, FINGERPRINT)
