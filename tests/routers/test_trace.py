"""trace.json: the same trace back, other files refused; sums of two processes."""

import json
from pathlib import Path

import pytest
import torch

from compose.errors import IncompatibleError, UnknownNameError
from compose.routers.metrics import RoutingMeter
from compose.routers.routing import Decisions
from compose.routers.token_strip import StripLine, TokenStrip
from compose.routers.trace import RoutingTrace


def decisions(site: str, layer: int, seed: int) -> Decisions:
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(12, 3, generator=generator).softmax(-1)
    ones = torch.ones(12, dtype=torch.bool)
    tasks = torch.arange(12) % 3 - 1
    return Decisions(
        site, layer, probs.log(), probs, probs, ones, ones, tasks, tasks, torch.tensor([True, True, False]),
        rows_N=torch.arange(12) // 6,
    )  # fmt: skip


@pytest.fixture
def trace() -> RoutingTrace:
    meter = RoutingMeter(["a", "b", "c"], ["x", "y", "never"])
    meter.update([decisions("layers.0", 0, 0), decisions("layers.1", 1, 1)])
    lines = (StripLine("layers.0", 0, (0, 1), (0.5, 0.75)),)
    meter.keep(TokenStrip(name="one", tokens=("a", "é"), prompt_length=1, lines=lines))
    made = meter.trace({"preset": "molora", "base": "tiny"})
    object.__setattr__(made, "cosines", ((1.0, 0.25, None), (0.25, 1.0, None), (None, None, None)))
    return made


def test_save_and_load_give_the_same_trace(trace, tmp_path: Path) -> None:
    trace.save(tmp_path / "trace.json")
    trace.save(tmp_path / "trace.json")
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]
    back = RoutingTrace.load(tmp_path / "trace.json")
    assert back.to_json() == trace.to_json()
    for left, right in zip(trace.sites, back.sites, strict=True):
        assert torch.equal(left.sums_LC, right.sums_LC)
        assert trace.metrics(left.site) == back.metrics(left.site)
    assert back.seen_tasks() == ("x", "y")
    assert back.metrics("layers.0", "never") is None
    assert back.strips == trace.strips


def test_unknown_names_are_refused(trace) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown site 'layers\.2'; did you mean"):
        trace.metrics("layers.2")
    with pytest.raises(UnknownNameError, match="unknown task 'z'"):
        trace.metrics("layers.0", "z")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "no routing trace"),
        ({"version": 2}, "version 2; this program reads 1"),
        ({"experts": ["a"]}, "do not fit together"),
        ({"over": "prompt"}, "do not fit together"),
        ({"sites": [{"site": "s"}]}, "KeyError: 'available'"),
        ({"tasks": []}, "damaged"),
        ({"strips": [{}]}, "damaged"),
        ({"cosines": [["x"]]}, "damaged"),
        ({"gradients": {"s": {"total": 1}}}, "damaged"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_content_is_refused(trace, change, message) -> None:
    with pytest.raises(IncompatibleError, match=message):
        RoutingTrace.from_json({**trace.to_json(), **change})


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="no such file"):
        RoutingTrace.load(tmp_path / "trace.json")
    (tmp_path / "trace.json").write_text("{")
    with pytest.raises(IncompatibleError, match="no JSON"):
        RoutingTrace.load(tmp_path / "trace.json")
    (tmp_path / "trace.json").write_text("[]")
    with pytest.raises(IncompatibleError, match="no routing trace"):
        RoutingTrace.load(tmp_path / "trace.json")


def test_a_saved_trace_can_be_added_to(trace) -> None:
    meter = RoutingMeter(trace.experts, trace.tasks)
    meter.merge(RoutingTrace.from_json(json.loads(json.dumps(trace.to_json()))))
    meter.update([decisions("layers.0", 0, 2)])
    wanted = RoutingMeter(trace.experts, trace.tasks)
    wanted.update([decisions("layers.0", 0, 0), decisions("layers.1", 1, 1), decisions("layers.0", 0, 2)])
    for left, right in zip(meter.trace().sites, wanted.trace().sites, strict=True):
        torch.testing.assert_close(left.sums_LC, right.sums_LC)


WORKER = """
import sys, torch
sys.path.insert(0, sys.argv[3])
from test_trace import decisions
from compose.routers.metrics import RoutingMeter
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/store", rank=rank, world_size=2)
meter = RoutingMeter(["a", "b", "c"], ["x", "y"])
meter.update([decisions("layers.0", 0, rank)] + ([decisions("layers.1", 1, 5)] if rank else []))
meter.gather().trace().save(f"{sys.argv[2]}/trace{rank}.json")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_gather_the_sums_of_both(tmp_path: Path, warm_python) -> None:
    running = [warm_python.start(WORKER, rank, tmp_path, Path(__file__).parent) for rank in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0], [process.stderr for process in running]
    wanted = RoutingMeter(["a", "b", "c"], ["x", "y"])
    wanted.update([decisions("layers.0", 0, 0), decisions("layers.0", 0, 1), decisions("layers.1", 1, 5)])
    for rank in range(2):
        found = RoutingTrace.load(tmp_path / f"trace{rank}.json")
        assert [sums.site for sums in found.sites] == ["layers.0", "layers.1"]
        for left, right in zip(found.sites, wanted.trace().sites, strict=True):
            torch.testing.assert_close(left.sums_LC, right.sums_LC)
