"""The things that flow through the pipeline, as plain data. The words are those of docs/cache-format.md."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import Rejected

if TYPE_CHECKING:  # two seconds, which `latentmill --help` need not take
    from torch import Tensor

Interpolation = Literal["bicubic", "bilinear", "lanczos"]
Crop = Literal["center", "random"]
Flip = Literal["none", "random"]
Container = Literal["parquet", "webdataset"]
Store = Literal["mode", "sample", "moments"]
IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp"})
TEXT_EXTENSIONS = ("txt", "json")  # passed through from beside an image, as the exact text


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """An input file as it was listed.

    url: where it is, without credentials. root: URL of the source's last directory without a wildcard.
    path: its path below the root, after the name of the source: the same on every disk, mount and bucket.
    etag: the version of its content (`storage.etag_of`); empty if it is unknown.
    file: equal for two paths that lead to one file of a local disk (`walk.file_id`); empty elsewhere.
    """

    url: str
    root: str
    path: str
    bytes: int
    etag: str
    file: str = ""


@dataclass(frozen=True, slots=True)
class File:
    """An image of a folder, or a text beside one, as it was listed. path: from the root's own name on."""

    path: str
    bytes: int
    etag: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What one task does: a whole tar, a range of a Parquet file, or up to 256 images of a folder.

    name: unique, safe in a file name, and the same wherever the input lies. kind: tar, parquet or folder; of a folder
    `paths` lists the images, `url` is the root. range: (k, n) of a Parquet file. bytes: of the whole input.
    root: of the source. files: of a folder, what its images and texts were (`readers.sidecars` packs them); `etag` is
    their sha256.
    """

    name: str
    kind: str
    url: str
    path: str
    range: tuple[int, int] | None = None
    paths: tuple[str, ...] = ()
    bytes: int = 0
    etag: str = ""
    files: str = ""
    root: str = ""

    @property
    def source(self) -> str:
        """The name of its source."""
        return self.path.split("/", 1)[0]

    @property
    def share(self) -> int:
        """How many of the input's bytes are this unit's, about."""
        return self.bytes // (self.range[1] if self.range else 1)


@dataclass(frozen=True, slots=True)
class Sample:
    """A key with the bytes of an image and its columns, at a position of the unit's reading order."""

    position: int
    key: str
    image: bytes
    columns: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Reject:
    """A sample that is not in the cache, and why."""

    position: int
    key: str
    stage: str
    reason: str
    detail: str

    @classmethod
    def of(cls, position: int, key: str, why: Rejected) -> "Reject":
        return cls(position, key, why.stage, why.reason, why.detail)


@dataclass(frozen=True, slots=True)
class Attempt:
    """What is known of a task that is tried again.

    isolated: a worker died under it, perhaps because of one of its images.
    damaged_at: the byte at which another worker found its shard damaged: if this one finds the same, it is believed.
    """

    isolated: bool = False
    damaged_at: int | None = None


FIRST_ATTEMPT = Attempt()


@dataclass(frozen=True, slots=True)
class Filtered:
    """A sample that the settings leave out (`--min-size`)."""

    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedImage:
    """A sample opened and brought to size: pixels is RGB uint8 [3, H, W], with what was done to get there."""

    position: int
    key: str
    columns: Mapping[str, Any]
    pixels: "Tensor"
    original_height: int
    original_width: int
    crop_top: int
    crop_left: int
    enlarged: bool
    flipped: bool = False

    @property
    def bucket(self) -> tuple[int, int]:
        """Height and width of the encoded image."""
        return self.pixels.shape[1], self.pixels.shape[2]

    @property
    def geometry(self) -> dict[str, int | bool]:
        """What a row says of how the image came to its size."""
        names = ("original_height", "original_width", "crop_top", "crop_left", "flipped")
        height, width = self.bucket
        return {"height": height, "width": width, **{name: getattr(self, name) for name in names}}

    def drop_pixels(self) -> "PreparedImage":
        """The same, of its pixels their shape alone (as torch's `meta` tensors have it)."""
        return replace(self, pixels=self.pixels.to("meta"))


@dataclass(frozen=True, slots=True)
class Row:
    """An image and its latent: raw, as stored, [C, H/f, W/f] of the cache's dtype, on the CPU (moments: [2C, ...]).

    image: without its pixels, since a part's rows, thousands of them, are held until it is written.
    """

    image: PreparedImage
    latent: "Tensor"


@dataclass(frozen=True, slots=True)
class Seconds:
    """Where the time of a unit went, in seconds.

    Of the unit's own thread: read; starved (it waited for images to be opened); queue (it waited for the model, which
    another unit used); encode (the model's own time); write. Of the threads that open images, summed: open.
    """

    read: float = 0.0
    open: float = 0.0
    starved: float = 0.0
    queue: float = 0.0
    encode: float = 0.0
    write: float = 0.0

    def plus(self, **more: float) -> "Seconds":
        return replace(self, **{stage: getattr(self, stage) + seconds for stage, seconds in more.items()})

    def __add__(self, other: "Seconds") -> "Seconds":
        return self.plus(**asdict(other))


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitReport:
    """What a finished unit tells the driver: counts, never pixels.

    adopted: parts that stood there already. encoded: rows of the others. again: images that overflowed and were
    encoded again in float32. texts: by text column, how many of the encoded rows have that text.
    damage: what is wrong with the shard, where its rest was rejected.
    passed_over: how much of the input was read as no part of a sample, by kind (`jobs.skipped_inputs`).
    """

    unit: str
    samples: int = 0
    rows: int = 0
    filtered: int = 0
    enlarged: int = 0
    rejects: Mapping[str, int] = field(default_factory=dict)
    parts: int = 0
    adopted: int = 0
    encoded: int = 0
    again: int = 0
    texts: Mapping[str, int] = field(default_factory=dict)
    bytes: int = 0
    damage: str = ""
    passed_over: Mapping[str, int] = field(default_factory=dict)
    seconds: Seconds = field(default_factory=Seconds)


def stem(path: str) -> str:
    """A path without its extension."""
    dot = path.rfind(".")
    return path[:dot] if path.rfind("/") + 1 < dot < len(path) - 1 else path


def extension(path: str) -> str:
    """In small letters, without its dot."""
    return path[len(stem(path)) + 1 :].lower()


def is_image(path: str) -> bool:
    """By its extension."""
    return extension(path) in IMAGE_EXTENSIONS
