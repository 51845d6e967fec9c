"""One file of a cache's parts against its own record: where it stands, what it counts, every row in it."""

import hashlib
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.cache import parts, tally
from pipeline.cache.reader import Cache, to_tensor
from pipeline.errors import LatentmillError
from pipeline.formats import parquet, webdataset
from pipeline.formats.record import BucketTally, PartInfo, Record
from pipeline.records import Unit


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a file of a cache, and what to do."""

    file: str
    what: str
    do: str


@dataclass(slots=True)
class PartCheck:
    """A part's file, as it was found. keys: a 64-bit hash of each row's key. standing: None where it has no record."""

    file: str
    standing: PartInfo | None = None
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    problems: list[Problem] = field(default_factory=list)


def check_part(cache: Cache, file: str, units: Mapping[str, Unit]) -> PartCheck:
    """One file of data/ or _empty/: its record against its name, the plan, and its rows."""
    checked = PartCheck(file)
    try:
        data = cache.folder.read(file)
        record = parts.read_record(data, file)
    except LatentmillError as error:
        checked.problems.append(
            Problem(file, str(error), f"it is no part of this cache, or damaged: {describe_redo(file)}")
        )
        return checked
    if parts.expected_stem(record) != parts.stem_of(file):
        what = f"it holds the part {parts.expected_stem(record)}: it was copied or renamed"
        checked.problems.append(Problem(file, what, describe_redo(file)))
        return checked
    checked.standing = PartInfo(record, file, len(data), hashlib.sha256(data).hexdigest())
    checked.problems += [
        Problem(file, what, describe_redo(file)) for what in find_contradictions(record, file, cache, units)
    ]
    if file.startswith(parts.DATA + "/"):
        try:
            wrong, checked.keys = check_rows(record, data, file, cache)
        except Exception as error:  # libraries', of whatever damaged bytes lead them to
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            wrong = [f"its rows cannot be read: {said:.200}"]
        checked.problems += [Problem(file, what, describe_redo(file)) for what in wrong]
    return checked


def describe_redo(file: str) -> str:
    """What to do where a part is not what it was, or should not be there."""
    stem = PurePosixPath(parts.stem_of(file)).name
    if parts.is_retry_part(stem):
        return f"move it away with _commits/{stem}.json, if that is there, and run latentmill retry"
    unit = stem.rpartition("-")[0] or stem
    return f"move it away with _commits/{unit}.json, if that is there, and run the encode command again"


def find_contradictions(record: Record, file: str, cache: Cache, units: Mapping[str, Unit]) -> Iterator[str]:
    """What in a record cannot be so."""
    suffix = parts.PART_FORMATS[cache.layout.container].SUFFIX if record.rows else ".json"
    if not file.endswith(suffix):
        yield f"the files of this cache are {suffix}"
    if record.identity != cache.content["identity_sha256"]:
        yield "it belongs to a cache with another identity"
    unit = units.get(record.unit)
    if unit is None:
        yield f"its unit {record.unit} is not in the plan"
    elif (record.source, record.source_bytes, record.range) != (unit.path, unit.bytes, unit.range):
        yield "its record and the plan name different inputs"
    size = cache.content["identity"]["rows_per_part"]
    if record.samples != record.rows + record.filtered + len(record.rejects):
        yield f"of {record.samples} samples it accounts for {record.rows + record.filtered + len(record.rejects)}"
    if record.round:
        where = {reject.position for reject in record.rejects}
        if len(record.positions) != record.samples or not where <= set(record.positions):
            yield f"it supersedes {len(record.supersedes)} rejects by {record.samples} samples"
    elif record.first != record.part * size or record.samples > size or (record.samples < size and not record.last):
        yield f"a part of {size} samples cannot have {record.samples} from position {record.first} on"
    if sum(one.samples for one in record.tally.values()) != record.rows:
        yield "its statistics are of another number of rows"


def check_rows(record: Record, data: bytes, file: str, cache: Cache) -> tuple[list[str], np.ndarray]:
    """What is wrong with a part's rows, against its record; and a hash of each row's key."""
    layout, wrong = cache.layout, list[str]()
    if layout.container == "parquet":
        schema = pq.read_schema(io.BytesIO(data)).remove_metadata()
        if not schema.equals(parquet.schema_of(layout).remove_metadata()):
            wrong.append("its columns are not those of cache.json")
        rows = parquet.read_rows(io.BytesIO(data))
    else:
        rows = webdataset.read_rows(io.BytesIO(data), texts=layout.columns.texts)
    latents: dict[str, list[Any]] = {}
    keys = []
    for row in rows:
        keys.append(int.from_bytes(hashlib.blake2b(row["key"].encode(), digest_size=8).digest(), "little"))
        latent = to_tensor(row)
        latents.setdefault(tally.bucket_name(row["height"], row["width"]), []).append(latent)
        if row["shard"] != record.source:
            wrong.append(f"the row {row['key']} is of {row['shard']}, the part of {record.source}")
        if not bool(latent.isfinite().all()):
            wrong.append(f"the latent of {row['key']} is not finite")
        if row["dtype"] != cache.content["identity"]["dtype"]:
            wrong.append(f"the latent of {row['key']} is {row['dtype']}")
    if len(keys) != record.rows:
        wrong.append(f"it has {len(keys)} rows, its record says {record.rows}")
    make = tally.tally_moments if layout.store == "moments" else tally.tally_latents
    counted = {name: make(latents[name]) for name in sorted(latents)}
    if not wrong and not _equal(counted, record.tally):
        wrong.append("the statistics of its rows are not those of its record")
    return wrong[:3], np.array(keys, np.uint64)


def _equal(a: Mapping[str, BucketTally], b: Mapping[str, BucketTally]) -> bool:
    """Whether statistics agree, but for the order of additions on another machine."""
    if a.keys() != b.keys():
        return False
    for name in a:
        left, right = a[name].to_dict(), b[name].to_dict()
        if left.keys() != right.keys():
            return False
        for what in left:
            pairs = zip(np.atleast_1d(left[what]), np.atleast_1d(right[what]), strict=False)
            if np.size(left[what]) != np.size(right[what]):
                return False
            if not all(math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-9) for x, y in pairs):
                return False
    return True
