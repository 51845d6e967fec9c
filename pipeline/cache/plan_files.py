"""The files of the plan: their rows are read and written column by column, as there may be millions.

The rows of a later file supersede those of earlier files for the same input, and a source is where its last row says.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentmill.error_text import describe_error
from latentmill.part_files import open_parquet_file
from pipeline.cache.numbered_files import get_next_number, list_numbered_files, name_numbered_file
from pipeline.canonical_json import VERIFY_HINT
from pipeline.errors import CacheError
from pipeline.records import Unit
from pipeline.sources.garbage import without_garbage_search
from pipeline.sources.planned_files import find_source_roots, mark_left_out, move_to_root
from pipeline.storage.folder import Folder

FOLDER = "_plan"
ROWS_PER_BATCH = 1 << 15
SCHEMA = pa.schema(
    [
        ("unit", pa.string()),
        ("kind", pa.string()),
        ("path", pa.string()),
        ("range", pa.list_(pa.int32())),
        ("paths", pa.list_(pa.string())),
        ("bytes", pa.int64()),
        ("etag", pa.string()),
        ("files", pa.string()),
        ("root", pa.string()),
        ("metadata", pa.string()),
    ]
)
_MEASURED = ("unit", "kind", "path", "range", "paths", "bytes")  # columns from which sizes follow
_SIZES = pa.schema([("unit", pa.string()), ("input", pa.string()), ("bytes", pa.int64()), ("images", pa.int32())])
_REPEATED = ("kind", "root", "metadata")  # columns whose values are the same in most rows


@dataclass(frozen=True, slots=True)
class PlannedSizes:
    """How much there is to do: for each planned unit its name, and the bytes of its input that it reads.

    images, image_bytes: of the units of folders. Only these name their images before they are read.
    """

    names: pa.StringArray
    bytes: pa.Int64Array
    images: int
    image_bytes: int


def hash_plan_files(cache: Folder) -> dict[str, str]:
    """Return the sha256 of each file of the plan. Every run records them, so that `verify` can find a changed file."""
    return {name: hashlib.sha256(cache.read(f"{FOLDER}/{name}")).hexdigest() for name in list_plan_files(cache)}


def list_plan_files(cache: Folder) -> list[str]:
    """Return the names of the plan's files, in order."""
    return list_numbered_files(cache, FOLDER)


def read_plan(cache: Folder) -> list[Unit]:
    """Return all planned units, in the order in which they were first planned."""
    return read_plan_files(cache, list_plan_files(cache))


@without_garbage_search()
def read_plan_files(cache: Folder, names: Sequence[str]) -> list[Unit]:
    """Return the units in these files of the plan, as they were last planned, at the last location of their source."""
    files = [_read_units(cache, name) for name in names]
    roots: dict[str, str] = {}
    for units in files:
        roots |= find_source_roots(units)
    return [move_to_root(unit, roots[unit.source_name]) for unit in select_latest_units(files)]


def select_latest_units(files: Sequence[Sequence[Unit]]) -> list[Unit]:
    """Return the units of the plan's files. For each input, the units of the last file that has the input count.

    They stand where the input was first planned.
    """
    return mark_left_out(list(_select_latest_units(files)))


def _select_latest_units(files: Sequence[Sequence[Unit]]) -> Iterator[Unit]:
    later = _find_replanned(files) if len(files) > 1 else {}
    replanned: dict[str, list[Unit]] = {}
    for number, units in enumerate(files if later else ()):
        for unit in units:
            if later.get(identify_input(unit)) == number:
                replanned.setdefault(identify_input(unit), []).append(unit)
    for units in files:
        for unit in units:
            if not later or identify_input(unit) not in later:
                yield unit
            else:  # at the first place of its input, all of its units; none at the other places
                yield from replanned.pop(identify_input(unit), ())


def _find_replanned(files: Sequence[Sequence[Unit]]) -> dict[str, int]:
    """Return the inputs that are in several files, each with the number of the last one."""
    first: dict[str, int] = {}
    later: dict[str, int] = {}
    for number, units in enumerate(files):
        for unit in units:
            if first.setdefault(identify_input(unit), number) != number:
                later[identify_input(unit)] = number
    return later


def identify_input(unit: Unit) -> str:
    """Return the identity of a unit's input in the plan: the path of a file, or the name of a unit of files."""
    return unit.name if unit.paths else unit.path


def read_unit_sizes(cache: Folder) -> PlannedSizes:
    """Return the names and sizes of all planned units, in no particular order. The units would take ten times more."""
    files = [
        pa.Table.from_batches([_measure(batch) for batch in _read_batches(cache, name, _MEASURED)], _SIZES)
        for name in list_plan_files(cache)
    ]
    table = pa.concat_tables(files) if files else _SIZES.empty_table()
    if len(files) > 1:
        numbers = np.repeat(np.arange(len(files)), [len(file) for file in files])
        table = table.filter(pa.array(_select_latest(table["input"], numbers)))
    folders = table.filter(pc.greater(table["images"], 0))
    return PlannedSizes(
        names=table["unit"].combine_chunks(),
        bytes=table["bytes"].combine_chunks(),
        images=pc.sum(folders["images"]).as_py() or 0,
        image_bytes=pc.sum(folders["bytes"]).as_py() or 0,
    )


def _measure(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return the names and sizes of the units in some rows, with the schema `_SIZES`."""
    kinds, ranges, files = batch["kind"], batch["range"], pc.fill_null(pc.list_value_length(batch["paths"]), 0)
    counts = np.ones(len(batch), np.int64)
    counts[pc.fill_null(pc.list_value_length(ranges), 0).to_numpy() == 2] = pc.list_flatten(ranges).to_numpy()[1::2]
    sizes = {
        "unit": batch["unit"],
        "input": pc.if_else(pc.greater(files, 0), batch["unit"], batch["path"]),
        "bytes": pa.array(batch["bytes"].to_numpy() // counts),
        "images": pc.if_else(pc.equal(kinds, "folder"), files, 0),
    }
    return pa.RecordBatch.from_pydict(sizes, schema=_SIZES)


def _select_latest(inputs: pa.ChunkedArray, numbers: np.ndarray) -> np.ndarray:
    """Return which rows are in the last file that has their input. numbers: of the rows' files, in ascending order."""
    chunks = inputs.dictionary_encode().unify_dictionaries().chunks
    indexes = np.concatenate([chunk.indices.to_numpy() for chunk in chunks])
    latest = np.zeros(len(numbers), np.int64)
    latest[indexes] = numbers  # of several assignments to an element, the last one remains
    is_latest: np.ndarray = latest[indexes] == numbers
    return is_latest


def _read_units(cache: Folder, name: str) -> list[Unit]:
    """Return the units of one file of the plan."""
    return [unit for batch in _read_batches(cache, name, SCHEMA.names) for unit in _parse_units(batch)]


def _read_batches(cache: Folder, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield these columns of a file of the plan, some rows at a time. Raises CacheError if it cannot be read."""
    data = cache.read(f"{FOLDER}/{name}")
    schema = pa.schema([SCHEMA.field(column) for column in columns])
    try:
        with open_parquet_file(pa.BufferReader(data), checksums=False) as file:
            for batch in file.iter_batches(ROWS_PER_BATCH, columns=list(columns), use_threads=False):
                yield batch.select(columns).cast(schema)
    except Exception as error:  # damaged bytes can make Arrow raise anything
        url = cache.url_of(f"{FOLDER}/{name}")
        raise CacheError(f"{url} cannot be read as a plan: {describe_error(error):.200}; {VERIFY_HINT}") from error


def _parse_units(batch: pa.RecordBatch) -> Iterator[Unit]:
    """Yield the units in some rows. Equal values of most rows are one object in all units of the batch."""
    columns = {name: batch[name].to_pylist() for name in SCHEMA.names}
    for name in _REPEATED:
        shared: dict[Any, Any] = {}
        columns[name] = [shared.setdefault(value, value) for value in columns[name]]
    for name, kind, path, file_range, paths, size, etag, files, root, metadata in zip(*columns.values(), strict=True):
        yield Unit(
            name=name,
            kind=kind,
            path=path,
            range=tuple(file_range) if file_range else None,
            paths=tuple(paths or ()),
            bytes=size,
            etag=etag,
            files=files or "",
            root=root,
            metadata=metadata or "",
        )


def append_plan_file(cache: Folder, names: list[str], units: Sequence[Unit]) -> bool:
    """Create the next file of the plan. Returns False if another run was first. names: of the existing files.

    Raises CacheError if something else has the name of the file.
    """
    number = get_next_number(names)
    if write_plan_file(cache, number, units):
        return True
    if list_plan_files(cache) == names:
        path = f"{cache.url_of(FOLDER)}/{name_numbered_file(number)}"
        raise CacheError(f"{path} exists but is not a regular file; move it away")
    return False


def write_plan_file(cache: Folder, number: int, units: Sequence[Unit]) -> bool:
    """Create the plan's file with this number. Returns False if another run was first."""
    columns = {
        "unit": (unit.name for unit in units),
        "kind": (unit.kind for unit in units),
        "path": (unit.path for unit in units),
        "range": (unit.range for unit in units),
        "paths": (unit.paths for unit in units),
        "bytes": (unit.bytes for unit in units),
        "etag": (unit.etag for unit in units),
        "files": (unit.files or None for unit in units),
        "root": (unit.root for unit in units),
        "metadata": (unit.metadata or None for unit in units),
    }
    table = pa.table([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return cache.create(f"{FOLDER}/{name_numbered_file(number)}", sink.getvalue())
