"""Finite factors whose update float32 cannot hold are refused; everything a float32 update can hold is not."""

import pytest
import torch

from compose.adapter import LowRank
from compose.errors import AdapterFormatError
from compose.files.safetensors_file import MODERATE
from compose.formats.magnitudes import check_updates
from compose.formats.peft import read_adapter
from compose.formats.peft_config import MAX_RANK, MAX_SCALING


def update(value, *, dtype=torch.float32, scaling=1.0):
    return {"q": LowRank(torch.full((2, 3), value, dtype=dtype), torch.full((4, 2), value, dtype=dtype), scaling)}


@pytest.mark.parametrize(
    ("value", "dtype", "scaling"),
    [(1e19, torch.float32, 2.0), (1e25, torch.float32, 1.0), (1e20, torch.float64, 1.0), (1e19, torch.bfloat16, -5.0)],
)
def test_an_update_beyond_float32_is_refused_by_target(value, dtype, scaling):
    with pytest.raises(AdapterFormatError, match=r"here: target q: entries up to 1e\+\d+ in A"):
        check_updates(update(value, dtype=dtype, scaling=scaling), "here")


def test_factors_beyond_float32_are_refused_even_where_their_product_is_not():
    factors = LowRank(torch.full((1, 1), 1e300, dtype=torch.float64), torch.full((1, 1), 1e-300).double(), 1.0)
    with pytest.raises(AdapterFormatError, match="float32 cannot hold"):
        check_updates({"q": factors}, "here")


def test_large_updates_that_float32_holds_are_kept():
    check_updates(update(1e18), "here")


def test_values_called_moderate_cannot_overflow():
    assert torch.finfo(torch.float32).max > MAX_SCALING * MAX_RANK * MODERATE**2


def test_a_folder_is_refused_when_it_is_read(make_folder, tensors):
    folder = make_folder(tensors={name: tensor * 1e20 for name, tensor in tensors.items()})
    with pytest.raises(AdapterFormatError, match=r"adapter_model\.safetensors: target m\.layers\.0\.q: entries up"):
        read_adapter(folder)
    mixed = {name: tensor.double() * 1e20 if ".v." in name else tensor for name, tensor in tensors.items()}
    with pytest.raises(AdapterFormatError, match=r"target m\.layers\.0\.v: entries up to"):
        read_adapter(make_folder("mixed", tensors=mixed))
