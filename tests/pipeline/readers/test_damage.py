"""Damage of a shard is accepted only if the file was read completely, and a second attempt finds the same byte."""

import ast
import dataclasses
import gzip
import io
import os
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cache import parts
from pipeline.cache.part_info import find_unread_rests
from pipeline.errors import REST_OF_SHARD, DamagedError, ShardError, SourceError, Stopped, StorageError
from pipeline.flow import UnitWorker
from pipeline.formats.part_record import PartRecord
from pipeline.formats.schema import OutputSchema, PassthroughColumns
from pipeline.readers import damage
from pipeline.readers.parquet import read_parquet
from pipeline.records import Attempt, Reject, Sample, Unit
from pipeline.storage.folder import Folder
from tests.conftest import img2dataset_members, write_tar
from tests.pipeline.conftest import unit_of

ShortReads = Callable[[str, int | None], None]
MakeWorker = Callable[..., UnitWorker]


def tar(folder: Path) -> Unit:
    return unit_of(write_tar(folder / "0.tar", img2dataset_members(0, 10, height=64, width=64)))


def compressed_tar(folder: Path) -> Unit:
    path = write_tar(folder / "0.tar.gz", img2dataset_members(0, 10, height=64, width=64))
    path.write_bytes(gzip.compress(path.read_bytes()))
    return unit_of(path)


def zip_file(folder: Path) -> Unit:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "0.zip", "w") as archive:
        for name, data in img2dataset_members(0, 10, height=64, width=64).items():
            archive.writestr(name, data)
    return unit_of(folder / "0.zip")


def parquet(folder: Path) -> Unit:
    jpegs = [data for name, data in img2dataset_members(0, 10, height=64, width=64).items() if name.endswith("jpg")]
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"jpg": jpegs}), folder / "0.parquet", row_group_size=3, write_page_checksum=True)
    return unit_of(folder / "0.parquet")


def arrow(folder: Path) -> Unit:
    jpegs = [data for name, data in img2dataset_members(0, 10, height=64, width=64).items() if name.endswith("jpg")]
    folder.mkdir(exist_ok=True)
    table = pa.table({"jpg": jpegs})
    with pa.ipc.new_stream(str(folder / "0.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return unit_of(folder / "0.arrow")


PLAIN = {"layout": OutputSchema(columns=PassthroughColumns(pa.schema([]), ()))}
KINDS = pytest.mark.parametrize("make", [tar, compressed_tar, zip_file, parquet, arrow])


def find_rests(cache: Path) -> dict[str, set[int]]:
    identity = "the identity"
    found = (
        parts.inspect_part(Folder(str(cache)), name, identity) for name in parts.list_part_files(Folder(str(cache)))
    )
    return find_unread_rests(part.record for part in found if part is not None)


@KINDS
def test_a_faulty_reader_never_rejects_the_rest_of_an_intact_shard(
    worker: MakeWorker, short_reads: ShortReads, tmp_path: Path, make: Callable[[Path], Unit]
) -> None:
    """This holds for every byte at which its reads end, and for every position of damage from earlier attempts."""
    unit, encoder = make(tmp_path / "s"), worker(tmp_path / "c", **PLAIN)
    name = unit.url.rpartition("/")[2]
    for end in {0, 1, 511, 512, 1000, 5000, unit.bytes // 2, unit.bytes - 5000, unit.bytes - 600, unit.bytes - 1}:
        short_reads(name, end)
        for at in (None, end, end // 512 * 512, 0, unit.bytes - 8):
            with pytest.raises(StorageError, match=rf"{name} ended at byte \d+, but has {unit.bytes}"):
                encoder.run(unit, Attempt(damaged_at=at))
    assert find_rests(tmp_path / "c") == {}
    short_reads(name, None)
    report = encoder.run(unit)
    assert (report.rows, report.rejects) == (10, {})


def damaged_tar(folder: Path) -> Unit:
    """Overwrite the header of the eighth image. The size of the file is unchanged."""
    path = Path(tar(folder).url)
    data = bytearray(path.read_bytes())
    place = data.index(b"000000007.jpg")
    data[place : place + 100] = bytes(range(100))
    path.write_bytes(data)
    return unit_of(path)


def truncated_tar(folder: Path) -> Unit:
    path = Path(tar(folder).url)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"000000007.jpg") + 700])
    return unit_of(path)


def damaged_parquet(folder: Path) -> Unit:
    """Change one byte of the third row group."""
    path = Path(parquet(folder).url)
    data = bytearray(path.read_bytes())
    data[group_starts(path)[2] + 500] ^= 1
    path.write_bytes(data)
    return unit_of(path)


def group_starts(path: Path) -> list[int]:
    """Return the first byte of each row group, as pyarrow reads it from the footer."""
    metadata = pq.read_metadata(path)
    columns = [metadata.row_group(group).column(0) for group in range(metadata.num_row_groups)]
    return [column.dictionary_page_offset or column.data_page_offset for column in columns]


def truncated_parquet(folder: Path) -> Unit:
    path = Path(parquet(folder).url)
    path.write_bytes(path.read_bytes()[:-100])
    return unit_of(path)


# How to make the damage, the byte at which it is found, and the number of complete samples before it. In a tar, the
# last sample before damage is not complete, as more of its files might follow.
DAMAGED: dict[str, tuple[Callable[[Path], Unit], Callable[[Path], int], int]] = {
    "a header of a tar": (damaged_tar, lambda path: path.read_bytes().index(bytes(range(100))), 6),
    "a tar that is cut off": (truncated_tar, lambda path: path.stat().st_size, 6),
    "a page of a Parquet file": (damaged_parquet, lambda path: group_starts(path)[2], 6),
    "a Parquet file that is cut off": (truncated_parquet, lambda path: path.stat().st_size - 8, 0),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_second_attempt_at_the_same_damage_keeps_the_samples_before_it(
    worker: MakeWorker, tmp_path: Path, kind: str
) -> None:
    make, place, rows = DAMAGED[kind]
    unit = make(tmp_path / "s")
    at = place(Path(unit.url))
    with pytest.raises(DamagedError) as first:
        worker(tmp_path / "c", **PLAIN).run(unit)
    assert first.value.at == at
    for other in (at - 1, at + 512, 0 if at else 1):
        with pytest.raises(DamagedError) as second:
            worker(tmp_path / "c", **PLAIN).run(unit, Attempt(damaged_at=other))
        assert second.value.at == at
    assert not (tmp_path / "c/_commits").exists()
    report = worker(tmp_path / "c", **PLAIN).run(unit, Attempt(damaged_at=at))
    assert (report.rows, report.rejects, report.damage) == (rows, {REST_OF_SHARD: 1}, str(first.value))
    assert find_rests(tmp_path / "c") == {unit.name: {rows}}


@pytest.mark.parametrize("kind", ["a header of a tar", "a page of a Parquet file"])
def test_damage_in_a_shard_that_is_read_incompletely_is_not_accepted(
    worker: MakeWorker, short_reads: ShortReads, tmp_path: Path, kind: str
) -> None:
    make, place, _ = DAMAGED[kind]
    unit = make(tmp_path / "s")
    at = place(Path(unit.url))
    short_reads(unit.url.rpartition("/")[2], unit.bytes - 1)
    with pytest.raises(StorageError, match="ended at byte"):
        worker(tmp_path / "c", **PLAIN).run(unit, Attempt(damaged_at=at))
    assert find_rests(tmp_path / "c") == {}


def test_parts_beyond_the_damage_stay_and_the_samples_after_them_are_rejected(
    worker: MakeWorker, tmp_path: Path
) -> None:
    """Another job read the shard while it was intact, or with other limits, and did not finish it."""
    unit = tar(tmp_path / "s")
    worker(tmp_path / "c", **PLAIN).run(unit)
    for path in (*(tmp_path / "c").glob("*/*-00002.parquet"), *(tmp_path / "c/_commits").iterdir()):
        path.unlink()
    unit = damaged_tar(tmp_path / "s")
    at = Path(unit.url).read_bytes().index(bytes(range(100)))
    report = worker(tmp_path / "c", **PLAIN).run(unit, Attempt(damaged_at=at))
    assert (report.rows, report.adopted, report.rejects) == (8, 2, {REST_OF_SHARD: 1})
    assert find_rests(tmp_path / "c") == {unit.name: {8}}, "six samples are before the damage, eight are in parts"


def test_a_shard_with_fewer_samples_than_its_parts_is_an_error(worker: MakeWorker, tmp_path: Path) -> None:
    """This holds even if its size and its time are unchanged."""
    unit = tar(tmp_path / "s")
    planned_at = os.stat(unit.url).st_mtime_ns
    worker(tmp_path / "c", **PLAIN).run(unit)
    for path in (*(tmp_path / "c").glob("*/*-00002.parquet"), *(tmp_path / "c/_commits").iterdir()):
        path.unlink()
    write_tar(tmp_path / "s/0.tar", img2dataset_members(0, 3, height=64, width=64))
    with (tmp_path / "s/0.tar").open("ab") as file:
        file.truncate(unit.bytes)
    os.utime(unit.url, ns=(planned_at, planned_at))
    with pytest.raises(ShardError, match=r"0\.tar has fewer samples than the parts that were made of it"):
        worker(tmp_path / "c", **PLAIN).run(dataclasses.replace(unit, etag=""))  # no time, as with --same-source
    assert not (tmp_path / "c/_commits").exists() or not list((tmp_path / "c/_commits").iterdir())


def test_damage_without_a_position_is_not_accepted() -> None:
    def broken() -> Iterator[Sample | Reject]:
        yield Sample(0, "a", b"", {})
        raise DamagedError("somewhere")

    for at in (None, 0):
        with pytest.raises(DamagedError, match="somewhere"):
            list(damage.ReadableSamples(broken(), at))


def test_every_damage_error_in_the_code_has_a_position() -> None:
    found = 0
    for path in (Path(__file__).parents[3] / "pipeline").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "DamagedError":
                assert [keyword.arg for keyword in node.keywords] == ["at"], f"{path.name}:{node.lineno}"
                found += 1
    assert found > 10


@pytest.mark.parametrize("region", ["footer", "page"])
def test_two_readers_find_damage_of_a_parquet_file_at_the_same_byte(tmp_path: Path, region: str) -> None:
    """That byte is the start of the footer or of the row group, whichever of their bytes is damaged."""
    data = Path(parquet(tmp_path / "s").url).read_bytes()
    starts = group_starts(tmp_path / "s/0.parquet")
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    found = []

    def find_damage(flipped: bytes) -> int | None:
        with pytest.raises(DamagedError) as error:
            list(read_parquet(io.BytesIO(flipped), "p", len(data), (0, 1), None, None, pa.schema([])))
        return error.value.at

    for place in range(footer, len(data) - 8, 7) if region == "footer" else range(starts[1] + 40, starts[2], 97):
        flipped = bytearray(data)
        flipped[place] ^= 0xFF
        try:
            found.append(find_damage(flipped))
        except pytest.fail.Exception:  # some bytes of a footer are not needed
            continue
        assert found[-1] == find_damage(flipped)
    assert len(found) > 10
    if region == "footer":  # a damaged footer may also give a wrong start of a row group
        assert footer in found
        assert all(place is not None and 0 <= place <= footer for place in found)
    else:
        assert set(found) == {starts[1]}


def test_a_shard_that_changes_while_it_is_read_is_not_damaged(
    worker: MakeWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = damaged_tar(tmp_path / "s")
    at = Path(unit.url).read_bytes().index(bytes(range(100)))

    class Rewritten(damage.ReadableSamples):
        """Append to the shard at the sample with position 5."""

        def __iter__(self) -> Iterator[Sample | Reject]:
            for sample in super().__iter__():
                if sample.position == 5:
                    Path(unit.url).write_bytes(Path(unit.url).read_bytes() + bytes(512))
                yield sample

    monkeypatch.setattr("pipeline.flow.ReadableSamples", Rewritten)
    with pytest.raises(SourceError, match="changed while it was being read"):
        worker(tmp_path / "c", **PLAIN).run(unit, Attempt(damaged_at=at))


def test_a_long_rest_is_read_in_pieces_and_a_stop_takes_effect_at_once(worker: MakeWorker, tmp_path: Path) -> None:
    path = Path(damaged_tar(tmp_path / "s").url)
    at = path.read_bytes().index(bytes(range(100)))
    with path.open("ab") as file:
        file.truncate(20 << 20)
    unit, encoder = unit_of(path), worker(tmp_path / "c", **PLAIN)
    with pytest.raises(DamagedError):
        encoder.run(unit)
    pieces = encoder.context.progress["pieces"]
    assert pieces == 20, "each piece counts as progress"
    assert encoder.steps >= pieces

    class LateStop(threading.Event):
        """Set while the fifth piece is read."""

        def is_set(self) -> bool:
            return encoder.context.progress["pieces"] >= pieces + 5

    stages = dataclasses.replace(encoder.context.stages, stop=LateStop())
    encoder.context = dataclasses.replace(encoder.context, stages=stages)
    with pytest.raises(Stopped):
        encoder.run(unit, Attempt(damaged_at=at))
    assert encoder.context.progress["pieces"] == pieces + 5


def test_a_rest_counts_until_a_part_supersedes_it() -> None:
    def record(part: int, rest: int | None, *supersedes: int) -> PartRecord:
        rejects = () if rest is None else (damage.reject_rest(rest),)
        made: dict[str, Any] = dict.fromkeys(PartRecord.__dataclass_fields__)
        made |= {"unit": "u", "part": part, "rejects": rejects, "round": int(bool(supersedes))}
        return PartRecord(**{**made, "supersedes": tuple((position, REST_OF_SHARD) for position in supersedes)})

    chain = [record(0, 3), record(0, 4, 3), record(1, 8, 4), record(2, None, 8)]
    assert find_unread_rests(chain) == {}
    assert find_unread_rests(chain[:1]) == {"u": {3}}
    assert find_unread_rests(chain[:3]) == {"u": {8}}
    assert find_unread_rests([chain[0], chain[1], chain[3]]) == {"u": {4}}, "the rest of a lost part counts again"
