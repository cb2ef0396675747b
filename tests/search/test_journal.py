import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from compose.errors import RunFolderError
from compose.search.evaluator import Budget
from compose.search.journal import Journal, JournalFile
from compose.search.objective import Evaluation
from compose.search.procedure import search
from compose.search.space import Space

SCRIPT = Path(__file__).parent / "data" / "killed_search.py"
AWKWARD = [0.1, 1 / 3, -0.0, 5e-324, 1.7976931348623157e308, np.nextafter(1.0, 2.0)]


class Counting:
    """Answers from a table of awkward numbers and counts its calls."""

    differentiable = True
    example_weights = np.ones(2)

    def __init__(self):
        self.calls = 0

    def __call__(self, weights, *, gradient=False, example_weights=None):
        self.calls += 1
        losses = np.array([[np.nan, np.inf], [AWKWARD[self.calls], -np.inf]])[: len(weights)]
        gradients = np.full(weights.shape, AWKWARD[self.calls]) if gradient else None
        return Evaluation(losses, gradients, AWKWARD[1] * len(weights))


def written(path, calls=2):
    """Write a journal of some calls and return the requests and answers."""
    weights = [np.array([AWKWARD[:3], AWKWARD[3:]]) / (i + 1) for i in range(calls)]
    with Journal(path, {"run": [1, 2]}) as journal:
        objective = journal.record(Counting())
        answers = [objective(w, gradient=True, example_weights=np.full((2, 2), 0.5)) for w in weights]
    return weights, answers


def test_evaluations_come_back_bit_for_bit_without_calling_the_objective(tmp_path):
    weights, answers = written(tmp_path / "j.jsonl")
    inner = Counting()
    with Journal(tmp_path / "j.jsonl", {"run": [1, 2]}, resume=True) as journal:
        objective = journal.record(inner)
        again = [objective(w, gradient=True, example_weights=np.full((2, 2), 0.5)) for w in weights]
        assert (inner.calls, journal.replayed) == (0, 4)
        objective(weights[0] + 1)
        assert inner.calls == 1
    for one, two in zip(answers, again, strict=True):
        assert one.losses.tobytes() == two.losses.tobytes()
        assert one.gradients.tobytes() == two.gradients.tobytes()
        assert one.cost == two.cost


def test_every_line_is_strict_json(tmp_path):
    written(tmp_path / "j.jsonl")

    def refuse(constant):
        raise AssertionError(constant)

    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "j.jsonl").read_text().splitlines()]
    assert lines[0] == {"compose_search_journal": 1, "fingerprint": {"run": [1, 2]}}
    assert lines[1]["losses"][0] == ["nan", "inf"]
    assert len(lines) == 3


def test_an_existing_file_needs_resume(tmp_path):
    written(tmp_path / "j.jsonl")
    with pytest.raises(RunFolderError, match="exists"):
        Journal(tmp_path / "j.jsonl", {"run": [1, 2]})


def test_another_runs_fingerprint_is_refused_and_the_difference_named(tmp_path):
    written(tmp_path / "j.jsonl")
    before = (tmp_path / "j.jsonl").read_bytes()
    with pytest.raises(RunFolderError, match=r"run was \[1, 2\], now \[1, 3\]; new was None, now 1"):
        Journal(tmp_path / "j.jsonl", {"run": [1, 3], "new": 1}, resume=True)
    assert (tmp_path / "j.jsonl").read_bytes() == before


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_torn_last_line_is_dropped_and_evaluated_again(tmp_path, cut, caplog):
    path = tmp_path / "j.jsonl"
    weights, answers = written(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    inner = Counting()
    inner.calls = 1  # the torn line was call 2
    with Journal(path, {"run": [1, 2]}, resume=True) as journal:
        objective = journal.record(inner)
        again = [objective(w, gradient=True, example_weights=np.full((2, 2), 0.5)) for w in weights]
    assert inner.calls == 2
    assert "torn" in caplog.text
    assert again[1].losses.tobytes() == answers[1].losses.tobytes()
    lines = path.read_bytes().splitlines()
    assert lines[:2] == whole.splitlines()[:2]
    assert len(lines) == 3


def test_a_torn_header_is_written_again(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"compose_search_jou')
    with Journal(path, {"run": 1}, resume=True):
        pass
    assert json.loads(path.read_text())["fingerprint"] == {"run": 1}


@pytest.mark.parametrize("content", [b"my thesis, unfinished", b"[1, 2]\n", b'{"a": 1}\n'])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path, content):
    path = tmp_path / "j.jsonl"
    path.write_bytes(content)
    with pytest.raises(RunFolderError, match="not a search journal"):
        Journal(path, {}, resume=True)
    assert path.read_bytes() == content


@pytest.mark.parametrize("damage", [b"{{{}\n", b"{}\n", b"[]\n", b'{"weights":\n'])
def test_damage_before_the_last_line_is_an_error_that_names_the_line(tmp_path, damage):
    path = tmp_path / "j.jsonl"
    written(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + damage + lines[2])
    with pytest.raises(RunFolderError, match="line 2"):
        Journal(path, {"run": [1, 2]}, resume=True)


def replay_once(path, weights, *, gradient=True, example_weights=None):
    with Journal(path, {"run": [1, 2]}, resume=True) as journal:
        return journal.record(Counting())(weights, gradient=gradient, example_weights=example_weights)


def test_requests_that_differ_by_more_than_1e9_are_refused(tmp_path):
    path = tmp_path / "j.jsonl"
    weights = np.array([[0.5, 0.25]])
    with Journal(path, {"run": [1, 2]}) as journal:
        journal.record(Counting())(weights)
    replay_once(path, weights + 0.9e-9, gradient=False)
    with pytest.raises(RunFolderError, match=r"line 2: its weights differ .* by up to 1\.1e-09"):
        replay_once(path, weights + 1.1e-9, gradient=False)
    with pytest.raises(RunFolderError, match="weights are not of shape"):
        replay_once(path, np.zeros((1, 3)), gradient=False)
    with pytest.raises(RunFolderError, match="asks for gradient=True"):
        replay_once(path, weights)
    with pytest.raises(RunFolderError, match="one side only"):
        replay_once(path, weights, gradient=False, example_weights=np.ones((1, 2)))


def test_two_processes_cannot_share_a_journal(tmp_path):
    with (
        Journal(tmp_path / "j.jsonl", {}),
        pytest.raises(RunFolderError, match="in use"),
    ):
        Journal(tmp_path / "j.jsonl", {}, resume=True)
    Journal(tmp_path / "j.jsonl", {}, resume=True).close()


def test_a_write_that_fails_half_way_leaves_no_torn_line(tmp_path, monkeypatch):
    path = tmp_path / "j.jsonl"
    real = os.write
    with Journal(path, {}) as journal:
        objective = journal.record(Counting())
        objective(np.zeros((1, 2)))
        before = path.read_bytes()

        def half(fd, data):
            real(fd, bytes(data)[: len(data) // 2])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space"):
            objective(np.ones((1, 2)))
        monkeypatch.undo()
        assert path.read_bytes() == before


def test_each_evaluation_is_synced_before_it_is_answered(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_size), real(fd)))
    with Journal(tmp_path / "j.jsonl", {}) as journal:
        journal.record(Counting())(np.zeros((1, 2)))
        assert synced[-1] == (tmp_path / "j.jsonl").stat().st_size


class Interrupted(Counting):
    def __init__(self, inner, after):
        self.inner = inner
        self.example_weights = inner.example_weights
        self.left = after

    def __call__(self, weights, *, gradient=False, example_weights=None):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.inner(weights, gradient=gradient, example_weights=example_weights)


@pytest.mark.parametrize("strategy", ["auto", "cma", "cobyla", "gradient", "greedy", "random"])
def test_an_interrupted_search_resumes_to_the_same_result(tmp_path, strategy, quadratic):
    space = Space(num_adapters=5, num_groups=2, l1=0.01)
    settings = {"strategy": strategy, "budget": Budget(cost=150), "seed": 2}

    def objective():
        return quadratic(np.linspace(-0.6, 0.9, 10), noise=0.3)

    whole = search(objective(), space, **settings)
    path = tmp_path / "j.jsonl"
    for after in (0, 2, 1):
        with pytest.raises(KeyboardInterrupt):
            search(Interrupted(objective(), after), space, journal=JournalFile(path=path, resume=True), **settings)
    inner = objective()
    resumed = search(inner, space, journal=JournalFile(path=path, resume=True), **settings)
    assert resumed.replayed > 0
    assert sum(len(weights) for weights, _, _ in inner.calls) == resumed.evaluations - resumed.replayed
    assert resumed.weights.tobytes() == whole.weights.tobytes()
    assert resumed.per_example.tobytes() == whole.per_example.tobytes()
    for name in ("value", "history", "choice", "why", "stages", "guard", "evaluations", "cost"):
        assert getattr(resumed, name) == getattr(whole, name), name


def test_resuming_with_other_options_is_refused(tmp_path, quadratic):
    journal = JournalFile(path=tmp_path / "j.jsonl", fingerprint={"bank": "abc"})
    search(quadratic([0.5]), Space(num_adapters=1), strategy="greedy", journal=journal)
    for change, word in (({"seed": 1}, "seed"), ({"budget": Budget(cost=3)}, "budget.cost")):
        with pytest.raises(RunFolderError, match=word):
            search(
                quadratic([0.5]),
                Space(num_adapters=1),
                strategy="greedy",
                journal=JournalFile(path=journal.path, fingerprint={"bank": "abc"}, resume=True),
                **change,
            )
    with pytest.raises(RunFolderError, match=r"given\.bank was 'abc', now 'xyz'"):
        search(
            quadratic([0.5]),
            Space(num_adapters=1),
            strategy="greedy",
            journal=JournalFile(path=journal.path, fingerprint={"bank": "xyz"}, resume=True),
        )


@pytest.mark.skipif(sys.platform == "win32", reason="uses fork and SIGKILL")
@pytest.mark.parametrize(
    ("strategy", "kills", "seed", "pause"), [("auto", 10, 0, 0.01), ("cma", 10, 1, 0.01), ("cobyla", 10, 2, 0.002)]
)
def test_kills_at_random_moments_change_nothing(tmp_path, strategy, kills, seed, pause):
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), strategy, str(kills), str(seed), str(pause)],
        capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["resumed"] == report["whole"]
    # Every kill hit a search under way: after a recorded evaluation and before the end, each time further on.
    assert report["sizes"] == sorted(set(report["sizes"]))
    assert report["sizes"][0] > 0
    assert report["sizes"][-1] < report["end"]
