"""Laws every adapter format keeps; a new format is checked by registering itself."""

import copy

import pytest
import torch

from compose.adapter import Adapter, LowRank
from compose.errors import AdapterFormatError, DuplicateNameError
from compose.formats import FORMATS, discover, format_of


@pytest.fixture(params=list(FORMATS))
def adapter_format(request):
    return FORMATS[request.param]


def some_adapter(name="x", dtype=torch.float32, ranks=(1, 2, 4, 8), seed=0):
    """Unequal ranks (powers of two, so that every scaling is representable), signs, both kinds."""
    generator = torch.Generator().manual_seed(seed)
    targets = {}
    for index, rank in enumerate(ranks):
        a = torch.randn(rank, 6, generator=generator).to(dtype)
        b = torch.randn(5, rank, generator=generator).to(dtype)
        targets[f"m.layers.{index}.q"] = LowRank(a, b, (-1) ** index * 0.37 * (1 + index // 2))
    targets["m.emb"] = LowRank(torch.ones(1, 9, dtype=dtype), torch.ones(6, 1, dtype=dtype), 0.5, "embedding")
    return Adapter(name, "some/base", targets)


def assert_same(left, right):
    assert left.targets.keys() == right.targets.keys()
    assert left.base == right.base
    for path, one in left.targets.items():
        two = right.targets[path]
        assert (one.scaling, one.kind, one.a.dtype) == (two.scaling, two.kind, two.a.dtype)
        torch.testing.assert_close(one.a, two.a, rtol=0, atol=0)
        torch.testing.assert_close(one.b, two.b, rtol=0, atol=0)
    assert left.full_modules.keys() == right.full_modules.keys()
    for path, tensor in left.full_modules.items():
        torch.testing.assert_close(tensor, right.full_modules[path], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_write_then_read_is_identity_bit_for_bit(adapter_format, tmp_path, dtype):
    adapter = some_adapter(dtype=dtype)
    again = adapter_format.read(adapter_format.write(adapter, tmp_path / "x"))
    assert_same(adapter, again)
    third = adapter_format.read(adapter_format.write(again, tmp_path / "y"))
    assert_same(adapter, third)
    assert again.config == third.config
    for path in (tmp_path / "x").iterdir():
        assert path.read_bytes() == (tmp_path / "y" / path.name).read_bytes()


def test_paths_that_end_in_one_another_keep_their_ranks(adapter_format, tmp_path):
    targets = {
        path: LowRank(torch.ones(rank, 3), torch.ones(2, rank), scaling)
        for path, rank, scaling in (
            ("q", 1, 0.5),
            ("m.q", 2, 0.25),
            ("m.m.q", 4, 2.0),
            ("mxq", 8, 3.0),
            ("z.q", 8, 1.0),
        )
    }
    adapter = Adapter("x", "", targets)
    assert_same(adapter, adapter_format.read(adapter_format.write(adapter, tmp_path / "x")))


def test_views_are_written_as_what_they_show(adapter_format, tmp_path):
    big = torch.randn(10, 6)
    targets = {
        "one": LowRank(big[2:4], torch.randn(2, 5).T, 0.5),
        "two": LowRank(big[4:6], torch.randn(5, 8)[:, ::4], 0.5),
    }
    targets["shared"] = LowRank(targets["one"].a, targets["two"].b, 0.5)
    targets["overlapping"] = LowRank(big[3:5], torch.ones(5, 1).expand(5, 2), 0.5)
    adapter = Adapter("x", "", targets)
    assert_same(adapter, adapter_format.read(adapter_format.write(adapter, tmp_path / "x")))


def test_the_hash_is_that_of_the_written_file(adapter_format, tmp_path):
    adapter = some_adapter()
    folder = adapter_format.write(adapter, tmp_path / "x")
    header = adapter_format.inspect(folder)
    assert adapter_format.sha256(adapter) == adapter_format.read(folder).sha256 == adapter_format.file_sha256(header)


def test_inspect_tells_what_read_returns(adapter_format, tmp_path):
    adapter = some_adapter()
    header = adapter_format.inspect(adapter_format.write(adapter, tmp_path / "named"))
    assert header.name == "named"
    assert header.base == adapter.base
    assert header.targets.keys() == adapter.targets.keys()
    for path, update in adapter.targets.items():
        assert header.targets[path][:6] == (
            update.kind,
            update.rank,
            update.in_features,
            update.out_features,
            update.scaling,
            update.a.dtype,
        )


def test_writing_leaves_the_adapter_alone(adapter_format, tmp_path):
    adapter = some_adapter()
    before = copy.deepcopy({path: (update.a, update.b) for path, update in adapter.targets.items()})
    adapter_format.write(adapter, tmp_path / "x")
    for path, (a, b) in before.items():
        torch.testing.assert_close(adapter.targets[path].a, a, rtol=0, atol=0)
        torch.testing.assert_close(adapter.targets[path].b, b, rtol=0, atol=0)


def test_nothing_is_replaced_unless_asked(adapter_format, tmp_path):
    folder = adapter_format.write(some_adapter(seed=1), tmp_path / "x")
    with pytest.raises(DuplicateNameError, match="exists"):
        adapter_format.write(some_adapter(seed=2), folder)
    assert_same(some_adapter(seed=1), adapter_format.read(folder))
    adapter_format.write(some_adapter(seed=2), folder, overwrite=True)
    assert_same(some_adapter(seed=2), adapter_format.read(folder))


def test_a_folder_of_something_else_is_never_replaced(adapter_format, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DuplicateNameError, match="no adapter folder"):
        adapter_format.write(some_adapter(), tmp_path, overwrite=True)
    with pytest.raises(DuplicateNameError, match="no adapter folder"):
        adapter_format.write(some_adapter(), tmp_path / "thesis.txt", overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({}, "no targets"),
        ({"q": LowRank(torch.ones(0, 3), torch.ones(2, 0), 1.0)}, "rank 0"),
        (
            {"q": LowRank(torch.ones(1, 3), torch.full((2, 1), float("nan")), 1.0)},
            "target q: values that are not finite",
        ),
        ({"q": LowRank(torch.ones(1, 3), torch.ones(2, 1), float("inf"))}, "target q: scaling inf is not finite"),
        ({"q": LowRank(torch.ones(1, 3).int(), torch.ones(2, 1).int(), 1.0)}, "torch.int32"),
        ({"a..q": LowRank(torch.ones(1, 3), torch.ones(2, 1), 1.0)}, r"a\.\.q"),
    ],
)
def test_what_cannot_be_read_back_is_not_written(adapter_format, tmp_path, targets, message):
    with pytest.raises(AdapterFormatError, match=message):
        adapter_format.write(Adapter("x", "", targets), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(adapter_format, tmp_path, keep):
    folder = adapter_format.write(some_adapter(), tmp_path / "x")
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * keep)])
        with pytest.raises(AdapterFormatError, match=path.name):
            adapter_format.read(folder)
        path.write_bytes(whole)
    assert_same(some_adapter(), adapter_format.read(folder))


def test_a_missing_file_is_named(adapter_format, tmp_path):
    folder = adapter_format.write(some_adapter(), tmp_path / "x")
    for path in sorted(folder.iterdir()):
        path.rename(tmp_path / "away")
        assert adapter_format.matches(folder)
        with pytest.raises(AdapterFormatError, match=path.name):
            adapter_format.read(folder)
        (tmp_path / "away").rename(path)


def test_no_pickle_is_ever_loaded(adapter_format, tmp_path):
    folder = adapter_format.write(some_adapter(), tmp_path / "x")
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return canary.write_text, ("run",)

    import pickle

    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        path.write_bytes(pickle.dumps(Evil()))
        with pytest.raises(AdapterFormatError):
            adapter_format.read(folder)
        path.write_bytes(whole)
    assert not canary.exists()


def test_the_registry_finds_the_format_of_a_folder(adapter_format, tmp_path):
    folder = adapter_format.write(some_adapter(), tmp_path / "bank" / "x")
    assert format_of(folder) is adapter_format
    assert discover(folder) == [folder]
    assert discover(folder.parent) == [folder]
    with pytest.raises(AdapterFormatError, match="not an adapter folder"):
        format_of(tmp_path)


@pytest.mark.parametrize("name", ["", "..", "a b", "-rf", ".hidden", "a/b", "a\\b", "a..b", "a" * 97, "ä", "a\n"])
def test_names_that_are_no_names_are_refused(adapter_format, tmp_path, name):
    folder = adapter_format.write(some_adapter(), tmp_path / "x")
    with pytest.raises(AdapterFormatError, match="is not allowed"):
        adapter_format.read(folder, name=name)
