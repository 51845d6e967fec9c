"""Manifests as sources: tables with the path or the URL of one image per row."""

import functools
import gzip
import http.server
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import Rejected, SourceError, StorageError
from pipeline.limits import Limits
from pipeline.readers.manifest import read_manifest_unit, resolve_path
from pipeline.records import Manifest, Reject, Sample, Unit
from pipeline.sources.listing import list_sources
from pipeline.sources.manifest import find_manifests
from pipeline.sources.metadata import TableReader
from pipeline.sources.units import make_units
from pipeline.storage.folder import Folder
from tests.conftest import encoded, smooth
from tests.jobs.test_metadata import read_columns, write_images, write_jsonl

Command = Callable[..., tuple[int, str, str]]
LARGE = bytes(range(256)) * (8 << 10)
COMPRESSED = gzip.compress(bytes(1 << 20))
COLUMNS = pa.schema([("caption", pa.string())])


def make_manifest_units(
    source: Path | str, image_column: str | None = None, key_column: str | None = None, image_root: str = ""
) -> list[Unit]:
    reader = TableReader({}, Limits(), "utf-8", image_column)
    return make_units(
        find_manifests(list_sources([str(source)], {}, "nowhere").files, reader, key_column, image_root).files
    )


def read_units(
    source: Path | str, image_column: str | None = None, key_column: str | None = None, image_root: str = ""
) -> list[tuple[str, object]]:
    """Return the key of each sample, and its caption or the reason of its reject."""
    found: list[tuple[str, object]] = []
    for unit in make_manifest_units(source, image_column, key_column, image_root):
        for item in read_manifest_unit(unit, {}, COLUMNS, image_column, key_column, Limits()):
            found.append((item.key, item.reason if isinstance(item, Reject) else item.columns.get("caption")))
    return found


def test_each_row_of_a_manifest_is_a_sample(encode: Command, latentmill: Command, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", "images/a.jpg", "images/b.v2.jpg", "images/unlisted.jpg")
    rows: list[dict[str, Any]] = [
        {"image_path": "images/a.jpg", "caption": "A", "size": [96, 80], "score": 1},
        {"image_path": "./images/b.v2.jpg", "caption": "B", "size": [64, 64], "score": 0.5},
        {"image_path": "images/gone.jpg", "caption": "C"},
    ]
    write_jsonl(folder / "list.jsonl", *rows)
    code, out, err = encode(folder / "list.jsonl", "--max-reject-rate", 0.5)
    assert code == 0, err
    assert "INFO set/list.jsonl lists 3 images, in the column image_path\n" in err
    assert "images/gone in set/list.jsonl (not_found)" in out
    assert read_columns(tmp_path / "c", "shard", "image_path", "caption", "size", "score") == {
        "images/a": ("set/list.jsonl", "images/a.jpg", "A", [96, 80], 1.0),
        "images/b%2Ev2": ("set/list.jsonl", "./images/b.v2.jpg", "B", [64, 64], 0.5),
    }
    (folder / "images/gone.jpg").write_bytes(encoded(smooth(9)))
    assert latentmill("retry", tmp_path / "c", "--workers", 0)[0] == 0
    assert read_columns(tmp_path / "c", "caption")["images/gone"] == ("C",)
    assert latentmill("verify", tmp_path / "c", "--recount", "--reencode", 3)[0] == 0
    os.rename(folder, tmp_path / "moved")
    moved = f"set={tmp_path / 'moved'}/list.jsonl"
    assert latentmill("verify", tmp_path / "c", "--recount", "--source", moved)[0] == 0
    _, out, err = encode(moved)
    assert ("encoded 0 images" in out, "the source set has moved" in err) == (True, True)
    os.rename(tmp_path / "moved", folder)
    write_jsonl(folder / "list.jsonl", *rows[:2])
    assert "since they were planned: 1 (set/list.jsonl);" in encode(folder / "list.jsonl")[2]


def test_a_unit_has_256_rows_and_keys_are_unique_in_the_manifest(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", "a.jpg")
    rows = [{"file_name": "a.jpg", "id": number // 2 if number > 510 else number} for number in range(513)]
    write_jsonl(folder / "list.jsonl", *rows)
    units = make_manifest_units(folder / "list.jsonl", key_column="id")
    assert [unit.range for unit in units] == [(0, 3), (1, 3), (2, 3)]
    assert len({unit.name for unit in units}) == 3
    found = read_units(folder / "list.jsonl", key_column="id")
    assert len(found) == 513
    assert found[510:] == [("510", None), ("255", "duplicate_key"), ("256", "duplicate_key")]
    assert [reason for _, reason in read_units(folder / "list.jsonl")].count("duplicate_key") == 512


def test_manifests_of_other_tools(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", "a.jpg", "b.jpg")
    (folder / "meta_cap.json").write_text(json.dumps({name: {"caption": name} for name in ("a.jpg", "b.jpg")}))
    (folder / "list.csv").write_text("caption,path\nA,a.jpg\nB,b.jpg\n")
    pq.write_table(pa.table({"img": ["a.jpg", None], "caption": ["A", "B"], "id": ["x", None]}), folder / "p.parquet")
    assert read_units(folder / "meta_cap.json") == [("a", "a.jpg"), ("b", "b.jpg")]
    assert read_units(folder / "list.csv") == [("a", "A"), ("b", "B")]
    assert read_units(folder / "p.parquet", "img") == [("a", "A"), ("1", "no_image")]
    assert read_units(folder / "p.parquet", "img", "id") == [("x", "A"), ("", "no_image")]
    assert read_units(folder / "list.csv", key_column="caption", image_root=str(folder)) == [("A", "A"), ("B", "B")]
    assert make_manifest_units(folder / "p.parquet")[0].kind == "parquet", "it has no known column of paths"
    assert {unit.kind for unit in make_manifest_units(folder)} == {"folder", "parquet"}, "no manifest is named"
    with pytest.raises(SourceError, match="has no column with the paths of images: it has x"):
        make_manifest_units(write_table(folder / "other.csv", "x\n1\n"))
    with pytest.raises(SourceError, match=r"--key-column: .* has no column id; it has caption, path"):
        make_manifest_units(folder / "list.csv", key_column="id")


def test_a_manifest_at_the_root_of_a_store() -> None:
    root = Folder("memory://")
    root.replace("manifest-a.jpg", encoded(smooth(0)))
    root.replace("manifest.csv", b"path,caption\nmanifest-a.jpg,A\n")
    source = "m=memory://manifest.csv"
    assert read_units(source) == [("manifest-a", "A")]
    reader = TableReader({}, Limits(), "utf-8", None)
    with pytest.raises(SourceError, match="would be encoded twice: 1"):
        find_manifests(list_sources([source, "i=memory://manifest-a.jpg"], {}, "nowhere").files, reader, None, "")


def test_paths_may_lack_their_extension(tmp_path: Path) -> None:
    """sd-scripts writes such keys without --full_path."""
    folder = write_images(tmp_path / "set", "imgs/1.JPG", "2.v1.png", "2.v2.png", "plain", "imgs/.png")
    paths = ("imgs/1", "2.v1", "2.v2", "plain", "imgs", "gone", "2")
    manifest = folder / "meta_cap.json"
    manifest.write_text(json.dumps({path: {"caption": path} for path in paths}))
    found = [(path.replace(".", "%2E"), path) for path in paths[:4]]
    assert read_units(manifest) == [*found, *((path, "not_found") for path in paths[4:])]
    files = list_sources([str(manifest), str(folder / "2.v1.png")], {}, "nowhere").files
    with pytest.raises(SourceError, match=r"would be encoded twice: 1 \(2\.v1\)"):
        find_manifests(files, TableReader({}, Limits(), "utf-8", None), None, "")


def write_table(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("path", "root", "below"),
    [
        ("a/./b.jpg", "/data", "a/b.jpg"),
        ("a\\b.jpg", "/data", "a/b.jpg"),
        ("x/../a.jpg", "/data", "a.jpg"),
        ("/data/a.jpg", "/data/", "a.jpg"),
        ("file:///data/a.jpg", "/data", "a.jpg"),
        ("s3://bucket/a.jpg", "/data", "s3://bucket/a.jpg"),
        ("HTTPS://Host/A.jpg", "/data", "https://Host/A.jpg"),
        ("../a.jpg", "/data", "outside_root"),
        ("a/../../b.jpg", "/data", "outside_root"),
        ("/data2/a.jpg", "/data", "outside_root"),
        ("/etc/passwd", "s3://bucket/set", "outside_root"),
        ("file:///etc/passwd", "/data", "outside_root"),
        ("memory://a.jpg", "/data", "outside_root"),
        ("ssh://host/a.jpg", "/data", "outside_root"),
        ("https:///a.jpg", "/data", "not_found"),
        ("s3://bucket", "/data", "not_found"),
        ("https://user:password@host/a.jpg", "/data", "outside_root"),
        ("a\0.jpg", "/data", "outside_root"),
        ("", "/data", "no_image"),
        (None, "/data", "no_image"),
    ],
)
def test_a_manifest_leads_to_no_file_outside_its_root(path: str | None, root: str, below: str) -> None:
    try:
        found = resolve_path(path, root)
    except Rejected as error:
        found = error.reason
    assert found == below


def test_a_missing_root_fails_the_unit_instead_of_rejecting_all_rows(tmp_path: Path) -> None:
    """The disk with the images may not be mounted."""
    folder = write_images(tmp_path / "set", "a.jpg")
    write_jsonl(folder / "list.jsonl", {"file_name": "a.jpg"})
    with pytest.raises(SourceError, match="is missing or empty"):
        read_units(folder / "list.jsonl", image_root=str(tmp_path / "not mounted"))


def test_texts_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", "a.jpg", "b.jpg")
    (folder / "list.jsonl").write_bytes(b'{"file_name": "a.jpg", "caption": "\xff"}\n')
    with pytest.raises(SourceError, match=r"list\.jsonl cannot be read as JSONL"):
        make_manifest_units(folder / "list.jsonl")
    caption = pa.array([b"\xff", b"fine"]).view(pa.string())
    pq.write_table(pa.table({"file_name": ["a.jpg", "b.jpg"], "caption": caption}), folder / "list.parquet")
    assert read_units(folder / "list.parquet") == [("a", "bad_text"), ("b", "fine")]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Yield the URL of a web server that has one image. Paths below `/broken` have the status 503.

    `/loop` leads to itself. `/slow` has LARGE in pieces, without its size. `/compressed` has COMPRESSED.
    """

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/broken"):
                self.send_error(503)
            elif self.path == "/loop":
                self.send_response(302)
                self.send_header("Location", "/loop")
                self.end_headers()
            elif self.path == "/slow":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(LARGE)
            elif self.path == "/compressed":
                self.send_response(200)
                self.send_header("Content-Encoding", "gzip")
                self.send_header("Content-Length", str(len(COMPRESSED)))
                self.end_headers()
                self.wfile.write(COMPRESSED)
            else:
                super().do_GET()

        def do_HEAD(self) -> None:
            if self.path in ("/slow", "/compressed"):
                self.send_response(200)
                self.end_headers()
            else:
                self.send_error(503) if self.path.startswith("/broken") else super().do_HEAD()

        def log_message(self, *args: object) -> None:
            pass

    folder = write_images(tmp_path / "web", "a b.jpg")
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        thread = threading.Thread(target=web.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()
        thread.join()


def test_images_are_read_from_urls(tmp_path: Path, server: str) -> None:
    rows = [{"url": f"{server}/{name}", "caption": name} for name in ("a%20b.jpg?size=1", "a%20b.jpg", "gone.jpg")]
    write_jsonl(tmp_path / "list.jsonl", *rows)
    assert read_units(tmp_path / "list.jsonl") == [("0", "a%20b.jpg?size=1"), ("1", "a%20b.jpg"), ("2", "not_found")]
    (unit,) = make_manifest_units(tmp_path / "list.jsonl")
    with_secret = {"key": "of another store"}
    first = next(read_manifest_unit(unit, with_secret, COLUMNS, None, None, Limits()))
    assert isinstance(first, Sample)
    assert first.image == (tmp_path / "web/a b.jpg").read_bytes()


def test_urls_that_are_not_valid_are_rejected(tmp_path: Path, server: str) -> None:
    urls = ["http://[bad/a.jpg", "http://host:99999/a.jpg", "http://.../a.jpg", "hf://datasets/a", f"{server}/loop"]
    write_jsonl(tmp_path / "list.jsonl", *({"url": url} for url in urls))
    assert [reason for _, reason in read_units(tmp_path / "list.jsonl")] == ["not_found"] * len(urls)


def test_images_of_unknown_size_are_read_to_their_end(tmp_path: Path, server: str) -> None:
    """What a server compresses is not decompressed, because it may be a bomb."""
    write_jsonl(tmp_path / "list.jsonl", {"url": f"{server}/slow"}, {"url": f"{server}/compressed"})
    (unit,) = make_manifest_units(tmp_path / "list.jsonl")
    items = list(read_manifest_unit(unit, {}, COLUMNS, None, None, Limits()))
    assert [isinstance(item, Sample) and item.image for item in items] == [LARGE, COMPRESSED]
    (item, _) = read_manifest_unit(unit, {}, COLUMNS, None, None, Limits(image_bytes=1_000_000))
    assert isinstance(item, Sample)
    assert item.image == LARGE[:1_000_001]


@pytest.mark.parametrize("url", ["{server}/broken/a.jpg", "http://127.0.0.1:9/a.jpg"])
def test_a_server_that_does_not_answer_fails_the_unit(tmp_path: Path, server: str, url: str) -> None:
    write_jsonl(tmp_path / "list.jsonl", {"url": url.format(server=server)})
    with pytest.raises(StorageError, match=r"cannot read http://127\.0\.0\.1:") as caught:
        read_units(tmp_path / "list.jsonl")
    assert caught.value.may_pass


@pytest.mark.parametrize("path", ["/broken/a.jpg", "//broken/a%20b.jpg"])
def test_errors_do_not_show_the_credentials_of_urls(tmp_path: Path, server: str, path: str) -> None:
    url = f"{server}{path}?X-Amz-Signature=SECRET%2F1".replace("://", "://SECRET@")
    write_jsonl(tmp_path / "list.jsonl", {"url": url})
    with pytest.raises(StorageError, match=r"cannot read http://127\.0\.0\.1:.*/broken/a") as caught:
        read_units(tmp_path / "list.jsonl")
    assert "SECRET" not in str(caught.value)


def test_options_are_not_sent_to_another_server(tmp_path: Path, server: str) -> None:
    """They may be a token for the server of the manifest."""
    write_jsonl(tmp_path / "list.jsonl", {"url": f"{server}/a%20b.jpg"})
    (unit,) = make_manifest_units(tmp_path / "list.jsonl", image_root="http://localhost:9")
    (item,) = read_manifest_unit(unit, {"not an option": 1}, COLUMNS, None, None, Limits())
    assert isinstance(item, Sample)


def test_another_image_root_is_planned(encode: Command, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "lists", "none.jpg")
    images = write_images(tmp_path / "images", "a.jpg")
    write_jsonl(folder / "list.jsonl", {"file_name": "a.jpg", "caption": "A"})
    code, _, err = encode(folder / "list.jsonl", "--image-root", tmp_path / "not mounted", "--stall-timeout", 1)
    assert (code, "is missing or empty" in err) == (1, True)
    write_jsonl(folder / "list.jsonl", {"file_name": "a.jpg", "caption": "edited"})
    code, _, err = encode(folder / "list.jsonl", "--stall-timeout", 1)
    assert (code, "not mounted is missing or empty" in err) == (1, True), "the folder of the plan is kept"
    code, out, err = encode(folder / "list.jsonl", "--image-root", images)
    assert (code, "encoded 1 image" in out) == (0, True), err
    code, _, err = encode(folder / "list.jsonl", "--image-root", "https://user:password@host", "--to", tmp_path / "d")
    assert (code, "must not contain a password" in err, (tmp_path / "d").exists()) == (2, True, False)


def test_a_manifest_without_rows_is_an_error(encode: Command, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", "a.jpg")
    write_table(folder / "empty.csv", "file_name,caption\n")
    write_jsonl(folder / "list.jsonl", {"file_name": "a.jpg", "caption": "A"})
    pq.write_table(pa.table({"file_name": pa.array([], pa.string())}), folder / "empty.parquet")
    code, _, err = encode(folder / "empty.csv")
    assert (code, "empty.csv lists no images: it has no rows" in err) == (2, True), err
    code, _, err = encode(folder / "empty.parquet")
    assert (code, "empty.parquet" in err) == (2, True), err
    code, _, err = encode(folder / "empty.csv", folder / "list.jsonl")
    assert (code, "empty.csv lists no images" in err) == (0, True), err


def test_a_listed_file_is_named_if_the_user_names_it(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", "a.jpg", "b/c.jpg")
    write_jsonl(folder / "list.jsonl", {"file_name": "a.jpg"})

    def named(*sources: str) -> list[str]:
        return [f.path for f in list_sources([f"{tmp_path}/{s}" for s in sources], {}, "nowhere").files if f.is_named]

    assert named("set") == []
    assert named("set/list.jsonl", "set") == named("set", "set/list.jsonl") == ["set/list.jsonl"]
    assert named("set/*.jsonl") == ["set/list.jsonl"]
    listing = list_sources([f"{folder}/*"], {}, "nowhere")
    found = find_manifests(listing.files, TableReader({}, Limits(), "utf-8", None), None, "/images")
    assert [f.path for f in found.files if f.manifest == Manifest(1, "/images")] == ["set/list.jsonl"]


def test_images_of_a_manifest_are_not_listed_themselves(encode: Command, tmp_path: Path) -> None:
    """A shell expands `set/*` to the manifest and the folder of its images."""
    folder = write_images(tmp_path / "set", "images/a.jpg", "images/b.jpg")
    write_jsonl(folder / "list.jsonl", {"file_name": "images/a.jpg"}, {"file_name": "gone.jpg"}, {"file_name": None})
    code, _, err = encode(folder / "list.jsonl", "--image-root", folder, folder / "images")
    assert (code, "would be encoded twice: 1 (images/a.jpg); leave out the manifest" in err) == (2, True), err
