"""When a damage of a shard is believed: the file came whole, and a second look finds it at the same byte."""

import ast
import dataclasses
import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cache import parts
from pipeline.errors import REST_OF_SHARD, DamagedError, ShardError, SourceError, Stopped, StorageError
from pipeline.flow import UnitWorker
from pipeline.formats import record as record_format
from pipeline.formats.record import Record
from pipeline.formats.schema import OutputSchema, PassthroughColumns
from pipeline.readers import damage
from pipeline.readers.parquet import read_parquet
from pipeline.records import Attempt, Reject, Sample, Unit
from pipeline.storage.folder import Folder
from tests.conftest import img2dataset_members, write_tar
from tests.pipeline.conftest import unit_of

Cut = Callable[[str, int | None], None]
Make = Callable[..., UnitWorker]


def tar(folder: Path) -> Unit:
    return unit_of(write_tar(folder / "0.tar", img2dataset_members(0, 10, height=64, width=64)))


def parquet(folder: Path) -> Unit:
    jpegs = [data for name, data in img2dataset_members(0, 10, height=64, width=64).items() if name.endswith("jpg")]
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"jpg": jpegs}), folder / "0.parquet", row_group_size=3, write_page_checksum=True)
    return unit_of(folder / "0.parquet")


PLAIN = {"layout": OutputSchema(columns=PassthroughColumns(pa.schema([]), ()))}
KINDS = pytest.mark.parametrize("make", [tar, parquet])


def rests(cache: Path) -> dict[str, set[int]]:
    identity = "the identity"
    found = (
        parts.inspect_part(Folder(str(cache)), name, identity) for name in parts.list_part_files(Folder(str(cache)))
    )
    return record_format.find_unread_rests(part.record for part in found if part is not None)


@KINDS
def test_a_sick_reader_never_gives_up_the_rest_of_a_sound_shard(
    worker: Make, short_reads: Cut, tmp_path: Path, make: Callable[[Path], Unit]
) -> None:
    """Wherever it ends, and whatever it is told of a damage there."""
    unit, encoder = make(tmp_path / "s"), worker(tmp_path / "c", **PLAIN)
    name = unit.url.rpartition("/")[2]
    for end in {0, 1, 511, 512, 1000, 5000, unit.bytes // 2, unit.bytes - 5000, unit.bytes - 600, unit.bytes - 1}:
        short_reads(name, end)
        for at in (None, end, end // 512 * 512, 0, unit.bytes - 8):
            with pytest.raises(StorageError, match=rf"{name} ended at byte \d+, but has {unit.bytes}"):
                encoder.run(unit, Attempt(damaged_at=at))
    assert rests(tmp_path / "c") == {}
    short_reads(name, None)
    report = encoder.run(unit)
    assert (report.rows, report.rejects) == (10, {})


def damaged_tar(folder: Path) -> Unit:
    """The header of the eighth image is overwritten; the file is as long as it was."""
    path = Path(tar(folder).url)
    data = bytearray(path.read_bytes())
    place = data.index(b"000000007.jpg")
    data[place : place + 100] = bytes(range(100))
    path.write_bytes(data)
    return unit_of(path)


def cut_tar(folder: Path) -> Unit:
    path = Path(tar(folder).url)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"000000007.jpg") + 700])
    return unit_of(path)


def damaged_parquet(folder: Path) -> Unit:
    """A byte of the third row group is another one."""
    path = Path(parquet(folder).url)
    data = bytearray(path.read_bytes())
    data[group_starts(path)[2] + 500] ^= 1
    path.write_bytes(data)
    return unit_of(path)


def group_starts(path: Path) -> list[int]:
    """As pyarrow reads them off the footer."""
    metadata = pq.read_metadata(path)
    columns = [metadata.row_group(group).column(0) for group in range(metadata.num_row_groups)]
    return [column.dictionary_page_offset or column.data_page_offset for column in columns]


def cut_parquet(folder: Path) -> Unit:
    path = Path(parquet(folder).url)
    path.write_bytes(path.read_bytes()[:-100])
    return unit_of(path)


# what was damaged, the byte at which it is found, and the samples before that: of a tar's last one more might follow
DAMAGED: dict[str, tuple[Callable[[Path], Unit], Callable[[Path], int], int]] = {
    "a header of a tar": (damaged_tar, lambda path: path.read_bytes().index(bytes(range(100))), 6),
    "a tar that is cut off": (cut_tar, lambda path: path.stat().st_size, 6),
    "a page of a Parquet file": (damaged_parquet, lambda path: group_starts(path)[2], 6),
    "a Parquet file that is cut off": (cut_parquet, lambda path: path.stat().st_size - 8, 0),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_the_second_look_at_the_same_damage_takes_what_stands_before_it(
    worker: Make, tmp_path: Path, kind: str
) -> None:
    make, place, rows = DAMAGED[kind]
    unit = make(tmp_path / "s")
    at = place(Path(unit.url))
    with pytest.raises(DamagedError) as first:
        worker(tmp_path / "c", **PLAIN).run(unit)
    assert first.value.at == at
    for other in (at - 1, at + 512, 0 if at else 1):
        with pytest.raises(DamagedError) as again:
            worker(tmp_path / "c", **PLAIN).run(unit, Attempt(damaged_at=other))
        assert again.value.at == at
    assert not (tmp_path / "c/_commits").exists()
    report = worker(tmp_path / "c", **PLAIN).run(unit, Attempt(damaged_at=at))
    assert (report.rows, report.rejects, report.damage) == (rows, {REST_OF_SHARD: 1}, str(first.value))
    assert rests(tmp_path / "c") == {unit.name: {rows}}


@pytest.mark.parametrize("kind", ["a header of a tar", "a page of a Parquet file"])
def test_a_damaged_shard_whose_rest_does_not_come_is_not_believed(
    worker: Make, short_reads: Cut, tmp_path: Path, kind: str
) -> None:
    make, place, _ = DAMAGED[kind]
    unit = make(tmp_path / "s")
    at = place(Path(unit.url))
    short_reads(unit.url.rpartition("/")[2], unit.bytes - 1)
    with pytest.raises(StorageError, match="ended at byte"):
        worker(tmp_path / "c", **PLAIN).run(unit, Attempt(damaged_at=at))
    assert rests(tmp_path / "c") == {}


def test_parts_that_were_read_farther_than_the_damage_stay_and_what_follows_them_is_the_rest(
    worker: Make, tmp_path: Path
) -> None:
    """Another job read the shard while it was sound, or under other limits, and did not come to its end."""
    unit = tar(tmp_path / "s")
    worker(tmp_path / "c", **PLAIN).run(unit)
    for path in (*(tmp_path / "c").glob("*/*-00002.parquet"), *(tmp_path / "c/_commits").iterdir()):
        path.unlink()
    unit = damaged_tar(tmp_path / "s")
    at = Path(unit.url).read_bytes().index(bytes(range(100)))
    report = worker(tmp_path / "c", **PLAIN).run(unit, Attempt(damaged_at=at))
    assert (report.rows, report.adopted, report.rejects) == (8, 2, {REST_OF_SHARD: 1})
    assert rests(tmp_path / "c") == {unit.name: {8}}, "six samples stand before the damage, eight in parts"


def test_a_shard_with_fewer_samples_than_its_parts_is_another_one(worker: Make, tmp_path: Path) -> None:
    """Even if its size and its time do not tell."""
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
        worker(tmp_path / "c", **PLAIN).run(dataclasses.replace(unit, etag=""))  # its time says nothing: --same-source
    assert not (tmp_path / "c/_commits").exists() or not list((tmp_path / "c/_commits").iterdir())


def test_an_error_that_names_no_byte_is_not_believed_either() -> None:
    def broken() -> Iterator[Sample | Reject]:
        yield Sample(0, "a", b"", {})
        raise DamagedError("somewhere")

    for at in (None, 0):
        with pytest.raises(DamagedError, match="somewhere"):
            list(damage.ReadableSamples(broken(), at))


def test_every_error_of_damage_names_its_byte() -> None:
    found = 0
    for path in (Path(__file__).parents[3] / "pipeline").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "DamagedError":
                assert [keyword.arg for keyword in node.keywords] == ["at"], f"{path.name}:{node.lineno}"
                found += 1
    assert found > 10


@pytest.mark.parametrize("what", ["footer", "page"])
def test_two_readers_find_a_damage_of_a_parquet_file_at_one_byte(tmp_path: Path, what: str) -> None:
    """Whatever of its bytes it is: the place of the footer, or the start of the row group."""
    data = Path(parquet(tmp_path / "s").url).read_bytes()
    starts = group_starts(tmp_path / "s/0.parquet")
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    found = []

    def at(flipped: bytes) -> int | None:
        with pytest.raises(DamagedError) as error:
            list(read_parquet(io.BytesIO(flipped), "p", len(data), (0, 1), None, None, pa.schema([])))
        return error.value.at

    for place in range(footer, len(data) - 8, 7) if what == "footer" else range(starts[1] + 40, starts[2], 97):
        flipped = bytearray(data)
        flipped[place] ^= 0xFF
        with suppress(pytest.fail.Exception):  # not every byte of a footer is needed
            found.append(at(flipped))
            assert found[-1] == at(flipped)
    assert len(found) > 10
    if what == "footer":  # which may also lie about where a row group begins
        assert footer in found
        assert all(place is not None and 0 <= place <= footer for place in found)
    else:
        assert set(found) == {starts[1]}


def test_a_shard_that_changes_while_it_is_read_is_not_damaged(
    worker: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = damaged_tar(tmp_path / "s")
    at = Path(unit.url).read_bytes().index(bytes(range(100)))

    class Rewritten(damage.ReadableSamples):
        """Appends to the shard after its fifth sample."""

        def __iter__(self) -> Iterator[Sample | Reject]:
            for sample in super().__iter__():
                if sample.position == 5:
                    Path(unit.url).write_bytes(Path(unit.url).read_bytes() + bytes(512))
                yield sample

    monkeypatch.setattr("pipeline.flow.ReadableSamples", Rewritten)
    with pytest.raises(SourceError, match="changed while it was being read"):
        worker(tmp_path / "c", **PLAIN).run(unit, Attempt(damaged_at=at))


def test_a_long_rest_is_read_in_pieces_and_left_at_once_on_a_signal(worker: Make, tmp_path: Path) -> None:
    path = Path(damaged_tar(tmp_path / "s").url)
    at = path.read_bytes().index(bytes(range(100)))
    with path.open("ab") as file:
        file.truncate(20 << 20)
    unit, encoder = unit_of(path), worker(tmp_path / "c", **PLAIN)
    with pytest.raises(DamagedError):
        encoder.run(unit)
    pieces = encoder.context.progress["pieces"]
    assert pieces == 20, "each counts as progress"
    assert encoder.steps >= pieces

    class Late(threading.Event):
        """Set while the fifth piece is read."""

        def is_set(self) -> bool:
            return encoder.context.progress["pieces"] >= pieces + 5

    encoder.context = dataclasses.replace(encoder.context, stop=Late())
    with pytest.raises(Stopped):
        encoder.run(unit, Attempt(damaged_at=at))
    assert encoder.context.progress["pieces"] == pieces + 5


def test_of_the_rests_of_a_unit_those_count_that_no_part_has() -> None:
    def record(part: int, rest: int | None, *supersedes: int) -> Record:
        rejects = () if rest is None else (damage.reject_rest(rest),)
        made: dict[str, Any] = dict.fromkeys(Record.__dataclass_fields__)
        made |= {"unit": "u", "part": part, "rejects": rejects, "round": int(bool(supersedes))}
        return Record(**{**made, "supersedes": tuple((position, REST_OF_SHARD) for position in supersedes)})

    chain = [record(0, 3), record(0, 4, 3), record(1, 8, 4), record(2, None, 8)]
    assert record_format.find_unread_rests(chain) == {}
    assert record_format.find_unread_rests(chain[:1]) == {"u": {3}}
    assert record_format.find_unread_rests(chain[:3]) == {"u": {8}}
    assert record_format.find_unread_rests([chain[0], chain[1], chain[3]]) == {"u": {4}}, (
        "what a lost part had is not forgotten"
    )
