"""Check one part file: its record against its name, the plan and the cache, and every row against the record."""

import hashlib
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np
import pyarrow.parquet as pq
from torch import Tensor

from latentmill.error_text import describe_error
from latentmill.part_files import read_rows, to_tensor
from pipeline.cache import parts, tally
from pipeline.cache.part_info import PartInfo
from pipeline.cache.reader import Cache
from pipeline.errors import CacheError, LatentmillError
from pipeline.formats import parquet
from pipeline.formats.part_record import BucketTally, PartRecord
from pipeline.records import TAR_GROUP, Unit, get_shard_kind
from pipeline.text import hash_text


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem with a file of a cache. what: a description of the problem. do: a remedy."""

    file: str
    what: str
    do: str


@dataclass(slots=True)
class PartCheck:
    """The result for one part file.

    part: None if the file has no readable record, or the record of another file.
    keys: a 64-bit hash of each row's shard and key. key_digest: `digest_keys` of the rows' keys.
    """

    file: str
    part: PartInfo | None = None
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    key_digest: str = ""
    problems: list[Problem] = field(default_factory=list)


def check_part(cache: Cache, file: str, units: Mapping[str, Unit]) -> PartCheck:
    """Check one file of data/ or _empty/. units: the planned units, by name."""
    check = PartCheck(file)
    try:
        data = cache.folder.read(file)
        record = parts.read_record(data, file)
    except LatentmillError as error:
        do = f"it is damaged, or is not a part of this cache: {describe_redo(file)}"
        check.problems.append(Problem(file, str(error), do))
        return check
    if parts.get_expected_stem(record) != parts.strip_extension(file):
        message = f"it holds the part {parts.get_expected_stem(record)}: it was copied or renamed"
        check.problems.append(Problem(file, message, describe_redo(file)))
        return check
    try:
        groups = parts.read_groups(file, data, io.BytesIO(data), file)
    except CacheError as error:
        groups = []
        check.problems.append(Problem(file, str(error), describe_redo(file)))
    check.part = PartInfo(record, file, len(data), hashlib.sha256(data).hexdigest(), groups)
    unit = units.get(record.unit)
    if unit is not None and (unplanned := {*record.left_out} - unit.left_out):
        message = f"tars that it left out are not planned as units of their own: {len(unplanned)} ({min(unplanned)})"
        check.problems.append(Problem(file, message, "run the encode command again, which plans and encodes them"))
    check.problems += [
        Problem(file, finding, describe_redo(file)) for finding in find_contradictions(record, file, cache, units)
    ]
    if file.startswith(parts.DATA + "/"):
        try:
            findings, check.keys, check.key_digest = check_rows(record, data, file, cache, unit)
        except Exception as error:  # damaged bytes can make a library raise anything
            findings = [f"its rows cannot be read: {describe_error(error):.200}"]
        check.problems += [Problem(file, finding, describe_redo(file)) for finding in findings]
    return check


def describe_redo(file: str) -> str:
    """Return the remedy for a part that is damaged or should not exist."""
    stem = PurePosixPath(parts.strip_extension(file)).name
    if parts.is_retry_part(stem):
        return f"move it away with _commits/{stem}.json, if that exists, and run latentmill retry"
    unit = stem.rpartition("-")[0] or stem
    return f"move it away with _commits/{unit}.json, if that exists, and run the encode command again"


def describe_redo_of_repeated(check: PartCheck) -> str:
    """Return the remedy for a part that repeats rows. A range of a large tar does not know the keys of the others."""
    redo = describe_redo(check.file)
    if check.part is None or check.part.record.range is None or get_shard_kind(check.part.record.source) != "tar":
        return redo
    return f"{redo}; if the tar has a key twice, rename one of its samples, and encode the tar into another cache"


def find_contradictions(record: PartRecord, file: str, cache: Cache, units: Mapping[str, Unit]) -> Iterator[str]:
    """Find values of a record that contradict each other, the plan or the cache."""
    suffix = parts.PART_FORMATS[cache.layout.container].SUFFIX if record.rows else ".json"
    if not file.endswith(suffix):
        yield f"its extension should be {suffix}"
    if record.identity != cache.info.identity_sha256:
        yield "it belongs to a cache with another identity"
    unit = units.get(record.unit)
    if unit is None:
        yield f"its unit {record.unit} is not in the plan"
    elif (record.source, record.source_bytes, record.range) != (unit.path, unit.bytes, unit.range):
        yield "its record and the plan name different inputs"
    size = cache.info.identity.rows_per_part
    accounted = record.rows + sum(record.filtered.values()) + len(record.rejects)
    if record.samples != accounted:
        yield f"it accounts for {accounted} of its {record.samples} samples"
    if record.round:
        rejected = {reject.position for reject in record.rejects}
        if len(record.positions) != record.samples or not rejected <= set(record.positions):
            yield f"it supersedes {len(record.supersedes)} rejects with {record.samples} samples"
    elif record.first != record.part * size or record.samples > size or (record.samples < size and not record.last):
        yield f"its {record.samples} samples from position {record.first} on do not fit a part of {size} samples"
    if sum(bucket.samples for bucket in record.tally.values()) != record.rows:
        yield "its statistics count another number of rows"


def check_rows(
    record: PartRecord, data: bytes, file: str, cache: Cache, unit: Unit | None
) -> tuple[list[str], np.ndarray, str]:
    """Compare a part's rows with its record.

    Returns up to three findings, a hash of the shard and key of each row, and `digest_keys` of the keys.
    """
    layout, findings = cache.layout, list[str]()
    is_group = unit is not None and unit.kind == TAR_GROUP
    shards = {*unit.paths} - unit.left_out if unit is not None and is_group else {record.source}
    if layout.container == "parquet":
        schema = pq.read_schema(io.BytesIO(data)).remove_metadata()
        if not schema.equals(parquet.make_schema(layout).remove_metadata()):
            findings.append("its columns differ from those of cache.json")
    rows = read_rows(io.BytesIO(data), file, texts=layout.columns.texts, binary=layout.columns.binary)
    names = layout.latent_names
    latents: dict[str, list[Sequence[Tensor]]] = {}
    keys, identities = list[str](), list[int]()
    for row in rows:
        keys.append(row["key"])
        identities.append(hash_text(f"{row['shard']}\0{row['key']}"))
        row_latents = [to_tensor(row, name) for name in names]
        latents.setdefault(tally.format_bucket(row["height"], row["width"]), []).append(row_latents)
        if row["shard"] not in shards:
            findings.append(f"the row {row['key']} is from {row['shard']}, but the part is from {record.source}")
        for name, latent in zip(names, row_latents, strict=True):
            if not bool(latent.isfinite().all()):
                findings.append(f"the {name} of {row['key']} is not finite")
        if row["dtype"] != cache.info.identity.dtype:
            findings.append(f"the latent of {row['key']} has the dtype {row['dtype']}")
    if len(keys) != record.rows:
        findings.append(f"it has {len(keys)} rows, but its record counts {record.rows}")
    if not findings and not _are_close(tally.tally_buckets(latents, layout.store), record.tally):
        findings.append("the statistics of its rows differ from its record")
    return findings[:3], np.array(identities, np.uint64), digest_keys(keys)


def digest_keys(keys: Iterable[str]) -> str:
    """Return a digest of keys and their order."""
    digest = hashlib.blake2b(digest_size=16)
    for key in keys:
        digest.update(hash_text(key).to_bytes(8, "little"))
    return digest.hexdigest()


def _are_close(a: Mapping[str, BucketTally], b: Mapping[str, BucketTally]) -> bool:
    """Return whether statistics are equal, except for rounding: another machine can add in another order."""
    if a.keys() != b.keys():
        return False
    for name in a:
        left, right = a[name].to_dict(), b[name].to_dict()
        if left.keys() != right.keys():
            return False
        for field_name in left:
            pairs = zip(np.atleast_1d(left[field_name]), np.atleast_1d(right[field_name]), strict=False)
            if np.size(left[field_name]) != np.size(right[field_name]):
                return False
            if not all(math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-9) for x, y in pairs):
                return False
    return True
