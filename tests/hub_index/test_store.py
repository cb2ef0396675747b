"""The index as a whole: adding, changing, removing, sweeping, and that every change is one transaction."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from compose.errors import DuplicateNameError, HubIndexError, UnknownNameError
from compose.hub_index.records import AdapterRecord, AuditFinding, ExampleRecord, ScoreRecord, StatRecord
from compose.hub_index.search import Filters
from compose.hub_index.store import Index

ANY = Filters(status="any")


def names(index: Index, **filters: object) -> list[str]:
    return [one.name for one in index.ls(Filters(**filters))]


def plain(name: str, content: str = "a", **fields: object) -> AdapterRecord:
    return AdapterRecord(name=name, sha256_weights=content * 64, **fields)


def test_adding_the_same_content_again_changes_nothing(index, make_record) -> None:
    assert index.add(make_record(1)) == ("adapter-0000001", "added")
    before = index.get("adapter-0000001")
    assert index.add(make_record(1)) == ("adapter-0000001", "present")
    assert index.add(replace(make_record(1), name="other", title="x")) == ("adapter-0000001", "present")
    assert index.get("adapter-0000001") == before
    assert len(index) == 1


def test_another_adapter_of_a_taken_name_is_refused(index) -> None:
    index.add(plain("a"))
    with pytest.raises(DuplicateNameError, match=r"named 'a'.*replace=True"):
        index.add(plain("a", "b"))
    assert index.get("a").sha256_weights == "a" * 64


def test_a_batch_is_added_whole_or_not_at_all_and_names_every_clash(index) -> None:
    index.add_all([plain("a", "a"), plain("b", "b")])
    batch = [plain("c", "c"), plain("a", "d"), plain("b", "e")]
    with pytest.raises(DuplicateNameError, match="named 'a', 'b'"):
        index.add_all(batch)
    assert names(index) == ["a", "b"]


def test_a_batch_that_breaks_in_the_middle_leaves_nothing(index, make_record) -> None:
    def records():
        yield make_record(1)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        index.add_all(records())
    assert len(index) == 0
    assert index.check() == []
    assert index.add(make_record(1)).state == "added"


def test_two_equal_names_in_one_batch_are_a_clash(index) -> None:
    with pytest.raises(DuplicateNameError, match="named 'a'"):
        index.add_all([plain("a", "a"), plain("a", "b")])
    assert len(index) == 0


def test_replace_takes_the_place_of_the_name_and_of_the_content(index, make_record) -> None:
    index.add_all([make_record(1), make_record(2)])
    both = replace(make_record(1), name=make_record(2).name, title="both")
    assert index.add(both, replace=True) == (make_record(2).name, "replaced")
    assert names(index) == [make_record(2).name]
    assert index.get(make_record(2).name).title == "both"
    assert [hit.adapter.name for hit in index.query("both")] == [make_record(2).name]
    assert index.check() == []


def test_a_removed_adapter_is_not_found_and_its_name_is_free(index, make_record) -> None:
    record = make_record(1)
    index.add(record)
    index.remove([record.name], reason="too old")
    assert record.name not in index
    assert len(index) == 0
    assert index.query(record.title) == []
    assert index.query(vector=record.embeddings[0]) == []
    with pytest.raises(UnknownNameError):
        index.get(record.name)
    (gone,) = index.ls(ANY)
    assert (gone.status, gone.reasons) == ("removed", ("too old",))
    assert index.add(replace(make_record(2), name=record.name)).state == "added"
    assert index.check() == []


def test_a_removed_adapter_that_comes_again_is_restored(index, make_record, numbered) -> None:
    index.add(make_record(1))
    index.remove([make_record(1).name])
    assert index.add(make_record(1)).state == "restored"
    assert numbered.same(index.get(make_record(1).name), make_record(1))
    assert len(index.ls(ANY)) == 1


def test_removing_is_all_or_none(index) -> None:
    index.add_all([plain("a", "a"), plain("b", "b")])
    with pytest.raises(UnknownNameError, match="unknown adapter 'c'"):
        index.remove(["a", "c"])
    assert names(index) == ["a", "b"]


def test_an_unknown_name_gets_a_hint(index) -> None:
    index.add_all([plain("translate-en-de", "a"), plain("summarise", "b")])
    with pytest.raises(UnknownNameError, match="did you mean 'translate-en-de'"):
        index.get("translate-en-d")


def test_an_adapter_is_found_by_its_hash(index, make_record) -> None:
    index.add(make_record(1))
    assert index.get(make_record(1).sha256).name == make_record(1).name


def test_update_replaces_what_is_given_and_nothing_else(index, make_record) -> None:
    record = make_record(1)
    index.add(record)
    finding = AuditFinding(rule="values.norm", severity="high", detail="far outside", at="now")
    index.update(record.name, status="quarantined", reasons=["norm"], findings=[finding])
    found = index.get(record.name)
    assert (found.status, found.reasons, found.findings) == ("quarantined", ("norm",), (finding,))
    assert (found.stats, found.scores, found.modules) == (record.stats, record.scores, record.modules)
    scores = [ScoreRecord(task="newtask", metric="f1", value=0.5)]
    index.update(record.name, scores=scores, stats=[], examples=[ExampleRecord(input="x")])
    found = index.get(record.name)
    assert (found.scores, found.stats, found.examples) == (tuple(scores), (), (ExampleRecord(input="x"),))
    assert names(index, task="newtask", status="any") == [record.name]
    assert names(index, task=record.scores[0].task, status="any") == []
    index.update(record.name, status="active")
    assert index.get(record.name).reasons == ()


@pytest.mark.parametrize(
    "change",
    [
        {"status": "gone"},
        {"reasons": [1]},
        {"stats": ["x"]},
        {"scores": [ScoreRecord(task="t", metric="m", value=1)] * 2},
    ],
)
def test_update_refuses_what_a_record_cannot_have(index, make_record, change: dict) -> None:
    index.add(make_record(1))
    before = index.get(make_record(1).name)
    with pytest.raises(HubIndexError):
        index.update(make_record(1).name, **change)
    assert index.get(make_record(1).name) == before


def test_put_embeddings_is_all_or_none(index, make_record, numbered) -> None:
    index.add(make_record(1, entries=0))
    fresh = numbered.vector("new")
    with pytest.raises(UnknownNameError):
        index.put_embeddings({make_record(1).name: [fresh], "nobody": [fresh]})
    assert index.get(make_record(1).name).embeddings == ()
    index.put_embeddings({make_record(1).name: [numbered.vector("old")]})
    index.put_embeddings({make_record(1).name: [fresh]})
    assert index.get(make_record(1).name).embeddings == (fresh,)


def test_an_encoder_can_be_forgotten(index, make_record, numbered) -> None:
    index.add_all(make_record(number) for number in range(3))
    with pytest.raises(UnknownNameError, match="unknown encoder 'nobody'"):
        index.forget_encoder("nobody")
    assert index.forget_encoder(numbered.ENCODER) == 3
    assert index.info().encoders == ()
    index.put_embeddings({make_record(1).name: [replace(numbered.vector(1), prompt="another")]})


def test_gc_deletes_what_is_removed_and_files_nobody_needs(index, make_record, numbered) -> None:
    index.add_all(make_record(number) for number in range(4))
    index.query(vector=numbered.vector("q"))
    folder = index.path.with_name("hub.db.vectors")
    (copy,) = folder.glob("*.npy")
    (folder / ("0" * 16 + "-old.npy")).write_bytes(b"x")
    unfinished = folder / ".x.npy.tmp-123"
    unfinished.write_bytes(b"x")
    os.utime(unfinished, (0, 0))
    (folder / ".y.npy.tmp-124").write_bytes(b"somebody is writing this")
    index.remove([make_record(0).name])
    wanted = ((make_record(0).name,), tuple(sorted((unfinished.name, "0" * 16 + "-old.npy"))), ())
    assert index.gc(dry_run=True) == wanted
    assert len(index.ls(ANY)) == 4
    assert index.gc() == wanted
    assert [one.name for one in index.ls(ANY)] == [make_record(number).name for number in (1, 2, 3)]
    assert {file.name for file in folder.iterdir()} == {copy.name, ".y.npy.tmp-124"}
    assert index.gc() == ((), (), ())
    assert index.check() == []
    index.remove([make_record(number).name for number in (1, 2, 3)])
    swept = index.gc(compact=True)
    assert swept.encoders == (f"{numbered.ENCODER} (card)",)
    assert swept.files == (copy.name,)
    assert index._connection.execute("SELECT count(*) FROM module").fetchone() == (0,)


def test_ls_sorts_by_name_and_can_be_cut(index) -> None:
    index.add_all(plain(name, content) for name, content in (("b", "1"), ("a", "2"), ("c", "3")))
    assert names(index) == ["a", "b", "c"]
    assert [one.name for one in index.ls(limit=2)] == ["a", "b"]


def test_one_kind_of_record_is_read_for_all(index, make_record) -> None:
    index.add_all(make_record(number) for number in range(3))
    index.add(plain("bare"))
    found = index.read("stats")
    assert found == {make_record(number).name: make_record(number).stats for number in range(3)} | {"bare": ()}
    assert list(index.read("examples", Filters(base="organisation/base-2"))) == [make_record(2).name]
    with pytest.raises(UnknownNameError, match="unknown kind of record 'stat'; did you mean 'stats'"):
        index.read("stat")


def test_records_are_those_of_one_moment(index, make_record) -> None:
    index.add_all(make_record(number) for number in range(3))
    reading = index.records()
    next(reading)
    index.add(make_record(3))
    index.remove([make_record(2).name])
    assert [one.name for one in reading] == [make_record(1).name, make_record(2).name]


def test_folders_are_relative_to_the_index(index, tmp_path: Path) -> None:
    assert index.folder_of(plain("a", path="bank/a")) == tmp_path / "bank" / "a"
    assert index.folder_of(plain("a", path="/abs/a")) == Path("/abs/a")
    with pytest.raises(HubIndexError, match="known by description alone"):
        index.folder_of(AdapterRecord(name="a", source="description"))


def test_an_index_stays_where_it_is_when_the_process_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_record, numbered
) -> None:
    monkeypatch.chdir(tmp_path)
    with Index.open("hub.db", create=True) as opened:
        opened.add(make_record(1))
        monkeypatch.chdir("/")
        assert [one.name for one in opened.records()] == [make_record(1).name]
        opened.query(vector=numbered.vector("q"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["hub.db", "hub.db.vectors"]


def test_info_counts(index, make_record) -> None:
    index.add_all(make_record(number) for number in range(8))
    index.remove([make_record(0).name])
    info = index.info()
    assert info.statuses == {"active": 7, "quarantined": 0, "removed": 1}
    assert info.bases["organisation/base-1"] == 1
    assert info.schema == 2
    assert info.num_bytes > 0


def test_a_read_only_index_is_never_written(index, make_record, numbered) -> None:
    index.add(make_record(1))
    with Index.open(index.path, readonly=True) as other:
        for change in (
            lambda: other.add(make_record(2)),
            lambda: other.update(make_record(1).name, status="active"),
            lambda: other.remove([make_record(1).name]),
            other.gc,
        ):
            with pytest.raises(HubIndexError, match="readonly=True"):
                change()
        assert [hit.adapter.name for hit in other.query(vector=numbered.vector("q"))] == [make_record(1).name]
        assert other.gc(dry_run=True).adapters == ()
        assert other.check() == []
    assert not index.path.with_name("hub.db.vectors").exists()


def test_a_reader_sees_what_a_writer_commits(index, make_record, numbered) -> None:
    with Index.open(index.path, readonly=True) as reader:
        assert len(reader) == 0
        index.add(make_record(1))
        assert [hit.adapter.name for hit in reader.query(vector=numbered.vector("q"))] == [make_record(1).name]
        index.add(make_record(2))
        assert len(reader.query(vector=numbered.vector("q"))) == 2
        index.update(make_record(2).name, status="quarantined", reasons=["x"])
        assert len(reader.query(vector=numbered.vector("q"))) == 1


def test_an_index_is_not_used_across_a_fork(index, make_record) -> None:
    index._process += 1
    with pytest.raises(HubIndexError, match="forked"):
        index.add(make_record(1))
    index._process -= 1


def test_opening_and_asking_loads_no_torch(index, make_record) -> None:
    index.add_all(make_record(number) for number in range(3))
    program = (
        "import sys; from pathlib import Path\n"
        "from compose.hub_index import Index, export_jsonl, import_jsonl, read_lock\n"
        "path = Path(sys.argv[1]); index = Index.open(path)\n"
        "vector = index.get('adapter-0000001').embeddings[0]\n"
        "found = index.query('an adapter', vector=vector, k=2)\n"
        "export_jsonl(index, path.with_name('x.jsonl'))\n"
        "import_jsonl(Index.open(path.with_name('y.db'), create=True), path.with_name('x.jsonl'))\n"
        "assert found[0].adapter.name == 'adapter-0000001', found\n"
        "heavy = {'torch', 'transformers', 'safetensors', 'scipy', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, str(index.path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_check_finds_what_does_not_belong_together(index, make_record) -> None:
    index.add_all(make_record(number) for number in range(3))
    assert index.check() == []
    connection = index._connection
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.execute("INSERT INTO example VALUES (77, 0, 'x', 'y')")
    connection.execute("UPDATE adapter SET sha256 = ? WHERE id = 1", ("f" * 64,))
    connection.execute("UPDATE adapter SET title = 'changed behind its back' WHERE id = 2")
    told = "\n".join(index.check())
    assert "a row of example belongs to no adapter" in told
    assert "its identity is not that of its hashes" in told
    assert "the text index does not fit" in told


def test_findings_and_statistics_are_not_needed(index) -> None:
    index.add(plain("a"))
    assert index.get("a").stats == ()
    index.update("a", stats=[StatRecord(module="m", sigma1=1, fro=1, energy1=1, spec_entropy=0, kurtosis=3)])
    assert index.get("a").stats[0].fro == 1


@pytest.mark.parametrize("options", [{"create": True, "readonly": True}, {"journal": "off"}])
def test_options_that_make_no_sense_are_refused(tmp_path: Path, options: dict) -> None:
    with pytest.raises(HubIndexError):
        Index.open(tmp_path / "x.db", **options)
