"""Parents of composed adapters, from what Compose leaves beside them."""

import hashlib
import json
from pathlib import Path

from compose.errors import AdapterFormatError
from compose.hub_index.lineage import read_lineage

ONE, TWO = "1" * 64, "2" * 64


def test_a_search_names_the_adapters_with_a_weight(tmp_path: Path) -> None:
    bank = [{"name": "a", "sha256": ONE}, {"name": "b", "sha256": TWO}, {"name": "c", "sha256": "3" * 64}]
    weights = {"adapters": ["c", "b", "a"], "values": [[0, 0.5, 1.0], [0, 0.5, 2.0]]}
    text = json.dumps({"bank": {"adapters": bank}, "weights": weights})
    (tmp_path / "report.json").write_text(text)
    parents, notes = read_lineage(tmp_path, Path.read_bytes)
    assert [(one.parent_sha256, one.weight, one.method) for one in parents] == [
        (TWO, 0.5, "few-shot search"),
        (ONE, None, "few-shot search"),  # differs by layer
    ]
    assert {one.config_sha256 for one in parents} == {hashlib.sha256(text.encode()).hexdigest()}
    assert notes == ()


def test_files_of_other_programs_and_damaged_ones_harm_nothing(tmp_path: Path) -> None:
    assert read_lineage(tmp_path, Path.read_bytes) == ((), ())
    for text in ('{"parents": 3}', '{"bank": [], "weights": 1}', '{"parents": [1, {"sha256": 4}]}'):
        (tmp_path / "report.json").write_text(text)
        (tmp_path / "merge.json").write_text(text)
        assert read_lineage(tmp_path, Path.read_bytes) == ((), ())
    (tmp_path / "merge.json").write_text("{")
    parents, (note,) = read_lineage(tmp_path, Path.read_bytes)
    assert parents == ()
    assert note.startswith("lineage not read: ")

    def refuse(path: Path) -> bytes:
        raise AdapterFormatError("leads out")

    assert read_lineage(tmp_path, refuse) == ((), ("lineage not read: leads out",))
