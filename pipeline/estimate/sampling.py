"""Draw a few files of each kind at random, count their images, and read some samples of each."""

import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev

from pipeline.errors import LatentmillError, NoImagesError
from pipeline.estimate.ratio import Count, Counted, estimate_total
from pipeline.flow import EncodeSpec
from pipeline.readers.archive_samples import make_samples
from pipeline.readers.arrow import read_batches
from pipeline.readers.image_files import unpack_files
from pipeline.readers.members import Wanted
from pipeline.readers.parquet import open_parquet
from pipeline.readers.table_rows import choose_columns
from pipeline.readers.unit import read_samples
from pipeline.readers.zip import list_members
from pipeline.records import TAR_GROUP, Reject, Sample, Unit
from pipeline.sources.sidecars import pin_files
from pipeline.storage import reading

IMAGES = 64  # that are read of a file
BYTES = 64 << 20  # after which no further image of a file is read
FILES = 32  # of a kind that are read
LEAST = 2  # of a kind that are read even if there is no time: the error follows from their spread
FEW_FOOTERS = 64  # up to so many Parquet files or zips are all counted
MOST_BYTES = 512 << 20  # of all samples, which are in memory
FEW = 8  # images of a file that are read even if there is no time
TAR_END = 6 << 10  # bytes at the end of a tar: its end mark, and the zeros up to a multiple of 10 KiB that tar writes
_THREADS = 8  # that read footers, because stores are slow to answer
FROM_FOOTER = frozenset({"parquet", "zip"})


@dataclass(frozen=True, slots=True)
class Stratum:
    """The inputs of one kind. count: of their images, if the listing has it; otherwise None.

    inputs: units of which one may be read: the files of shards, and the groups of images of folders.
    units: the number of tasks that `encode` makes of them. bytes: of all inputs.
    """

    kind: str
    inputs: Sequence[Unit]
    units: int
    bytes: int
    count: int | None = None


@dataclass(slots=True)
class Drawn:
    """What was read of one input, in `seconds`. offset: bytes of the input that the samples take; 0 if unknown.

    rows: that these bytes hold, if there are more than samples. is_read: whether the input has no other samples.
    error: what ended the reading.
    """

    unit: Unit
    samples: list[Sample | Reject] = field(default_factory=list)
    seconds: float = 0.0
    offset: int = 0
    rows: int = 0
    is_read: bool = False
    error: str = ""

    @property
    def image_bytes(self) -> int:
        """The bytes of the images that were read."""
        return sum(len(sample.image) for sample in self.samples if isinstance(sample, Sample))

    def count(self) -> Counted:
        """Return the images of the input: of a part, as many as the bytes that it takes suggest."""
        if self.error:  # nobody knows what follows the error
            return Counted(len(self.samples), self.unit.bytes, 0.0)
        if self.is_read or not self.offset:
            return Counted(len(self.samples), self.unit.bytes)
        size = self.unit.bytes - (TAR_END if self.unit.kind == "tar" else 0)
        images = max(self.rows, len(self.samples)) * max(1.0, size / self.offset)
        sizes = [len(sample.image) for sample in self.samples if isinstance(sample, Sample)]
        spread = stdev(sizes) / max(1.0, fmean(sizes)) if len(sizes) > 1 else 1.0
        unread = 1 - len(self.samples) / images
        return Counted(images, self.unit.bytes, unread * (images * spread) ** 2 / len(self.samples))


def make_strata(units: Sequence[Unit], rows: Mapping[str, int]) -> list[Stratum]:
    """Return the inputs of a plan, by kind. rows: of each manifest, by its path."""
    groups: dict[str, list[Unit]] = {}
    for unit in units:
        groups.setdefault("tar" if unit.kind == TAR_GROUP else unit.kind, []).append(unit)
    return [_make_stratum(kind, group, rows) for kind, group in groups.items()]


def _make_stratum(kind: str, units: Sequence[Unit], rows: Mapping[str, int]) -> Stratum:
    if kind == "folder":
        count = sum(len(unit.paths) for unit in units)
        return Stratum(kind, units, len(units), sum(unit.bytes for unit in units), count)
    files = {unit.path: unit for unit in units if unit.kind != TAR_GROUP}
    files |= {tar.path: tar for unit in units if unit.kind == TAR_GROUP for tar in _split_group(unit)}
    inputs, size = list(files.values()), sum(unit.bytes for unit in files.values())
    if kind == "manifest":
        return Stratum(kind, units, len(units), size, sum(rows[path] for path in files))
    return Stratum(kind, inputs, len(units), size)


def _split_group(group: Unit) -> list[Unit]:
    """Return the tars of a group as units of their own."""
    tars = [files.image for files in unpack_files(group)]
    return [
        replace(group, name=tar.path, kind="tar", path=tar.path, paths=(), bytes=tar.bytes, etag=tar.etag, files="")
        for tar in tars
    ]


def draw(strata: Sequence[Stratum], spec: EncodeSpec, rng: random.Random, seconds: float) -> list[list[Drawn]]:
    """Read up to FILES random inputs of each kind, while there is time; two of each in any case."""
    orders = [rng.sample(stratum.inputs, min(FILES, len(stratum.inputs))) for stratum in strata]
    drawn: list[list[Drawn]] = [[] for _ in strata]
    start = time.monotonic()
    for number in range(FILES):
        for order, found in zip(orders, drawn, strict=True):
            left = start + seconds - time.monotonic()
            if number < len(order) and (number < LEAST or left > 0):
                found.append(read_input(order[number], spec, rng, left / LEAST / len(strata)))
        if sum(item.image_bytes for found in drawn for item in found) > MOST_BYTES and number + 1 >= LEAST:
            break
    return drawn


def read_input(unit: Unit, spec: EncodeSpec, rng: random.Random, seconds: float) -> Drawn:
    """Read samples of an input: the first ones, of folders random ones. Other bytes are hardly read.

    seconds: after which no more than FEW samples are read.
    """
    drawn = Drawn(unit)
    for part in _choose_parts(unit, rng):
        if not drawn.samples:
            _read_samples(drawn, part, spec, seconds)
    return drawn


def _choose_parts(unit: Unit, rng: random.Random) -> list[Unit]:
    """Return what to read of an input, in order, until it has samples: a random range before the whole file."""
    if unit.kind == "folder":
        images = unpack_files(unit)
        numbers = sorted(rng.sample(range(len(images)), min(IMAGES, len(images))))
        paths = tuple(unit.paths[number] for number in numbers)
        return [replace(unit, paths=paths, **pin_files([images[number] for number in numbers]))]
    if unit.kind in FROM_FOOTER and unit.range:
        count = unit.range[1]
        return [replace(unit, range=(rng.randrange(count), count)), replace(unit, range=(0, 1))][: 1 + (count > 1)]
    return [unit]


def _read_samples(drawn: Drawn, unit: Unit, spec: EncodeSpec, seconds: float) -> None:
    start, size, last = time.perf_counter(), 0, 0

    def note(offset: int) -> None:
        nonlocal last
        last = offset

    samples = read_samples(unit, spec, on_offset=note)
    try:
        for sample in samples:
            drawn.samples.append(sample)
            drawn.offset = last
            size += len(sample.image) if isinstance(sample, Sample) else 0
            is_late = time.perf_counter() > start + seconds
            if len(drawn.samples) >= (FEW if is_late else IMAGES) or size >= BYTES:
                break
        else:
            drawn.is_read = True
        if unit.kind == "arrow" and not drawn.is_read:
            drawn.offset, drawn.rows = _measure_batches(unit, spec)
    except LatentmillError as error:
        drawn.error, drawn.is_read = str(error), True
    finally:
        samples.close()
        drawn.seconds += time.perf_counter() - start


def _measure_batches(unit: Unit, spec: EncodeSpec) -> tuple[int, int]:
    """Return the bytes and the rows of the first record batches of an Arrow file."""
    rows = 0
    with reading.open_stream(unit.url, spec.source_options, unit) as stream:
        for batch in read_batches(stream, unit.url, spec.limits):
            rows += len(batch)
            if rows >= IMAGES:
                break
        return stream.tell(), rows


def count_all(
    stratum: Stratum, drawn: Sequence[Drawn], spec: EncodeSpec, rng: random.Random, errors: list[str]
) -> Count:
    """Return the number of images of all inputs of a kind. drawn: what was read of some of them.

    errors: receives a line for each file whose footer cannot be read. It counts as a file without images.
    """
    if stratum.count is not None:
        return Count(float(stratum.count))
    files = len(stratum.inputs)
    if stratum.kind not in FROM_FOOTER:
        return estimate_total([item.count() for item in drawn], files, stratum.bytes)
    chosen = stratum.inputs if files <= FEW_FOOTERS else rng.sample(stratum.inputs, FILES)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="count") as pool:
        counted = list(pool.map(lambda unit: _count_from_footer(unit, spec, errors), chosen))
    return estimate_total(counted, files, stratum.bytes)


def _count_from_footer(unit: Unit, spec: EncodeSpec, errors: list[str]) -> Counted:
    """Return the images of a Parquet file or a zip; 0 if it has none, or cannot be read."""
    try:
        with reading.open_stream(unit.url, spec.source_options, unit, seeking=True) as stream:
            if unit.kind == "zip":
                columns = spec.layout.columns
                wanted = Wanted(columns.texts, spec.image_column, columns.binary, spec.source_rules.text_encoding)
                members = list_members(stream, unit.url, wanted, spec.limits)
                by_key = sorted(members, key=lambda member: member.key)  # `read_zip` brings those of a key together
                samples = make_samples(iter(by_key), wanted, spec.limits, Counter())
                return Counted(sum(1 for _ in samples), unit.bytes)
            with open_parquet(stream, unit.url, spec.limits) as file:
                wanted_columns = spec.layout.columns.schema
                choose_columns(file.schema_arrow, spec.image_column, spec.key_column, wanted_columns, unit.url)
                return Counted(file.metadata.num_rows, unit.bytes)
    except NoImagesError:
        return Counted(0, unit.bytes)
    except LatentmillError as error:
        errors.append(str(error))
        return Counted(0, unit.bytes, 0.0)
