"""Warm processes: their own streams, arguments, folder and environment, and ends like those of an interpreter."""

import os
import signal
import time
from pathlib import Path


def test_a_program_has_its_own_everything(warm_python, tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "print(__name__, sys.argv, os.getcwd(), os.environ['ONLY'], len(os.environ), sys.stdin.read())\n"
        "print('é', file=sys.stderr)"
    )
    done = warm_python.run(code, "one", 2, cwd=tmp_path, env={"ONLY": "here"}, stdin="said")
    assert (done.returncode, done.stderr) == (0, "é\n")
    assert done.stdout == f"__main__ ['-c', 'one', '2'] {tmp_path} here 1 said\n"
    assert "ONLY" not in os.environ


def test_nothing_of_ours_is_imported_and_nothing_is_left_behind(warm_python) -> None:
    code = "import sys; print([name for name in sys.modules if name.startswith('compose')]); import compose.bank"
    assert [warm_python.run(code).stdout for _ in range(2)] == ["[]\n", "[]\n"]


def test_exit_codes_are_those_of_an_interpreter(warm_python) -> None:
    assert warm_python.run("import sys; sys.exit(3)").returncode == 3
    failed = warm_python.run("print('before'); 1 / 0")
    assert (failed.returncode, failed.stdout) == (1, "before\n")
    assert failed.stderr.rstrip().endswith("ZeroDivisionError: division by zero")
    ended = warm_python.run("import atexit; atexit.register(print, 'at exit')")
    assert (ended.returncode, ended.stdout) == (0, "at exit\n")


def test_a_file_is_run_and_threads_are_those_asked_for(warm_python, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import torch; print(__file__, torch.get_num_threads())")
    for threads in (1, 2):
        done = warm_python.run(tmp_path / "program.py", env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        assert done.stdout == f"{tmp_path / 'program.py'} {threads}\n"


def test_programs_run_beside_each_other_and_are_killed_alone(warm_python, tmp_path: Path) -> None:
    code = "import pathlib, sys, time\npathlib.Path(sys.argv[1]).touch()\nwhile True: time.sleep(0.01)"
    first, second = (warm_python.start(code, tmp_path / name) for name in "ab")
    while not {"a", "b"} <= {path.name for path in tmp_path.iterdir()}:
        time.sleep(0.01)
    assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert second.poll() is None
    second.send_signal(signal.SIGINT)
    assert second.wait() != 0
    assert "KeyboardInterrupt" in second.stderr
    assert warm_python.run("import time; time.sleep(60)", timeout=0.1).returncode == -signal.SIGKILL
