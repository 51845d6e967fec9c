"""Sources on the Hugging Face hub, with the real huggingface_hub, and a server that answers as the hub does."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from pipeline.cache import plan
from pipeline.errors import StorageError
from pipeline.records import Unit
from pipeline.sources.listing import Listing, list_sources, same_root
from pipeline.storage.folder import Folder
from pipeline.storage.hub import pin_revision, strip_commit
from pipeline.storage.reading import open_stream

huggingface_hub = pytest.importorskip("huggingface_hub")

FIRST, SECOND = "1" * 40, "2" * 40
ROOT = "hf://datasets/owner/set"
API, FILES = "/api/datasets/owner/set", "/datasets/owner/set/resolve/"
COMMITS = {
    FIRST: {"README.md": b"card", "data/0.tar": b"zero", "data/1.tar": b"one"},
    SECOND: {"README.md": b"card", "data/0.tar": b"zero", "data/1.tar": b"one, changed", "data/2.tar": b"two"},
}


class Hub(ThreadingHTTPServer):
    """A server with the data set `owner/set`, of which the main branch moves."""

    branches: dict[str, str]
    requests: list[str]

    @property
    def options(self) -> dict[str, str]:
        return {"endpoint": f"http://127.0.0.1:{self.server_address[1]}"}


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.server.requests.append(url.path)
        if url.path == API or url.path.startswith(f"{API}/revision/"):
            revision = url.path[len(f"{API}/revision/") :] or "main"
            commit = self.server.branches.get(revision, revision)
            self.answer({"id": "owner/set", "sha": commit} if commit in COMMITS else None)
        elif url.path.startswith(f"{API}/tree/"):
            commit, _, folder = url.path[len(f"{API}/tree/") :].partition("/")
            self.answer(
                list_tree(COMMITS[commit], folder, "true" in parse_qs(url.query).get("recursive", [""])[0].lower())
            )
        elif url.path.startswith(FILES):
            commit, _, name = url.path[len(FILES) :].partition("/")
            self.answer(COMMITS[commit][name])
        else:
            self.answer(None)

    def answer(self, content: object) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound" if "/tree/" in self.path else "RepoNotFound")
        elif wanted := self.headers.get("range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            data = data[int(first) : int(last) + 1]
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


def list_tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, object]] | None:
    """Return the entries of a folder; None if it does not exist."""
    prefix = f"{folder}/" if folder else ""
    names = [name for name in files if name.startswith(prefix)]
    folders = {name.rpartition("/")[0] for name in names if "/" in name[len(prefix) :]}
    return [
        *({"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)),
        *(
            {"type": "file", "path": name, "size": len(files[name]), "oid": oid(files[name])}
            for name in names
            if recursive or "/" not in name[len(prefix) :]
        ),
    ] or None


def oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub(("127.0.0.1", 0), Answers) as server:
        server.branches, server.requests = {"main": FIRST, "v1": FIRST, "refs%2Fconvert%2Fparquet": SECOND}, []
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def list_hub(hub: Hub, *sources: str) -> Listing:
    huggingface_hub.HfFileSystem.clear_instance_cache()  # as in another process
    return list_sources(sources, hub.options, excluded="/cache")


def read(unit: Unit, hub: Hub) -> bytes:
    with open_stream(unit.url, hub.options, unit) as stream:
        return stream.read()


@pytest.mark.parametrize(
    ("url", "pinned"),
    [
        (f"{ROOT}/data/*.tar", f"{ROOT}@{FIRST}/data/*.tar"),
        (f"{ROOT}@main", f"{ROOT}@{FIRST}"),
        (f"{ROOT}@v1/data", f"{ROOT}@{FIRST}/data"),
        (f"{ROOT}@{SECOND}/data/0.tar", f"{ROOT}@{SECOND}/data/0.tar"),
        (f"{ROOT}@refs%2Fconvert%2Fparquet/default", f"{ROOT}@{SECOND}/default"),
        ("s3://bucket/a@main/b", "s3://bucket/a@main/b"),
        ("/disk/a@main", "/disk/a@main"),
    ],
)
def test_a_revision_is_replaced_by_its_commit(hub: Hub, url: str, pinned: str) -> None:
    assert pin_revision(url, hub.options) == pinned
    assert strip_commit(f"{ROOT}@{FIRST}/data") == f"{ROOT}/data"
    assert strip_commit(f"/disk/a@{FIRST}") == f"/disk/a@{FIRST}"


def test_a_commit_is_not_looked_up(hub: Hub) -> None:
    huggingface_hub.HfFileSystem.clear_instance_cache()
    pin_revision(f"{ROOT}@{FIRST}", hub.options)
    assert hub.requests == [f"{API}/revision/{FIRST}"], "only the filesystem checks that it exists"


@pytest.mark.parametrize("below", ["", "@main", "/data", "@v1/data/*.tar", "/data/{0..1}.tar"])
def test_files_are_listed_at_one_commit(hub: Hub, below: str) -> None:
    listing = list_hub(hub, ROOT + below)
    folder = "data" if "/data" in below else "set/data"
    tars = [file for file in listing.files if file.path.endswith(".tar")]
    assert [file.url for file in tars] == [f"{ROOT}@{FIRST}/data/{n}.tar" for n in range(2)]
    assert [file.path for file in tars] == [f"{folder}/{n}.tar" for n in range(2)]
    assert [(file.bytes, file.etag) for file in tars] == [(4, oid(b"zero")), (3, oid(b"one"))]
    assert same_root(listing.sources[0].root, listing.sources[0].root.replace(FIRST, SECOND))


def test_a_job_continues_at_its_commit_after_the_branch_has_moved(hub: Hub, tmp_path: Path) -> None:
    cache = Folder(str(tmp_path))
    listing = list_hub(hub, ROOT)
    units, _ = plan.extend_plan(cache, listing.files, listing.sources)
    hub.branches["main"] = SECOND
    assert [read(unit, hub) for unit in units] == [b"zero", b"one"]
    assert [read(unit, hub) for unit in plan.read_plan(cache)] == [b"zero", b"one"]
    listing = list_hub(hub, ROOT)
    units, notes = plan.extend_plan(cache, listing.files, listing.sources)
    assert [read(unit, hub) for unit in sorted(units, key=lambda unit: unit.path)] == [b"zero", b"one, changed", b"two"]
    assert ["have changed since they were planned: 1 (set/data/1.tar)" in note for note in notes] == [True]


def test_a_repository_that_does_not_exist_is_named(hub: Hub) -> None:
    with pytest.raises(StorageError, match="cannot list hf://datasets/owner/other: no such file or directory"):
        list_hub(hub, "hf://datasets/owner/other")


def test_the_extra_is_named_if_the_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(protocol: str) -> None:
        raise ImportError("Install huggingface_hub to access HfFileSystem")  # as fsspec does

    monkeypatch.setattr("fsspec.get_filesystem_class", refuse)
    with pytest.raises(StorageError, match=r"cannot reach hf://.*: Install huggingface_hub .*; the extra hub has it"):
        pin_revision(ROOT, {})
