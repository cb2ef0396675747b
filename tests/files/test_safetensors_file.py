"""Hostile and damaged weight files: one kind of error, and nothing allocated before the header is checked."""

import json
import os
import struct
import tracemalloc

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compose.errors import AdapterFormatError
from compose.files import safetensors_file
from compose.files.safetensors_file import load, read_header

GOOD = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape=(1,), begin=0, end=4, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


FOUR = b"\0\0\0\0"
NAN = struct.pack("<f", float("nan"))
INF = struct.pack("<f", float("-inf"))
HOSTILE = {
    "empty": (b"", "too few"),
    "short": (b"\1\0\0", "too few"),
    "header longer than file": (raw({"a": entry()}, FOUR, 10_000), "truncated"),
    "header of 2^63": (struct.pack("<Q", 2**63) + b"{}", "more than the limit"),
    "header of 100 MB": (struct.pack("<Q", 10**8) + b"{}", "more than the limit"),
    "lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 83900000\n",
        r"Git LFS pointer.*83\.9 MB.*git lfs pull",
    ),
    "html": (b"<!DOCTYPE html><html><head></head></html>", "more than the limit"),
    "pickle": (b"\x80\x02}q\x00." + b"\0" * 20, "safetensors|truncated|limit"),
    "zip": (b"PK\x03\x04" + b"\0" * 100, "not a safetensors file"),
    "not json": (raw(b"{not json}"), "not valid JSON"),
    "leading space": (raw(b" {}"), "start with"),
    "bad utf-8": (raw(b'{"\xff": 1}'), "UTF-8"),
    "nested deeply": (raw(b'{"a":' * 100_000), "nested too deeply|not valid JSON"),
    "list": (raw(b'["a"]'), "start with"),
    "no tensors": (raw({}), "0 tensors"),
    "only metadata": (raw({"__metadata__": {"format": "pt"}}), "0 tensors"),
    "metadata not strings": (raw({"__metadata__": {"x": 1}, "a": entry()}, FOUR), "__metadata__"),
    "duplicate key": (raw(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), FOUR), "duplicate key 'a'"),
    "NaN in header": (raw(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', FOUR), "NaN is not"),
    "overlap": (raw({"a": entry(), "b": entry()}, FOUR), "hole or overlap"),
    "hole": (raw({"a": entry(), "b": entry(begin=8, end=12)}, FOUR * 3), "hole or overlap"),
    "does not start at 0": (raw({"a": entry(begin=4, end=8)}, FOUR * 2), "hole or overlap"),
    "trailing bytes": (raw({"a": entry()}, FOUR + b"x"), "bytes appended"),
    "truncated": (raw({"a": entry((2,), 0, 8)}, FOUR), "truncated"),
    "negative offset": (raw({"a": entry(begin=-4, end=0)}, FOUR), "does not fit offsets"),
    "end before begin": (raw({"a": entry(begin=4, end=0)}, FOUR), "does not fit offsets"),
    "shape does not fit": (raw({"a": entry((3,))}, FOUR), "does not fit offsets"),
    "shape overflows": (raw({"a": entry((2**40, 2**40))}, FOUR), "does not fit offsets"),
    "empty huge shape": (raw({"a": entry((0, 2**62), 0, 0)}), "none empty"),
    "4096 dimensions": (raw({"a": entry([1] * 4096)}, FOUR), "allowed are 1 to 8 dimensions"),
    "boolean shape": (raw({"a": entry([True])}, FOUR), "has shape"),
    "float shape": (raw({"a": entry([1.0])}, FOUR), "has shape"),
    "scalar": (raw({"a": entry([])}, FOUR), "has shape"),
    "unknown dtype": (raw({"a": entry(dtype="F31")}, FOUR), "dtype 'F31'; supported are"),
    "float8": (raw({"a": entry((4,), dtype="F8_E4M3")}, FOUR), "dtype 'F8_E4M3'; supported are"),
    "dtype of another type": (raw({"a": entry(dtype=["F32"])}, FOUR), "supported are"),
    "entry without shape": (raw({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, FOUR), "must have dtype, shape"),
    "entry not an object": (raw({"a": 3}), "must have dtype, shape"),
    "three offsets": (raw({"a": {**entry(), "data_offsets": [0, 4, 4]}}, FOUR), "does not fit offsets"),
    "NUL in name": (raw({"a\0b": entry()}, FOUR), "is not allowed"),
    "line feed in name": (raw({"a\nb": entry()}, FOUR), "is not allowed"),
    "path in name": (raw({"../../etc/passwd": entry()}, FOUR), "is not allowed"),
    "dots in name": (raw({"a..b": entry()}, FOUR), "is not allowed"),
    "empty name": (raw({"": entry()}, FOUR), "is not allowed"),
    "long name": (raw({"a" * 600: entry()}, FOUR), "is not allowed"),
    "NaN": (raw({"a": entry()}, NAN), "not finite .* in a;"),
    "infinity": (raw({"a": entry((2,), 0, 8)}, FOUR + INF), "not finite .* in a;"),
    "NaN, bf16": (raw({"a": entry((2,), dtype="BF16")}, b"\0\0\xc0\x7f"), "not finite .* in a;"),
    "infinity, bf16": (raw({"a": entry((2,), dtype="BF16")}, b"\0\0\x80\xff"), "not finite .* in a;"),
    "infinity, f16": (raw({"a": entry((2,), dtype="F16")}, b"\0\0\0\x7c"), "not finite .* in a;"),
    "NaN among dtypes": (
        raw({"a": entry(), "b": entry((1,), 4, 6, "BF16")}, FOUR + b"\xc0\x7f"),
        "not finite .* in b;",
    ),
}


@pytest.mark.parametrize("case", sorted(HOSTILE))
def test_a_hostile_file_is_refused_by_name_and_reason(case, tmp_path):
    data, message = HOSTILE[case]
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(AdapterFormatError, match=message) as caught:
        load(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert peak < 32 * 1024**2
    assert [child.name for child in tmp_path.iterdir()] == [path.name]
    if "not finite" not in message:
        with pytest.raises(AdapterFormatError, match=message):
            read_header(path)


def test_what_is_not_a_regular_file_is_refused_without_waiting(tmp_path):
    fifo, folder, link, loop = (tmp_path / name for name in ("fifo", "folder", "link", "loop"))
    os.mkfifo(fifo)
    folder.mkdir()
    link.symlink_to(fifo)
    loop.symlink_to(loop)
    for path in (fifo, folder, link):
        with pytest.raises(AdapterFormatError, match=r"not a regular file|Is a directory"):
            load(path)
    for path in (loop, tmp_path / "missing", tmp_path / "a\0b"):
        with pytest.raises(AdapterFormatError, match="cannot be opened"):
            read_header(path)


def test_a_link_to_a_regular_file_is_followed(tmp_path):
    """The Hugging Face cache is made of links."""
    safetensors.torch.save_file(GOOD, tmp_path / "blob")
    (tmp_path / "link").symlink_to(tmp_path / "blob")
    assert load(tmp_path / "link").sha256 == load(tmp_path / "blob").sha256


def test_limits_of_size_and_number(tmp_path, monkeypatch):
    path = tmp_path / "x"
    safetensors.torch.save_file(GOOD, path)
    with pytest.raises(AdapterFormatError, match="bytes, more than the limit of 10"):
        load(path, max_bytes=10)
    monkeypatch.setattr(safetensors_file, "MAX_TENSORS", 1)
    safetensors_file._parse_small_header.cache_clear()
    with pytest.raises(AdapterFormatError, match="2 tensors; allowed are 1 to 1"):
        load(path)
    safetensors_file._parse_small_header.cache_clear()


def test_a_good_file_is_read_bit_for_bit(tmp_path):
    path = tmp_path / "x"
    safetensors.torch.save_file(GOOD, path, metadata={"format": "pt"})
    header, content = read_header(path), load(path)
    for name, tensor in GOOD.items():
        assert header.tensors[name] == (tuple(tensor.shape), tensor.dtype)
        torch.testing.assert_close(content.tensors[name], tensor, rtol=0, atol=0)
    import hashlib

    assert content.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_header_is_read_without_the_weights(tmp_path, monkeypatch):
    path = tmp_path / "x"
    safetensors.torch.save_file({"a": torch.ones(1000, 100)}, path)
    read = []
    original = safetensors_file._read_up_to

    def counting(stream, count):
        data = original(stream, count)
        read.append(len(data))
        return data

    monkeypatch.setattr(safetensors_file, "_read_up_to", counting)
    read_header(path)
    assert sum(read) < 1000


def test_loaded_values_do_not_follow_the_file(tmp_path):
    """A memory map would kill the process here, or change the values after they were hashed."""
    path = tmp_path / "x"
    safetensors.torch.save_file({"a": torch.ones(100_000)}, path)
    tensor = load(path).tensors["a"]
    with path.open("r+b") as stream:
        stream.truncate(100)
    assert float(tensor.sum()) == 100_000
    with path.open("r+b") as stream:
        stream.write(b"\xff" * 500_000)
    assert float(tensor.sum()) == 100_000


@pytest.mark.parametrize("keep", [0, 7, 8, 50, 200, 399_999, 400_000])
def test_a_file_truncated_at_any_place_is_refused(tmp_path, keep):
    path = tmp_path / "x"
    safetensors.torch.save_file({"a": torch.ones(100_000)}, path)
    os.truncate(path, keep)
    with pytest.raises(AdapterFormatError):
        load(path)


@pytest.mark.parametrize("keep", [0, 8, 60, 300_000])
def test_truncation_while_reading_is_refused(tmp_path, monkeypatch, keep):
    path = tmp_path / "x"
    safetensors.torch.save_file({"a": torch.ones(100_000)}, path)
    original = safetensors_file._read_up_to

    def truncating(stream, count):
        os.truncate(path, keep)
        return original(stream, count)

    monkeypatch.setattr(safetensors_file, "_read_up_to", truncating)
    with pytest.raises(AdapterFormatError, match=r"changed size|too few|JSON"):
        load(path)
    safetensors.torch.save_file({"a": torch.ones(100_000)}, path)
    if keep < 80:
        with pytest.raises(AdapterFormatError):
            read_header(path)


def test_a_file_that_changed_since_its_header_was_read_is_refused(tmp_path):
    path = tmp_path / "x"
    safetensors.torch.save_file({"a": torch.ones(4)}, path)
    fingerprint = read_header(path).fingerprint
    load(path, fingerprint=fingerprint)
    safetensors.torch.save_file({"a": torch.ones(2, 2)}, path)
    with pytest.raises(AdapterFormatError, match="changed after it was inspected"):
        load(path, fingerprint=fingerprint)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_mutated_files_are_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    content = bytearray(safetensors.torch.save(GOOD))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        tensors = load(path).tensors
    except AdapterFormatError:
        return
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
