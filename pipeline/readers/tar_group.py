"""Read a group of small tars: each by one request, and checked to its end before its first sample counts.

A tar that cannot be read, or is not as it was planned, is left out: it has no positions in the group, and becomes a
unit of its own, where its damage is dealt with. So the positions of the others do not depend on it. A tar whose samples
are in parts that exist cannot be left out any more.
"""

import io
import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from pipeline.errors import ChangedError, LatentmillError, Rejected, ShardError, SourceError
from pipeline.formats.part_record import PartRecord
from pipeline.limits import Limits
from pipeline.prefetch import map_in_order
from pipeline.readers.files import read_planned_file
from pipeline.readers.image_files import unpack_files
from pipeline.readers.members import Wanted
from pipeline.readers.tar import read_tar
from pipeline.records import TAR_GROUP, PlannedFile, Reject, Sample, Unit, join_url, path_below_root
from pipeline.storage.reading import check_has_files, read_or_none

SMALL_TAR_BYTES = 8 << 20  # of a tar in a group: of a store, as many are read by one request in any case
READERS = 8  # threads per group, because stores are slow to answer
TARS_AHEAD = 16
BYTES_AHEAD = 32 << 20  # bytes of these tars; at least one tar is read


@dataclass(slots=True)
class LeftOutTars:
    """The tars that a group leaves out.

    settled: the samples before this position are in parts, so that their tars must be readable.
    positions: by path, the position that the tar's first sample would have. It has the tars that were reached so far.
    """

    settled: float = math.inf
    positions: dict[str, int] = field(default_factory=dict)

    @classmethod
    def after(cls, records: Sequence[PartRecord], rows_per_part: int) -> "LeftOutTars":
        """Return the state of a unit before it is read. records: of its parts that exist."""
        return cls(
            max((math.inf if record.last else (record.part + 1) * rows_per_part for record in records), default=0)
        )

    def has_any_from(self, position: int) -> bool:
        """Return whether a tar would begin at this position or behind it."""
        return any(start >= position for start in self.positions.values())

    def list_before(self, end: float) -> tuple[str, ...]:
        """Return the paths of the tars that would begin before a position, in order."""
        return tuple(path for path, position in self.positions.items() if position < end)


def read_tar_group(
    unit: Unit,
    options: Mapping[str, str],
    wanted: Wanted,
    limits: Limits,
    skipped: Counter[str],
    left_out: LeftOutTars,
) -> Iterator[Sample | Reject]:
    """Yield the samples of the tars, in the order of `unit.paths`. Positions count through all of them.

    wanted, limits, skipped: as of `read_tar`. left_out: receives the tars that are left out, which are those of
    `unit.left_out` and others that cannot be read.
    Raises ShardError or ChangedError if such a tar must be readable, and SourceError if the source is missing or empty.
    """
    tars = [files.image for files in unpack_files(unit)]

    def fetch(tar: PlannedFile) -> bytes | LatentmillError:
        return b"" if tar.path in unit.left_out else fetch_sound_tar(unit, tar, options, wanted, limits)

    position = 0
    with ThreadPoolExecutor(READERS, thread_name_prefix="read-tars") as pool:
        contents = map_in_order(
            pool, fetch, tars, TARS_AHEAD, weight=lambda tar: min(tar.bytes, SMALL_TAR_BYTES), budget=BYTES_AHEAD
        )
        for tar, content in zip(tars, contents, strict=True):
            if isinstance(content, LatentmillError):
                check_may_leave_out(unit, content, position < left_out.settled)
            if isinstance(content, LatentmillError) or tar.path in unit.left_out:
                left_out.positions[tar.path] = position
                continue
            for sample in read_tar(io.BytesIO(content), make_url(unit, tar), wanted, limits, skipped):
                yield replace(sample, position=position, shard=tar.path)
                position += 1


def leave_out(unit: Unit, records: Iterable[PartRecord]) -> Unit:
    """Return a unit that leaves out also the tars that these parts of it leave out."""
    return replace(unit, left_out=unit.left_out.union(*(record.left_out for record in records)))


def select_shards(unit: Unit, shards: Set[str]) -> Unit:
    """Return a unit that reads only these shards, if it is a group of tars. Its positions have no meaning then."""
    return replace(unit, left_out=frozenset(unit.paths) - shards) if unit.kind == TAR_GROUP else unit


def make_url(unit: Unit, tar: PlannedFile) -> str:
    """Return the location of a tar of a group."""
    return join_url(unit.root, path_below_root(tar.path))


def fetch_sound_tar(
    unit: Unit, tar: PlannedFile, options: Mapping[str, str], wanted: Wanted, limits: Limits
) -> bytes | LatentmillError:
    """Return the bytes of a tar, or the error because of which it is left out.

    Raises StorageError if it cannot be read for a reason that may pass, and SourceError if all files are missing.
    """
    url = make_url(unit, tar)
    if tar.bytes > SMALL_TAR_BYTES:
        return ChangedError(f"{url} has grown to {tar.bytes} bytes since it was planned with other small tars")
    try:
        data = read_or_none(url, options, lambda: read_planned_file(url, options, tar.bytes, tar))
        if data is not None:
            deque(read_tar(io.BytesIO(data), url, wanted, limits), maxlen=0)
            return data
    except SourceError as error:
        return ChangedError(str(error))
    except (ShardError, Rejected) as error:
        return ShardError(str(error))
    check_has_files(unit.root, options)
    return ShardError(f"{url} was deleted since it was planned")


def check_may_leave_out(unit: Unit, error: LatentmillError, is_settled: bool) -> None:
    """Raise an error if a tar whose samples are in parts already cannot be read."""
    if is_settled and isinstance(error, ChangedError):
        raise error
    if is_settled:
        raise ShardError(f"{error}; parts of {unit.name} were made from it when it could be read, so restore it")
