"""The table `fidelity.parquet` below the output: a folder with a file per part, which is written once the part is done.

So its files are also the record of a job: a part whose file exists is not decoded again.
"""

import heapq
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from latentmill.part_files import open_parquet_file
from pipeline.errors import CacheError
from pipeline.storage.folder import Folder

FOLDER = "fidelity.parquet"
NOTES = b"latentmill.notes"  # the key of the file metadata with why originals are missing, as JSON
WORST = 5
LISTED = 1000  # images that `Summary` has one by one
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("file", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("psnr", pa.float64()),
        ("ssim", pa.float64()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A decoded image: its sample, the file below the output that has it, and its size in pixels.

    psnr: in dB; None without a readable original. ssim: None also if a side is shorter than its window.
    """

    key: str
    shard: str
    file: str
    height: int
    width: int
    psnr: float | None
    ssim: float | None


@dataclass(slots=True)
class Spread:
    """The count, the sum, the least and the greatest of values."""

    count: int = 0
    total: float = 0.0
    least: float = float("inf")
    greatest: float = float("-inf")

    def add(self, value: float | None) -> None:
        """Count a value, unless it is None."""
        if value is not None:
            self.count, self.total = self.count + 1, self.total + value
            self.least, self.greatest = min(self.least, value), max(self.greatest, value)

    def to_dict(self) -> dict[str, float] | None:
        """Return the mean, the least and the greatest value; None without values."""
        if not self.count:
            return None
        return {"mean": self.total / self.count, "min": self.least, "max": self.greatest}


@dataclass(slots=True)
class Summary:
    """The images of all parts so far. listed: the first LISTED of them. worst: the WORST with the lowest PSNR."""

    rows: int = 0
    psnr: Spread = field(default_factory=Spread)
    ssim: Spread = field(default_factory=Spread)
    listed: list[Rendered] = field(default_factory=list)
    notes: set[str] = field(default_factory=set)
    worst: list[Rendered] = field(default_factory=list)

    def add(self, images: Sequence[Rendered], notes: Iterable[str]) -> None:
        """Add the images of a part."""
        self.notes.update(notes)
        self.listed += images[: LISTED - len(self.listed)]
        self.rows += len(images)
        for image in images:
            self.psnr.add(image.psnr)
            self.ssim.add(image.ssim)
        measured = (image for image in images if image.psnr is not None)
        self.worst = heapq.nsmallest(WORST, [*self.worst, *measured], key=rank)

    @property
    def without_original(self) -> int:
        """The number of images whose original could not be read."""
        return self.rows - self.psnr.count


def rank(image: Rendered) -> tuple[float, str, str]:
    """Return what sorts images from the lowest PSNR to the highest. One without PSNR is the last."""
    return math.inf if image.psnr is None else image.psnr, image.shard, image.key


def name_table(part: int) -> str:
    """Return the name of the file of a part, in FOLDER."""
    return f"{part:05d}.parquet"


def write_table(out: Folder, part: int, images: Sequence[Rendered], notes: Iterable[str]) -> None:
    """Write the file of a part whose images are all written. notes: why originals are missing."""
    metadata = {NOTES: json.dumps(sorted(set(notes)), ensure_ascii=False).encode()}
    table = pa.Table.from_pylist([asdict(image) for image in images], SCHEMA.with_metadata(metadata))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    out.replace(f"{FOLDER}/{name_table(part)}", sink.getvalue())


def list_done(out: Folder, parts: int) -> list[int]:
    """Return the numbers of the parts that are done, of this many."""
    names = set(out.iterate_names(FOLDER))
    return [part for part in range(parts) if name_table(part) in names]


def read_tables(out: Folder, parts: Iterable[int]) -> Iterator[tuple[int, list[Rendered], list[str]]]:
    """Yield these parts in order, each with its images and notes. Raises CacheError if a file is not such a table."""
    for name, data in out.read_each(FOLDER, [name_table(part) for part in parts]):
        try:
            table = open_parquet_file(pa.BufferReader(data), checksums=False).read(use_threads=False)
            notes = json.loads(table.schema.metadata[NOTES])
            images = [Rendered(**row) for row in table.to_pylist()]
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
            url = out.url_of(f"{FOLDER}/{name}")
            raise CacheError(f"{url} is not the table of a part; remove it, and run the same command again") from error
        yield int(name.partition(".")[0]), images, notes
