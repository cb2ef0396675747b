"""Tables of measured block sizes: what is found, what is passed over, how they are written."""

from __future__ import annotations

import json
import logging
import re

import pytest
import torch

from compose.kernels.packed import tables, tuning

GPU = "Imaginary GPU 9"
CONFIG = {"splits": 4, "bk": 64, "br_out": 32}
FEW = {"bm": 16, "br": 16, "shrink_stages": 4, "shrink_warps": 4, "bm_out": 16, "bn": 64, "expand_warps": 4}


def _entry(kind="dense sums", dtype="bfloat16", exact=(), sizes=(4096, 4096, 128), config=CONFIG, us=(1.0,)):
    return {"kind": kind, "dtype": dtype, "exact": list(exact), "sizes": list(sizes), "config": dict(config),
            "us": list(us), "candidates": [{"config": dict(config), "us": list(us)}]}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache folder, empty; what was read is forgotten."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    tuning.forget()
    yield tables.cache_folder()
    tuning.forget()


def _found(kind="dense sums", dtype=torch.bfloat16, exact=(), sizes=(4096, 4096, 128)):
    return tables.nearest(tables.load(GPU), kind, dtype, exact, sizes)


def test_the_cache_folder_follows_the_environment(cache, tmp_path, monkeypatch):
    assert cache == tmp_path / "cache" / "adapter-compose" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tables.cache_folder() == tmp_path / ".cache" / "adapter-compose" / "kernels"


def test_without_a_home_folder_there_is_no_table_of_the_user(monkeypatch, caplog):
    tables.save(GPU, [_entry()], tables.SHIPPED / tables.file_name(GPU))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(tables.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert _found() == CONFIG
    assert "no home" in caplog.text


def test_what_was_saved_is_found_with_versions_and_all_candidates(cache):
    path = tables.save(GPU, [_entry()])
    assert path == cache / "imaginary_gpu_9.json"
    assert _found() == CONFIG
    table = json.loads(path.read_text())
    assert table["device"] == GPU
    assert table["triton"] == tables.triton_version()
    assert table["entries"][0]["candidates"] == _entry()["candidates"]
    assert [one.name for one in cache.iterdir()] == [path.name]  # no temporary file is left


def test_saving_replaces_the_same_entry_and_keeps_the_others():
    tables.save(GPU, [_entry(), _entry(sizes=(64, 64, 16))])
    path = tables.save(GPU, [_entry(config={**CONFIG, "splits": 8})])
    entries = json.loads(path.read_text())["entries"]
    assert [(one["sizes"][0], one["config"]["splits"]) for one in entries] == [(4096, 8), (64, 4)]


def test_a_failed_write_leaves_the_old_table(cache, monkeypatch):
    path = tables.save(GPU, [_entry()])
    before = path.read_text()
    monkeypatch.setattr(tables.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        tables.save(GPU, [_entry(sizes=(64, 64, 16))])
    assert path.read_text() == before
    assert [one.name for one in cache.iterdir()] == [path.name]


def test_the_nearest_size_is_taken_and_none_that_is_far():
    tables.save(GPU, [_entry(sizes=(4096, 4096, 128)), _entry(sizes=(512, 512, 128), config={**CONFIG, "bk": 128})])
    assert _found(sizes=(3000, 5000, 128))["bk"] == 64
    assert _found(sizes=(700, 512, 64))["bk"] == 128
    assert _found(sizes=(100, 512, 128)) is None
    assert _found(kind="rows") is None
    assert _found(exact=(1,)) is None
    tables.save(GPU, [_entry("dense few", sizes=(4096, 4096, 128, 32), config=FEW)])
    tuning.forget()
    assert _found("dense few", sizes=(4096, 4096, 128, 64)) == FEW
    assert _found(dtype=torch.float16) == _found()
    assert _found(dtype=torch.float32) is None


def test_the_users_table_comes_before_the_shipped_one():
    tables.save(GPU, [_entry(config={**CONFIG, "splits": 2})], tables.SHIPPED / tables.file_name(GPU))
    assert _found()["splits"] == 2
    tables.save(GPU, [_entry()])
    tuning.forget()
    assert _found()["splits"] == 4


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{not json", "Expecting property name"),
        ("[]", "indices must be integers"),
        ('{"format": 1}', "device"),
        ("\x00\ud800".encode("utf-8", "surrogatepass"), "decode"),
        ({"device": "Another GPU"}, "for 'Another GPU', wanted format 1 for 'Imaginary GPU 9'"),
        ({"format": 7}, "format 7"),
        ({"entries": [_entry(config={"splits": 4})]}, "wanted .*br_out"),
        ({"entries": [_entry(config={**CONFIG, "bk": "64"})]}, "has the blocks"),
        ({"entries": [_entry(kind="magic")]}, "magic"),
        ({"entries": [_entry(config={**CONFIG, "bk": 48})]}, "in their ranges"),
        ({"entries": [_entry(config={**CONFIG, "splits": 0})]}, "in their ranges"),
        ({"entries": [_entry(config={**CONFIG, "splits": True})]}, "in their ranges"),
        ({"entries": [_entry("dense few", sizes=(1, 1, 1, 1), config={**FEW, "bm": 64})]}, "in their ranges"),
        ({"entries": [_entry(sizes=(0, 1, 1))]}, "has the sizes"),
        ({"entries": [_entry(sizes=(1, 1))]}, "has the sizes"),
        ({"entries": [_entry(exact=(3,))]}, "has the sizes"),
        ({"entries": [_entry(sizes=(1, 1, 10**400))]}, "has the sizes"),
        ("[" * 200_000, "recursion"),
        ({"entries": 5}, "not iterable"),
    ],
    ids=lambda one: str(one)[:40],
)
def test_a_corrupt_or_foreign_table_is_passed_over_with_a_warning(cache, text, reason, caplog):
    whole = {"format": 1, "device": GPU, "triton": "0", "torch": "0", "entries": [_entry()]}
    text = json.dumps({**whole, **text}) if isinstance(text, dict) else text
    cache.mkdir(parents=True)
    path = cache / tables.file_name(GPU)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with caplog.at_level(logging.WARNING, logger="compose.kernels.packed.tables"):
        assert _found() is None
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    assert "are not used" in record.getMessage()
    assert re.search(reason, record.getMessage())


def test_a_table_of_another_triton_is_used_and_said_so(cache, caplog):
    path = tables.save(GPU, [_entry()])
    path.write_text(path.read_text().replace(json.dumps(tables.triton_version()), '"0.1"'))
    tuning.forget()
    with caplog.at_level(logging.INFO, logger="compose.kernels.packed.tables"):
        assert _found() == CONFIG
    assert "measured with triton 0.1" in caplog.text


def test_shipped_tables_hold_every_candidate_and_can_be_read(monkeypatch):
    monkeypatch.undo()
    shipped = sorted(tables.SHIPPED.glob("*.json"))
    assert shipped
    for path in shipped:
        table = json.loads(path.read_text())
        entries = tables.read(path, table["device"])
        assert path.name == tables.file_name(table["device"])
        assert table["triton"]
        assert entries
        for entry in entries:
            assert len(entry["candidates"]) > 1
            assert entry["config"] in [one["config"] for one in entry["candidates"]]


def test_few_tokens_never_take_blocks_that_change_bits(monkeypatch):
    """Neither a table nor a rule may let the number of tokens enter what decides the order of a sum."""
    monkeypatch.undo()
    assert not set(tuning.DenseSums._fields) & set(tuning.DenseBlocks._fields)
    for path in tables.SHIPPED.glob("*.json"):
        for entry in json.loads(path.read_text())["entries"]:
            if entry["kind"] == "dense few":
                assert max(entry["config"]["bm"], entry["config"]["bm_out"]) < 64
