"""Bank: opened from headers, stacked once, equal to its adapters bit for bit, unchanged by any failure."""

import json
import os
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from compose.adapter import Adapter, LowRank
from compose.bank import Bank, TargetShape
from compose.errors import AdapterFormatError, DuplicateNameError, IncompatibleError, UnknownNameError
from compose.files import safetensors_file
from compose.formats import FORMATS
from compose.formats.peft import read_adapter, scan, write_adapter


def make(
    name, targets=("m.layers.0.q", "m.layers.1.q"), rank=2, base="toy", dtype=torch.float32, seed=0, shape=(6, 5)
):
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        name,
        base,
        {
            path: LowRank(
                torch.randn(rank, shape[0], generator=generator).to(dtype),
                torch.randn(shape[1], rank, generator=generator).to(dtype),
                0.5 + seed,
            )
            for path in targets
        },
    )


MIXED = [
    make("one", rank=1, seed=1),
    make("two", ("m.layers.10.q", "m.layers.0.q"), rank=4, seed=2),
    make("three", ("m.layers.2.q",), rank=2, seed=3),
]


@pytest.fixture
def folder(tmp_path):
    """A bank folder of three adapters with mixed ranks and missing targets."""
    for adapter in MIXED:
        write_adapter(adapter, tmp_path / "bank" / adapter.name)
    return tmp_path / "bank"


@pytest.fixture(params=["files", "memory"])
def bank(request, folder):
    return (
        Bank.open([folder / adapter.name for adapter in MIXED])
        if request.param == "files"
        else Bank.from_adapters(MIXED)
    )


def assert_equal_adapters(left, right):
    assert left.targets.keys() == right.targets.keys()
    for path, one in left.targets.items():
        two = right.targets[path]
        assert (one.scaling, one.kind) == (two.scaling, two.kind)
        torch.testing.assert_close(one.a, two.a, rtol=0, atol=0)
        torch.testing.assert_close(one.b, two.b, rtol=0, atol=0)


def test_a_bank_is_an_ordered_collection_of_names(bank):
    assert bank.names == ("one", "two", "three") == tuple(bank)
    assert (len(bank), bank.index("two"), "two" in bank, "four" in bank, bank.base) == (3, 1, True, False, "toy")
    assert "3 adapters" in repr(bank)


def test_targets_are_the_union_in_natural_order(bank):
    shape = TargetShape("linear", 6, 5)
    assert dict(bank.targets) == {f"m.layers.{layer}.q": shape for layer in (0, 1, 2, 10)}
    assert list(bank.targets) == [f"m.layers.{layer}.q" for layer in (0, 1, 2, 10)]


def test_stacks_hold_every_adapter_bit_for_bit(bank):
    stacks = bank.stacks()
    assert {path: stack.ranks for path, stack in stacks.items()} == {
        "m.layers.0.q": (1, 4, 0),
        "m.layers.1.q": (1, 0, 0),
        "m.layers.2.q": (0, 0, 2),
        "m.layers.10.q": (0, 4, 0),
    }
    for index, adapter in enumerate(MIXED):
        for path, stack in stacks.items():
            rows = slice(stack.offsets[index], stack.offsets[index + 1])
            if path not in adapter.targets:
                assert stack.ranks[index] == 0
                assert stack.scaling_E[index] == 0
                continue
            update = adapter.targets[path]
            torch.testing.assert_close(stack.a_RD[rows], update.a, rtol=0, atol=0)
            torch.testing.assert_close(stack.b_RO[rows], update.b.T.contiguous(), rtol=0, atol=0)
            assert float(stack.scaling_E[index]) == update.scaling


def test_an_adapter_is_the_same_before_and_after_stacking(bank):
    before = [bank[name] for name in bank]
    bank.stacks()
    for name, early, source in zip(bank, before, MIXED, strict=True):
        assert_equal_adapters(early, source)
        assert_equal_adapters(bank[name], source)


def test_after_stacking_adapters_are_views(folder):
    bank = Bank.open(folder)
    stack = bank.stack("m.layers.0.q")
    update = bank["two"].targets["m.layers.0.q"]
    assert update.a.untyped_storage().data_ptr() == stack.a_RD.untyped_storage().data_ptr()
    assert update.b.untyped_storage().data_ptr() == stack.b_RO.untyped_storage().data_ptr()


def test_every_file_is_read_once(folder, monkeypatch):
    reads = []
    original = safetensors_file.read_bytes
    monkeypatch.setattr(
        safetensors_file, "read_bytes", lambda path, **more: (reads.append(path), original(path, **more))[1]
    )
    bank = Bank.open(folder)
    assert {path.name for path in reads} == {"adapter_config.json"}
    reads.clear()
    first = bank.stacks()
    assert bank.stacks()["m.layers.0.q"] is first["m.layers.0.q"]
    _ = [bank[name] for name in bank], bank.hashes, bank.select(["two", "one"]).stacks(), bank.stack("m.layers.2.q")
    assert sorted(path.parent.name for path in reads) == ["one", "three", "two"]


def test_opening_reads_no_weights(folder):
    """The values are NaN and nobody notices until they are needed."""
    path = folder / "two" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-64:] = b"\xff" * 64
    path.write_bytes(data)
    bank = Bank.open(folder)
    assert bank.names == ("one", "three", "two")
    with pytest.raises(AdapterFormatError, match=r"two.*not finite"):
        _ = bank["two"]
    assert_equal_adapters(bank["one"], MIXED[0])


def test_a_failed_load_leaves_the_bank_as_it_was(folder):
    bank = Bank.open(folder)
    path = folder / "two" / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    (folder / "three" / "adapter_model.safetensors").rename(folder / "away")
    with pytest.raises(AdapterFormatError) as caught:
        bank.stacks()
    for part in ("2 of 3 adapters", "two/adapter_model", "three/adapter_model"):
        assert part in str(caught.value)
    assert "not loaded" in repr(bank)
    path.write_bytes(whole)
    (folder / "away").rename(folder / "three" / "adapter_model.safetensors")
    bank.stacks()
    assert_equal_adapters(bank["two"], MIXED[1])


def test_a_file_replaced_between_opening_and_loading_is_detected(folder):
    bank = Bank.open(folder)
    write_adapter(make("two", ("m.layers.0.q",), rank=4), folder / "two", overwrite=True)
    with pytest.raises(AdapterFormatError, match=r"two.*changed after it was inspected"):
        bank.stacks()


def test_a_hash_binds_later_reads(folder):
    bank = Bank.open(folder)
    hashes = bank.hashes
    assert hashes == {name: read_adapter(folder / name).sha256 for name in bank}
    path = folder / "two" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(AdapterFormatError, match="weights changed on disk"):
        bank.stacks()
    with pytest.raises(AdapterFormatError, match="weights changed on disk"):
        _ = bank["two"]


def test_hashes_in_memory_are_those_of_the_files(folder):
    assert Bank.from_adapters(MIXED).hashes == {
        adapter.name: read_adapter(folder / adapter.name).sha256 for adapter in MIXED
    }


def test_select_keeps_the_order_given_and_reads_nothing_again(folder, monkeypatch):
    bank = Bank.open(folder)
    bank.stacks()
    monkeypatch.setattr(safetensors_file, "read_bytes", None)
    chosen = bank.select(["two", "one"]).select(["one", "two"])
    assert chosen.names == ("one", "two")
    assert list(chosen.targets) == [f"m.layers.{layer}.q" for layer in (0, 1, 10)]
    assert chosen.stack("m.layers.0.q").ranks == (1, 4)
    assert_equal_adapters(chosen["two"], MIXED[1])


def test_select_works_before_loading(bank):
    chosen = bank.select(["three", "one"])
    assert chosen.stack("m.layers.2.q").ranks == (2, 0)
    assert_equal_adapters(chosen["three"], MIXED[2])
    with pytest.raises(UnknownNameError, match="unknown adapter 'thre'; did you mean 'three'"):
        bank.select(["thre"])
    with pytest.raises(DuplicateNameError, match="one"):
        bank.select(["one", "one"])
    with pytest.raises(AdapterFormatError, match="at least one"):
        bank.select([])


def test_other_dtypes_are_cached_apart_and_lose_nothing_elsewhere(bank):
    half = bank.stacks(torch.bfloat16)
    assert half["m.layers.0.q"].a_RD.dtype == torch.bfloat16
    assert bank.stacks(torch.bfloat16)["m.layers.0.q"] is half["m.layers.0.q"]
    assert_equal_adapters(bank["two"], MIXED[1])
    assert bank.stack("m.layers.0.q").a_RD.dtype == torch.float32
    assert_equal_adapters(bank["two"], MIXED[1])
    torch.testing.assert_close(half["m.layers.0.q"].a_RD, bank.stack("m.layers.0.q").a_RD.bfloat16(), rtol=0, atol=0)


def test_adapters_of_different_dtypes_share_the_promoted_one(tmp_path):
    adapters = [make("half", dtype=torch.float16, seed=1), make("brain", dtype=torch.bfloat16, seed=2)]
    for adapter in adapters:
        write_adapter(adapter, tmp_path / adapter.name)
    bank = Bank.open(tmp_path)
    assert bank.dtype == torch.float32 == bank.stack("m.layers.0.q").a_RD.dtype
    for adapter in adapters:
        again = bank[adapter.name]
        assert_equal_adapters(again, adapter)
        assert again.targets["m.layers.0.q"].a.dtype == adapter.targets["m.layers.0.q"].a.dtype


def test_full_modules_are_kept(tmp_path):
    adapter = Adapter(
        "x",
        "toy",
        make("x").targets,
        {"modules_to_save": ["head"], "peft_type": "LORA"},
        {"head.weight": torch.ones(3)},
    )
    write_adapter(adapter, tmp_path / "x")
    bank = Bank.open(tmp_path)
    bank.stacks()
    torch.testing.assert_close(bank["x"].full_modules["head.weight"], torch.ones(3), rtol=0, atol=0)


def test_an_adapter_from_a_stacked_bank_writes_back_bit_identical(folder, tmp_path):
    bank = Bank.open(folder)
    bank.stacks()
    written = write_adapter(bank["two"], tmp_path / "again")
    for path in (folder / "two").iterdir():
        assert (written / path.name).read_bytes() == path.read_bytes()


def test_one_adapter_or_several_folders_open_too(folder, tmp_path):
    write_adapter(make("four"), tmp_path / "four")
    assert Bank.open(folder / "one").names == ("one",)
    assert Bank.open(str(folder)).names == ("one", "three", "two")
    assert Bank.open([folder, tmp_path / "four"]).names == ("one", "three", "two", "four")
    assert Bank.open(folder, names=["x", "y", "z"]).names == ("x", "y", "z")
    with pytest.raises(IncompatibleError, match="2 names for 3 adapters"):
        Bank.open(folder, names=["x", "y"])


def test_scan_lists_peft_folders(folder, tmp_path):
    assert [path.name for path in scan(folder)] == ["one", "three", "two"]
    assert scan(folder / "two") == [folder / "two"]
    (folder / ".two.tmp-1").mkdir()
    (folder / "two" / "adapter_config.json").rename(folder / ".two.tmp-1" / "adapter_config.json")
    (folder / "notes").mkdir()
    assert [path.name for path in scan(folder)] == ["one", "three", "two"]
    for empty in (folder / "notes", tmp_path / "missing"):
        with pytest.raises(AdapterFormatError, match=str(empty)):
            scan(empty)


def test_names_must_be_unique_and_plain(folder, tmp_path):
    write_adapter(MIXED[0], tmp_path / "other" / "one")
    with pytest.raises(DuplicateNameError, match="given twice: one"):
        Bank.open([folder, tmp_path / "other"])
    with pytest.raises(DuplicateNameError, match="given twice: one"):
        Bank.from_adapters([MIXED[0], MIXED[0]])
    with pytest.raises(AdapterFormatError, match="'a b' is not allowed"):
        Bank.from_adapters([make("a b")])
    with pytest.raises(AdapterFormatError, match="at least one"):
        Bank.from_adapters([])
    with pytest.raises(AdapterFormatError, match="no adapters given"):
        Bank.open([])


def test_all_problems_of_a_folder_come_at_once(folder):
    (folder / "one" / "adapter_config.json").write_text("{")
    (folder / "two" / "adapter_model.safetensors").unlink()
    (folder / "bad name").mkdir()
    write_adapter(make("x"), folder / "bad name")
    pickled = folder / "legacy"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_text((folder / "three" / "adapter_config.json").read_text())
    (pickled / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(AdapterFormatError) as caught:
        Bank.open(folder)
    for part in ("4 of 5 adapters", "one/adapter_config.json", "two/adapter_model", "bad name", "adapter_model.bin"):
        assert part in str(caught.value)
    assert "safe_serialization" in str(caught.value)


def test_lenient_opening_skips_and_records(folder):
    (folder / "one" / "adapter_config.json").write_text("{")
    write_adapter(make("zz", ("m.layers.2.q",), shape=(7, 5)), folder / "zz")
    bank = Bank.open(folder, strict=False)
    assert bank.names == ("three", "two")
    assert sorted(bank.problems) == [str(folder / "one"), "zz"]
    assert "linear 7 -> 5" in bank.problems["zz"]
    with pytest.raises(AdapterFormatError, match="1 of 1"):
        Bank.open(folder / "one", strict=False)


def test_one_base_model_per_bank(tmp_path):
    for name, base in (("a", "llama"), ("b", "mistral"), ("c", "")):
        write_adapter(make(name, base=base), tmp_path / name)
    with pytest.raises(IncompatibleError, match="'a' was trained on 'llama', 'b' on 'mistral'"):
        Bank.open(tmp_path)
    assert Bank.open(tmp_path, base="llama").base == "llama"
    assert Bank.open([tmp_path / "a", tmp_path / "c"]).base == "llama"
    assert Bank.open(tmp_path / "c").base == ""
    with pytest.raises(IncompatibleError, match="mistral"):
        Bank.from_adapters([make("a", base="llama"), make("b", base="mistral")])


def test_shapes_must_agree(tmp_path):
    adapters = [make("a"), make("b", shape=(6, 9)), make("c", shape=(4, 5))]
    with pytest.raises(IncompatibleError) as caught:
        Bank.from_adapters(adapters)
    for part in (
        "'b', target m.layers.0.q: linear 6 -> 9",
        "'a' has linear 6 -> 5",
        "'c', target m.layers.0.q: linear 4 -> 5",
    ):
        assert part in str(caught.value)
    linear, embedding = (
        Adapter(kind, "", {"t": LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0, kind)})
        for kind in ("linear", "embedding")
    )
    with pytest.raises(IncompatibleError, match="embedding 2 -> 2"):
        Bank.from_adapters([linear, embedding])


def test_unknown_names_get_a_hint(bank):
    with pytest.raises(UnknownNameError, match="did you mean 'three'"):
        _ = bank["thee"]
    with pytest.raises(UnknownNameError, match=r"did you mean 'm\.layers\.0\.q'"):
        bank.stack("layers.0.q")


def test_threads_share_one_load(folder, monkeypatch):
    reads = []
    original = safetensors_file.load

    def slow(path, **more):
        reads.append(path)
        time.sleep(0.02)
        return original(path, **more)

    monkeypatch.setattr(safetensors_file, "load", slow)
    bank = Bank.open(folder)
    results, barrier = [], threading.Barrier(8)

    def work():
        barrier.wait()
        results.append(bank.stacks()["m.layers.0.q"])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 3
    assert len(results) == 8
    assert all(stack is results[0] for stack in results)


def test_the_bank_asks_the_registry_for_formats(tmp_path):
    """A format that lives nowhere near PEFT opens through the same door."""

    class Toy:
        def matches(self, folder):
            return (folder / "toy.txt").exists()

        def inspect(self, folder, *, name=None):
            raise AdapterFormatError(f"{folder}: toys are not for work")

    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "toy.txt").write_text("")
    list(FORMATS)
    FORMATS.register("toy")(Toy())
    try:
        with pytest.raises(AdapterFormatError, match="toys are not for work"):
            Bank.open(tmp_path)
    finally:
        del FORMATS._entries["toy"]
    with pytest.raises(AdapterFormatError, match="neither an adapter nor a folder"):
        Bank.open(tmp_path)


def many(folder, count, ranks=(4,)):
    tensors_of = {
        rank: safetensors.torch.save(
            {
                f"base_model.model.m.layers.{layer}.{target}.lora_{half}.weight": torch.ones(shape)
                for layer in range(4)
                for target in ("q", "v")
                for half, shape in (("A", (rank, 16)), ("B", (16, rank)))
            }
        )
        for rank in ranks
    }
    for index in range(count):
        path = folder / f"a{index:04d}"
        path.mkdir(parents=True)
        rank = ranks[index % len(ranks)]
        (path / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": rank, "target_modules": ["q", "v"]})
        )
        (path / "adapter_model.safetensors").write_bytes(tensors_of[rank])
    return folder


def cpu_seconds(work):
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


@pytest.mark.parametrize("ranks", [(4,), tuple(range(1, 41))], ids=["equal", "more ranks than the header cache holds"])
def test_time_per_adapter_is_flat(tmp_path, ranks):
    """PEFT's grows linearly: 0.17 s for the second adapter, 3 s for the 200th (spec/peft.md, section 6)."""
    small, large = many(tmp_path / "small", 40, ranks), many(tmp_path / "large", 320, ranks)
    Bank.open(small).stacks()
    per_adapter = []
    for folder, count in ((small, 40), (large, 320)):
        opened = min(
            (cpu_seconds(lambda folder=folder: Bank.open(folder)) for _ in range(3)), key=lambda pair: pair[0]
        )
        stacked, _ = cpu_seconds(opened[1].stacks)
        per_adapter.append((opened[0] + stacked) / count)
    assert per_adapter[1] < 3 * per_adapter[0]
    assert per_adapter[1] < 0.02


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_is_one_stack(tmp_path):
    """64 adapters of 0.5 MB: the stacks take 1.1 times the bytes on disk, not two copies."""
    tensors = {
        f"m.{n}.q.lora_{half}.weight": torch.randn(shape)
        for n in range(8)
        for half, shape in (("A", (16, 512)), ("B", (512, 16)))
    }
    data = safetensors.torch.save(tensors)
    for index in range(64):
        path = tmp_path / f"a{index}"
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 16, "target_modules": ["q"]}))
        (path / "adapter_model.safetensors").write_bytes(data)
    Bank.open(tmp_path / "a0").stacks()
    bank = Bank.open(tmp_path)

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    stacks = bank.stacks()
    assert resident() - before < 1.1 * 64 * len(data) + 4 * 1024**2
    assert len(stacks) == 8
