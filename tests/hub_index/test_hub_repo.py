"""Repositories: names, the cache offline, and a server that counts what is asked for."""

import hashlib
import http.server
import json
import threading
from pathlib import Path

import pytest

import compose
from compose.errors import HubIndexError
from compose.hub_index import Index
from compose.hub_index.hub_repo import RepoId, fetch, parse_repo
from compose.hub_index.ingest import Options, add_tree
from tests.hub_index.folders import make

COMMIT = "3f" * 20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", RepoId("org/name", "")),
        ("hf:org/na.me_x", RepoId("org/na.me_x", "")),
        ("org/name@refs/pr/3", RepoId("org/name", "refs/pr/3")),
        ("name", None),
        ("org/name/deep", None),
        ("../name", None),
        ("org/..name", None),
        ("org/na..me", None),
        ("org/name@../../etc", None),
        ("org/na--me", None),
        ("/abs/olute", None),
        ("org/-rf", None),
        ("", None),
    ],
)
def test_only_names_of_repositories_are_names(text: str, expected) -> None:
    assert parse_repo(text) == expected


def put_in_cache(cache: Path, folder: Path, repo: str = "org/sums", main: str = COMMIT) -> Path:
    """Lay a folder out as huggingface_hub does: blobs by hash, a snapshot of links, a branch that names the commit."""
    home = cache / f"models--{repo.replace('/', '--')}"
    (home / "blobs").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(main)
    snapshot = home / "snapshots" / COMMIT
    for path in sorted(one for one in folder.rglob("*") if one.is_file()):
        blob = home / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.write_bytes(path.read_bytes())
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (len(link.relative_to(home).parts) - 1)) / "blobs" / blob.name)
    return snapshot


@pytest.fixture
def index(tmp_path: Path):
    with Index.open(tmp_path / "adapters.db", create=True) as opened:
        yield opened


def test_offline_the_cache_answers_and_the_commit_is_kept(index: Index, tmp_path: Path) -> None:
    put_in_cache(tmp_path / "cache", make(tmp_path / "made"))
    snapshot = fetch(RepoId("org/sums", "main"), cache=tmp_path / "cache")
    (outcome,) = add_tree(index, snapshot, Options())
    assert outcome[:2] == ("sums", "active")
    record = index.get("sums")
    assert (record.source, record.repo_id, record.revision) == ("hub", "org/sums", COMMIT)
    assert compose.Bank.from_index(index, names=["sums"])["sums"].targets


def test_offline_an_unknown_repository_names_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(
        HubIndexError, match=r"HF_HUB_OFFLINE is set. Where there is a network, run: hf download org/none"
    ):
        fetch(RepoId("org/none", ""), cache=tmp_path / "cache")


def test_a_whole_cache_is_a_tree_of_repositories(index: Index, tmp_path: Path) -> None:
    put_in_cache(tmp_path / "hub", make(tmp_path / "one"), "org/sums")
    several = make(tmp_path / "several" / "words", 1).parent
    make(several / "dates", 2)
    put_in_cache(tmp_path / "hub", several, "other/many")
    outcomes = add_tree(index, tmp_path / "hub", Options())
    assert [(one.name, one.state) for one in outcomes] == [
        ("sums", "active"),
        ("dates", "active"),
        ("words", "active"),
    ]
    assert {one.repo_id for one in index.ls()} == {"org/sums", "other/many"}
    assert {one.revision for one in index.ls()} == {COMMIT}


def test_a_snapshot_that_links_out_of_its_repository_is_refused(index: Index, tmp_path: Path) -> None:
    snapshot = put_in_cache(tmp_path / "hub", make(tmp_path / "made"))
    elsewhere = tmp_path / "hub" / "models--other--secret"
    elsewhere.mkdir()
    weights = snapshot / "adapter_model.safetensors"
    (elsewhere / "file").write_bytes(weights.read_bytes())
    weights.unlink()
    weights.symlink_to(elsewhere / "file")
    (outcome,) = add_tree(index, snapshot, Options())
    assert (outcome.state, outcome.code) == ("refused", "link")


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as a download asks for."""

    root: Path
    asked: list[str]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        words = path.removeprefix("/api/models").split("/")[1:]
        folder = self.root / words[1]
        if folder.is_dir() and words[2:3] == ["revision"]:
            self._json({"id": "/".join(words[:2]), "sha": COMMIT, "siblings": [], "tags": [], "downloads": 0})
        elif folder.is_dir() and words[2:4] == ["tree", COMMIT]:
            names = sorted(one for one in folder.rglob("*") if one.is_file())
            listed = [{"path": str(one.relative_to(folder)), "size": one.stat().st_size} for one in names]
            self._json([{"type": "file", "oid": "0" * 40, **one} for one in listed])
        elif folder.is_dir() and words[2:4] == ["resolve", COMMIT]:
            self._file(folder, "/".join(words[4:]))
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

    def _json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, folder: Path, name: str) -> None:
        data = (folder / name).read_bytes()
        if self.command == "GET":
            self.asked.append(f"{folder.name}/{name}")
        self._send(data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def _send(self, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path):
    folder = make(tmp_path / "repository" / "sums")
    pickled = make(tmp_path / "repository" / "old", 1)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    (folder / "model.safetensors").write_bytes(b"a whole model")
    (folder / "optimizer.pt").write_bytes(b"a pickle")
    (folder / "adapter_model.bin").write_bytes(b"a pickle")
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results" / "x.yaml").write_text("- dataset: {id: org/bench, task_id: t}\n  value: 3\n")
    Hub.root, Hub.asked = tmp_path / "repository", []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_only_files_of_adapters_are_downloaded(hub: str, call_index, tmp_path: Path) -> None:
    online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    done = call_index("add", "org/sums", "org/none", "org/old", "--json", **online)
    assert done.returncode == 3, done.stderr
    adapters = json.loads(done.stdout)["adapters"]
    assert [(one["name"], one["state"], one["code"]) for one in adapters] == [
        ("sums", "active", ""),
        ("org/none", "refused", "source"),
        ("org/old", "refused", "source"),
    ]
    assert "the weights are pickled (adapter_model.bin)" in adapters[2]["reasons"][0]
    assert adapters[1]["reasons"][0].startswith("org/none: 404")
    assert sorted(Hub.asked) == [
        "sums/.eval_results/x.yaml", "sums/README.md", "sums/adapter_config.json", "sums/adapter_model.safetensors",
    ]  # fmt: skip
    with Index.open(tmp_path / "cli.db", readonly=True) as index:
        record = index.get("sums")
    assert (record.source, record.repo_id, record.revision) == ("hub", "org/sums", COMMIT)
    assert [one.task for one in record.scores] == ["org/bench/t"]
