"""Running out of memory is an error about a file; other errors pass as they are."""

import numpy as np
import pytest
import torch

from compose.errors import AdapterFormatError
from compose.files.memory import enough_memory


@pytest.mark.parametrize(
    "allocate",
    [lambda: torch.empty(2**55), lambda: np.zeros(2**55), lambda: bytearray(2**55)],
    ids=["torch", "numpy", "Python"],
)
def test_what_cannot_be_allocated_is_told(allocate):
    with (
        pytest.raises(AdapterFormatError, match="here: it needs more memory than this process"),
        enough_memory("here"),
    ):
        allocate()


@pytest.mark.parametrize("error", [RuntimeError("other"), ValueError("other"), AdapterFormatError("other")])
def test_other_errors_pass(error):
    with pytest.raises(type(error), match=r"^other$"), enough_memory("here"):
        raise error
