"""The search for block sizes, with a clock that is made up."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from compose.errors import UnknownNameError
from compose.kernels import tune as tuner
from compose.kernels.packed import front, tables, timer, trials, tuning
from compose.kernels.packed.search import Space, search
from compose.kernels.packed.tuning import RowsConfig


class Config(NamedTuple):
    a: int
    b: int
    c: int


SPACE = Space(({"a": (1, 2, 3), "b": (1, 2)}, {"c": (1, 2, 3)}), ("a",), lambda one: (one.a, one.b) != (2, 2))


def test_groups_are_searched_one_after_the_other():
    tried = []

    def measure(config):
        tried.append(config)
        return [abs(config.a - 3) + abs(config.b - 2) + abs(config.c - 2) + 1.0]

    found = search(SPACE, Config(1, 1, 1), measure)
    assert found.config == Config(3, 2, 2)
    assert len(tried) == len(set(tried))  # nothing is measured twice
    assert Config(2, 2, 1) not in tried
    assert len(found.candidates) == len(tried)
    assert {"config": {"a": 3, "b": 2, "c": 2}, "us": [1e6]} in found.candidates


def test_times_count_relative_to_those_to_begin_with():
    times = {1: [1e-6, 100e-6], 2: [0.5e-6, 110e-6], 3: [2e-6, 60e-6]}
    space = Space(({"a": (1, 2, 3)},))
    assert search(space, Config(1, 0, 0), lambda one: times[one.a]).config.a == 2


def test_what_is_hardly_better_is_noise():
    space = Space(({"a": (1, 2)},))
    assert search(space, Config(1, 0, 0), lambda one: [1.0 if one.a == 1 else 0.995]).config.a == 1


def test_what_cannot_run_is_recorded_and_not_chosen():
    found = search(SPACE, Config(1, 1, 1), lambda one: "too large" if one.a == 3 else [1.0 / one.a])
    assert found.config.a == 2
    assert {"config": {"a": 3, "b": 1, "c": 1}, "refused": "too large"} in found.candidates
    with pytest.raises(RuntimeError, match="begin with cannot be used: too large"):
        search(SPACE, Config(3, 1, 1), lambda one: "too large")


def test_all_candidates_include_those_of_every_linked_number():
    everything = SPACE.all(Config(1, 1, 1))
    assert Config(3, 1, 2) in everything  # c for another a
    assert len(everything) == len(set(everything))


TINY = replace(trials.TRIALS[0], name="tiny", lead=((1,), (3,)), ranks=(4,) * 300, width=32, out=16)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """One small trial, few candidates, the CPU, a table in a temporary folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(trials, "TRIALS", (TINY,))
    space = Space(({"splits": (1, 2), "bk": (16, 32)}, {"bn": (16,)}), ("splits",))
    monkeypatch.setattr(trials, "space", lambda trial, dtype: space)
    tuning.forget()
    yield {"device": "cpu", "dtype": torch.float32, "device_name": "Imaginary GPU 9"}
    tuning.forget()


def test_the_fastest_is_written_and_used(tiny, monkeypatch):
    seen = []

    def clock(calls):
        config = tuning.rows_config(torch.float32, torch.device("cpu"), 32, 16, 16, 4, 1)
        seen.append((config, len(calls)))
        assert all(torch.isfinite(call()).all() for call in calls)
        return 1e-6 if (config.splits, config.bk) == (2, 16) else 2e-6

    path = tuner.tune(timer=clock, **tiny)
    assert path == tables.cache_folder() / "imaginary_gpu_9.json"
    assert {count for _, count in seen} == {2}
    (entry,) = json.loads(path.read_text())["entries"]
    assert (entry["kind"], entry["exact"], entry["sizes"]) == ("rows", [16, 1], [32, 16, 4])
    assert (entry["config"]["splits"], entry["config"]["bk"], entry["us"]) == (2, 16, [1.0, 1.0])
    assert len(entry["candidates"]) >= 4
    monkeypatch.setattr(tuning.torch.cuda, "get_device_name", lambda device: "Imaginary GPU 9")
    used = tuning.rows_config(torch.float32, torch.device("cuda", 0), 32, 16, 16, 4, 1)
    assert (used.splits, used.bk) == (2, 16)


def test_a_table_is_never_wider_than_a_shape(tiny, monkeypatch):
    big = RowsConfig(16, 256, 512, 16, 16, 2, 2)
    tables.save("Imaginary GPU 9", [{"kind": "rows", "dtype": "float32", "exact": [16, 1], "sizes": [64, 64, 4],
                                     "config": big._asdict(), "us": [1.0], "candidates": []}])  # fmt: skip
    monkeypatch.setattr(tuning.torch.cuda, "get_device_name", lambda device: "Imaginary GPU 9")
    used = tuning.rows_config(torch.float32, torch.device("cuda", 0), 40, 20, 16, 4, 1)
    assert (used.splits, used.bk, used.bn) == (1, 64, 32)


def test_wrong_results_are_not_used(tiny, monkeypatch):
    original = front.forward

    def spoiled(x, *rest, **options):
        y = original(x, *rest, **options)
        return y * 2 if tuning._trying["rows"].splits == 2 else y

    monkeypatch.setattr(trials, "forward", spoiled)
    path = tuner.tune(timer=lambda calls: 1.0 / tuning._trying["rows"].splits, **tiny)
    (entry,) = json.loads(path.read_text())["entries"]
    assert entry["config"]["splits"] == 1
    assert any("of the norm away" in one.get("refused", "") for one in entry["candidates"])


def test_nothing_is_tuned_while_a_graph_is_captured(tiny, monkeypatch):
    monkeypatch.setattr(timer.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(timer.torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        tuner.tune(timer=lambda calls: 1.0, **tiny)
    assert not tables.cache_folder().exists()


def test_without_a_gpu_there_is_nothing_to_measure(tiny):
    with pytest.raises(RuntimeError, match="on a GPU, not on cpu"):
        tuner.tune(**tiny)
    with pytest.raises(UnknownNameError, match="unknown trial 'large'; known: tiny"):
        tuner.tune(names=["large"], timer=lambda calls: 1.0, **tiny)


def test_compiling_runs_every_candidate_once(tiny, monkeypatch):
    ran = []
    original = front.forward
    monkeypatch.setattr(
        trials, "forward", lambda *rest, **more: ran.append(tuning._trying["rows"]) or original(*rest, **more)
    )
    for share in range(2):
        tuner.compile_share(share, 2, device="cpu", dtype=torch.float32, names=())
    everything = trials.space(TINY, torch.float32).all(TINY.start(torch.float32, torch.device("cpu")))
    assert sorted(set(ran)) == sorted(everything)


def test_configurations_under_trial_are_gone_afterwards():
    given = RowsConfig(1, 16, 16, 16, 16, 1, 1)
    arguments = (torch.float32, torch.device("cpu"), 4096, 4096, 16, 16, 1)
    before = tuning.rows_config(*arguments)
    with tuning.trying({"rows": given}):
        assert tuning.rows_config(*arguments) == given
    assert tuning.rows_config(*arguments) == before


def test_every_trial_knows_its_place_in_a_table():
    names = [trial.name for trial in trials.TRIALS]
    assert len(set(names)) == len(names)
    keys = {(trial.kind, trial.exact, trial.sizes) for trial in trials.TRIALS}
    assert len(keys) == len(names)
    for trial in trials.TRIALS:
        start = trial.start(torch.bfloat16, torch.device("cpu"))
        assert type(start) is tuning.CONFIGS[trial.kind]
        assert len(trials.space(trial, torch.bfloat16).all(start)) > 4


def test_the_command_says_what_is_wrong_in_one_line():
    command = [sys.executable, "-P", "-m", "compose.kernels.tune", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "block sizes are measured on a GPU, not on cpu; give a CUDA device"
