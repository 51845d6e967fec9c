"""Reads that return fewer bytes than the file has: a storage error, and neither damage nor the end of the file."""

import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DamagedError, SourceError, StorageError
from pipeline.flow import UnitWorker
from pipeline.formats.schema import OutputSchema, PassthroughColumns
from pipeline.records import Unit
from pipeline.storage import connection, reading
from pipeline.storage.folder import Folder
from pipeline.storage.reading import open_stream, read_file
from tests.conftest import img2dataset_members, write_tar
from tests.pipeline.conftest import unit_of

ShortReads = Callable[[str, int | None], None]
CONTENT = bytes(range(256)) * 40


@pytest.fixture
def url(root: str) -> str:
    Folder(root).replace("x.tar", CONTENT)
    return f"{root}/x.tar"


def make_unit(url: str) -> Unit:
    return Unit(name="u", kind="tar", path="x.tar", bytes=len(CONTENT))


ENDED_EARLY = re.escape(f"x.tar ended at byte 9000, but has {len(CONTENT)} bytes: the transfer was cut short")


@pytest.mark.parametrize("seeking", [False, True])
@pytest.mark.parametrize("is_planned", [False, True])
def test_a_stream_that_ends_early_is_a_storage_error(
    short_reads: ShortReads, url: str, seeking: bool, is_planned: bool
) -> None:
    short_reads("x.tar", 9000)
    unit = make_unit(url) if is_planned else None
    for read in (lambda file: file.read(), lambda file: [file.read(512) for _ in range(30)]):
        with pytest.raises(StorageError, match=ENDED_EARLY), open_stream(url, {}, unit, seeking) as stream:
            read(stream)


def test_an_empty_read_inside_the_file_is_not_its_end(short_reads: ShortReads, url: str) -> None:
    short_reads("x.tar", 9000)
    with pytest.raises(StorageError, match="ended at byte 9500"), open_stream(url, {}, make_unit(url), True) as stream:
        assert stream.seek(0, 2) == len(CONTENT)
        assert stream.read() == b""
        stream.seek(9500)
        stream.read(10)


def test_reads_are_repeated_until_they_are_complete(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file may return fewer bytes than requested, as pipes and sockets do."""
    for filesystem_class in (connection.LocalFileSystem, connection.MemoryFileSystem):
        original = filesystem_class.open

        def open_raw(self: Any, path: str, mode: str, original: Callable[..., Any] = original, **options: Any) -> Any:
            file = original(self, path, mode, **options)
            read = file.read
            monkeypatch.setattr(file, "read", lambda size=-1: read(min(size, 700) if size >= 0 else 700))
            return file

        monkeypatch.setattr(filesystem_class, "open", open_raw)
    with open_stream(url, {}, make_unit(url)) as stream:
        assert stream.read(5000) + stream.read() == CONTENT
        assert stream.read(1) == b""


@pytest.mark.parametrize("raised", [DamagedError("it is damaged", at=3), OSError("what?"), None])
def test_a_short_read_is_reported_whatever_error_the_reader_raises(
    short_reads: ShortReads, url: str, raised: Exception | None
) -> None:
    short_reads("x.tar", 9000)
    with pytest.raises(StorageError, match=ENDED_EARLY), open_stream(url, {}, make_unit(url)) as stream:
        try:
            stream.read()
        except StorageError:
            if raised is not None:
                raise raised from None


def test_a_file_that_becomes_shorter_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(bytes(20 << 20))
    unit = Unit(name="u", kind="tar", path="x.tar", bytes=20 << 20)
    with (
        pytest.raises(SourceError, match=r"x\.tar changed while it was being read"),
        open_stream(str(path), {}, unit) as stream,
    ):
        stream.read(100)
        path.write_bytes(b"short")
        stream.read()


def test_damage_in_a_file_that_changes_while_it_is_read_is_a_change(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(CONTENT)
    with (
        pytest.raises(SourceError, match=r"x\.tar changed while it was being read"),
        open_stream(str(path), {}, make_unit(str(path))),
    ):
        path.write_bytes(CONTENT[::-1] + b"x")
        raise DamagedError("it is damaged", at=3)


def test_short_reads_of_whole_files_are_storage_errors(short_reads: ShortReads, root: str, url: str) -> None:
    assert read_file(url, {}, 1 << 20) == read_file(url, {}, 1 << 20, len(CONTENT)) == CONTENT
    assert read_file(url, {}, 99, len(CONTENT)) == CONTENT[:100]
    with pytest.raises(SourceError, match=r"x\.tar has changed since it was planned \(then 7 bytes\)"):
        read_file(url, {}, 1 << 20, 7)
    short_reads("x.tar", 9000)
    with pytest.raises(StorageError, match=ENDED_EARLY):
        read_file(url, {}, 1 << 20)
    if "://" not in root:  # the libraries of object stores check the length of answers
        for read in (Folder(root).read, Folder(root).read_if_exists):
            with pytest.raises(StorageError, match=ENDED_EARLY):
                read("x.tar")
    with pytest.raises(StorageError, match=ENDED_EARLY), Folder(root).open("x.tar") as stream:
        stream.read()


def test_a_short_copy_of_a_checkpoint_is_a_storage_error(
    short_reads: ShortReads, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = f"memory://{uuid.uuid4().hex}"
    Folder(root).replace("vae/x.safetensors", CONTENT)
    with reading.fetch(f"{root}/vae", {}, re.compile(r".*\.safetensors")) as local:
        assert Path(local, "x.safetensors").read_bytes() == CONTENT
    short_reads("x.safetensors", 9000)
    for ref in (f"{root}/vae", f"{root}/vae/x.safetensors"):
        with (
            pytest.raises(StorageError, match=r"memory://.*x\.safetensors ended at byte 9000, but has 10240"),
            reading.fetch(ref, {}, re.compile(r".*\.safetensors")),
        ):
            pass


@pytest.mark.parametrize("end", [0, 100, 3000, -9, -1])
def test_a_short_read_of_metadata_beside_a_tar_fails_its_unit(
    worker: Callable[..., UnitWorker], short_reads: ShortReads, tmp_path: Path, end: int
) -> None:
    tar = write_tar(tmp_path / "s/0.tar", img2dataset_members(0, 3, height=64, width=64))
    pq.write_table(pa.table({"key": [f"{n:09d}" for n in range(3)], "url": ["u" * 2000] * 3}), tmp_path / "s/0.parquet")
    layout = OutputSchema(columns=PassthroughColumns(pa.schema([("url", pa.string())]), ()))
    short_reads("0.parquet", end % (tmp_path / "s/0.parquet").stat().st_size)
    with pytest.raises(StorageError, match=r"0\.parquet ended at byte"):
        worker(tmp_path / "c", layout=layout).run(unit_of(tar))
    short_reads("0.parquet", None)
    assert worker(tmp_path / "c", layout=layout).run(unit_of(tar)).rows == 3
