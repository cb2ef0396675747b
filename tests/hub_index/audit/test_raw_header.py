"""Headers read as they stand."""

import json
import struct
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import arange

from compose.errors import AdapterFormatError
from compose.hub_index.audit.raw_header import read_raw_header, read_tensor_bytes


def written(path: Path, text: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_a_sound_file_and_the_bytes_of_one_tensor(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": arange(4.0), "b": arange(10.0, 13.0)}, file, metadata={"format": "pt"})
    header = read_raw_header(file)
    assert header.whole
    assert {one.name: one.shape for one in header.tensors} == {"a": (4,), "b": (3,)}
    assert (header.problem, header.twice, header.malformed, header.metadata_text) == ("", (), (), True)
    b = next(one for one in header.tensors if one.name == "b")
    assert struct.unpack("<3f", read_tensor_bytes(file, header, b)) == (10.0, 11.0, 12.0)


def test_a_file_that_ends_inside_a_tensor(tmp_path: Path) -> None:
    text = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    file = written(tmp_path / "x", text, bytes(9))
    header = read_raw_header(file)
    with pytest.raises(AdapterFormatError, match="ends inside tensor 'a'"):
        read_tensor_bytes(file, header, header.tensors[0])


def test_double_names_and_entries_of_wrong_types_are_kept_apart(tmp_path: Path) -> None:
    good = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    text = f'{{"a": {good}, "a": {good}, "b": 3, "c": {{"dtype": 1, "shape": [1], "data_offsets": [0, 4]}}}}'
    header = read_raw_header(written(tmp_path / "x", text.encode(), bytes(4)))
    assert header.twice == ("a",)
    assert [one.name for one in header.tensors] == ["a"]
    assert len(header.malformed) == 2


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_what_cannot_be_opened(tmp_path: Path, kind: str) -> None:
    place = tmp_path if kind == "folder" else tmp_path / "nothing"
    with pytest.raises(AdapterFormatError):
        read_raw_header(place)
