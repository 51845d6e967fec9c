"""The things that flow through the pipeline, as plain data. The words are those of docs/cache-format.md."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import REST, CacheError, Rejected

if TYPE_CHECKING:  # two seconds, which `latentmill --help` need not take
    from torch import Tensor

Interpolation = Literal["bicubic", "bilinear", "lanczos"]
Crop = Literal["center", "random"]
Flip = Literal["none", "random"]
Container = Literal["parquet", "webdataset"]
Store = Literal["mode", "sample", "moments"]
PICTURE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp"})
VERIFY = "latentmill verify says what to do"
TEXT_EXTENSIONS = ("txt", "json")  # passed through from beside a picture, as the exact text


def canonical_json(value: Any) -> bytes:
    """UTF-8, keys sorted, no spaces, floats as their shortest repr, no NaN: equal values, equal bytes."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def json_object(data: bytes, where: str) -> dict[str, Any]:
    """An object that a cache's file holds as JSON. Raises CacheError, which names the file, for anything else."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise CacheError(f"{where} cannot be understood: it is damaged; {VERIFY}")
    return content


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A file's content with the `sha256` of all else in it, by which `verify` finds a byte that has changed."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    return {**rest, "sha256": hashlib.sha256(canonical_json(rest)).hexdigest()}


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
    """What one task does: a whole tar, a range of a Parquet file, or up to 256 pictures of a folder.

    name: unique, safe in a file name, and the same wherever the input lies. kind: tar, parquet or folder; of a folder
    `paths` lists the pictures, `url` is the root. range: (k, n) of a Parquet file. bytes: of the whole input.
    root: of the source. files: of a folder, what its images and their texts were (`pipeline.beside` packs them), of
    which `etag` is the sha256.
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
    """A key with the bytes of a picture and its columns, at a position of the unit's reading order."""

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

    careful: a worker died under it, perhaps because of one of its images.
    damaged_at: the byte at which another worker found its shard damaged: if this one finds the same, it is believed.
    """

    careful: bool = False
    damaged_at: int | None = None


FIRST = Attempt()


@dataclass(frozen=True, slots=True)
class Filtered:
    """A sample that the settings leave out (`--min-size`)."""

    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
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
        """Height and width of the encoded picture."""
        return self.pixels.shape[1], self.pixels.shape[2]

    @property
    def geometry(self) -> dict[str, int | bool]:
        """What a row says of how the picture came to its size."""
        names = ("original_height", "original_width", "crop_top", "crop_left", "flipped")
        height, width = self.bucket
        return {"height": height, "width": width, **{name: getattr(self, name) for name in names}}

    def without_pixels(self) -> "Picture":
        """The same, of its pixels their shape alone (as torch's `meta` tensors have it)."""
        return replace(self, pixels=self.pixels.to("meta"))


@dataclass(frozen=True, slots=True)
class Row:
    """A picture and its latent: raw, as stored, [C, H/f, W/f] of the cache's dtype, on the CPU (moments: [2C, ...]).

    picture: without its pixels, since a part's rows, thousands of them, are held until it is written.
    """

    picture: Picture
    latent: "Tensor"


@dataclass(slots=True)
class BucketTally:
    """Running statistics of the latents of one bucket, a list entry a channel, in float64.

    Where moments are stored: of the means; `variance` is the mean of the variances then, and None else.
    """

    samples: int
    values: int
    mean: list[float]
    m2: list[float]
    min: list[float]
    max: list[float]
    variance: list[float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As a record holds it: without `variance` where there is none."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a part says of itself, inside its own file. Nothing in it depends on the run.

    inputs: sha256 over the part's samples as they were read (`pipeline.inputs`).
    round, supersedes: of a part that `retry` wrote beside the one of its number: which retry it was, and the rejects
    that do not count any more, as position and reason. Both are left out of other parts' records.
    """

    format: int
    identity: str
    unit: str
    part: int
    last: bool
    source: str
    source_bytes: int
    range: tuple[int, int] | None
    first: int
    samples: int
    rows: int
    filtered: int
    enlarged: int
    inputs: str
    rejects: tuple[Reject, ...]
    tally: Mapping[str, BucketTally]
    round: int = 0
    supersedes: tuple[tuple[int, str], ...] = ()

    @property
    def stem(self) -> str:
        """The file name of the part, without its folder and extension."""
        return f"{self.unit}-{self.part:05d}" + (f"r{self.round}" if self.round else "")

    @property
    def positions(self) -> list[int]:
        """Those that the part accounts for, in order. Of a part that `retry` wrote: of the rejects that it supersedes,
        and, where a `rest_of_shard` is among them, as many from there on as it has samples."""
        if not self.round:
            return list(range(self.first, self.first + self.samples))
        solved = [position for position, reason in self.supersedes if reason != REST]
        starts = [position for position, reason in self.supersedes if reason == REST]
        rest = [start + number for start in starts[:1] for number in range(self.samples - len(solved))]
        return sorted(solved + rest)

    @property
    def counted(self) -> list[int]:
        """The positions of its samples: a damaged shard's rest is none."""
        rests = {reject.position for reject in self.rejects if reject.reason == REST}
        return [position for position in self.positions if position not in rests]

    def to_dict(self) -> dict[str, Any]:
        fields = asdict(self) | {"tally": {bucket: tally.to_dict() for bucket, tally in self.tally.items()}}
        if not self.round:
            del fields["round"], fields["supersedes"]
        return fields

    def to_json(self) -> bytes:
        return canonical_json(self.to_dict())

    @classmethod
    def from_json(cls, text: bytes) -> "Record":
        """Raises ValueError, KeyError or TypeError for what is not a record."""
        fields = json.loads(text)
        fields["range"] = tuple(fields["range"]) if fields["range"] else None
        fields["rejects"] = tuple(Reject(**reject) for reject in fields["rejects"])
        fields["tally"] = {bucket: BucketTally(**tally) for bucket, tally in fields["tally"].items()}
        fields["supersedes"] = tuple((position, reason) for position, reason in fields.get("supersedes", ()))
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Standing:
    """A part that stands in the cache: its record, and its file's name, size and sha256."""

    record: Record
    file: str
    bytes: int
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """As `_commits` holds it: rejects as counts by reason, and where the rest of a damaged shard begins."""
        fields = self.record.to_dict()
        reasons = [reject.reason for reject in self.record.rejects]
        fields["rejects"] = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
        fields["rests"] = [reject.position for reject in self.record.rejects if reject.reason == REST]
        return {**fields, "file": self.file, "bytes": self.bytes, "sha256": self.sha256}


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

    adopted: parts that stood there already. encoded: rows of the others. again: pictures that overflowed and were
    encoded again in float32. texts: by text column, how many of the encoded rows have that text.
    damage: what is wrong with the shard, where its rest was rejected.
    passed_over: how much of the input was read as no part of a sample, by kind (`jobs.passed_over`).
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
