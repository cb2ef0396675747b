"""S1 again through ``compose index add``: what is refused leaves nothing in the index, what is not lands whole."""

import pytest

from compose.errors import AdapterFormatError, HubIndexError
from tests.hostile.figures import Figures, snapshot
from tests.hostile.handmade import MOST_BYTES
from tests.hostile.handmade_all import CASES
from tests.hostile.handmade_pickles import MARK
from tests.hostile.ingesting import add, add_pickled
from tests.hostile.loading import load

RENAMED = {"path: a folder called -rf"}  # the index gives it the nearest name that is allowed
FOLDERS = {name: case for name, case in CASES.items() if case.run is load}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_hostile_folder_is_refused_or_lands_whole(name, tmp_path):
    case = FOLDERS[name]
    (tmp_path / "given").mkdir()
    path = case.make(tmp_path / "given")
    before, outcomes = snapshot(tmp_path / "given"), []
    figures = Figures(name)
    error = figures.case(name, lambda: outcomes.append(add(path, home=tmp_path / "index")), memory=True)
    assert snapshot(tmp_path / "given") == before
    if case.reason and name not in RENAMED:
        assert isinstance(error, AdapterFormatError | HubIndexError), (error, outcomes)
    else:
        assert error is None or isinstance(error, AdapterFormatError), error
    assert figures.cpu_s < 3.0
    assert figures.extra_bytes < MOST_BYTES


def test_a_pickle_that_runs_a_command_does_not_run_it(tmp_path):
    folder = CASES["bin: a pickle that runs a command"].make(tmp_path / "x")
    with pytest.raises(AdapterFormatError, match="save the adapter as safetensors where you trust it"):
        add_pickled(folder)
    assert list(tmp_path.rglob(MARK)) == []
