"""The plain data that flows through the pipeline. The terms are defined in docs/cache-format.md."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Protocol

from latentmill import cache_info
from pipeline.errors import Filter, Rejected

if TYPE_CHECKING:  # importing torch takes two seconds, which `latentmill --help` can save
    from torch import Tensor

JpegDecode = Literal["full", "scaled"]
Interpolation = Literal["bicubic", "bilinear", "lanczos"]
Recipe = cache_info.Recipe  # of `--transform`, see `pipeline.images.recipes`
Crop = Literal["center", "random"]
Flip = Literal["none", "random", "both"]
Exif = Literal["apply", "ignore"]
Alpha = Literal["white", "black", "drop"]
Color = Literal["keep", "srgb"]
Container = Literal["parquet", "webdataset"]
Store = Literal["mode", "sample", "moments"]
Backend = Literal["torch", "jax"]  # that runs the model
Form = Literal["plain", "fused", "compiled"]  # of the encoder, see `pipeline.encoder.ComputeConfig`
AttentionKernel = Literal["sdpa", "per-image"]
# The extensions of images: of formats that are read, that a plugin reads, and that are rejected. The bytes decide.
# Not those that mostly name other things: `.ps` (documents), `.mpg` (videos), `.pcd` (point clouds), `.gbr` (circuit
# boards), `.h5`, `.hdf`, `.grib` and `.bufr` (arrays).
_READ = (
    *("jpg", "jpeg", "jpe", "jfif", "jif", "mpo", "png", "apng", "webp", "gif", "bmp", "dib", "avif", "avifs"),
    *("tif", "tiff", "jp2", "j2k", "j2c", "jpc", "jpf", "jpx", "ppm", "pgm", "pbm", "pnm", "pfm", "tga", "ico"),
    *("icb", "vda", "vst", "qoi", "dds", "pcx", "sgi", "rgb", "rgba", "bw"),
)
_BY_PLUGIN = ("heic", "heif", "hif", "jxl")
_REJECTED = (  # vectors and layers, other raster formats, raw files of cameras
    *("svg", "svgz", "eps", "wmf", "emf", "psd", "psb", "xcf", "kra", "exr", "hdr", "icns", "cur", "blp", "dcx", "pxr"),
    *("jxr", "wdp", "hdp", "bpg", "flif", "jls", "djvu", "dcm", "fits", "fit", "fts", "fli", "flc", "msp", "ras"),
    *("xbm", "xpm", "im", "iim", "ftc", "ftu"),
    *("dng", "cr2", "cr3", "crw", "nef", "nrw", "arw", "srf", "sr2", "raf", "orf", "rw2", "pef", "srw", "x3f", "3fr"),
    *("fff", "erf", "mrw", "rwl", "iiq", "kdc", "dcr", "mef", "gpr"),
)
IMAGE_EXTENSIONS = frozenset({*_READ, *_BY_PLUGIN, *_REJECTED})
TEXT_EXTENSIONS = ("txt", "json")  # of the sidecar files whose exact text is copied to the cache
# kinds of units that are made of one file each, by the ends of the file's name
SHARD_ENDINGS = {
    ".tar": "tar",
    ".tar.gz": "tar",
    ".tgz": "tar",
    ".zip": "zip",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
TAR_GROUP = "tars"  # the kind of units that are made of several small tars
_SECOND_ENDINGS = frozenset(end[end.rfind(".") :] for end in SHARD_ENDINGS if end.count(".") > 1)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A table of images. image_root: URL of the folder that its paths are relative to; "": the manifest's own."""

    rows: int
    image_root: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedFile:
    """An input file as it was listed.

    root: URL of the source's last directory without a wildcard, without credentials. There may be millions of files, so
    all files of a source share this text.
    path: the name of the source and the file's path below the root. It is the same on every disk, mount and bucket.
    etag: the version of its content (`etags.get_etag`); empty if it is unknown.
    file_id: equal for two paths to the same file of a local disk (`walk.file_id`); empty on other storage.
    is_named: whether a source names the file itself, not only its folder. manifest: if the file is one.
    """

    root: str
    path: str
    bytes: int
    etag: str
    file_id: str = ""
    is_named: bool = False
    manifest: Manifest | None = None

    @property
    def url(self) -> str:
        """The file's location."""
        return join_url(self.root, path_below_root(self.path))


class PinnedFile(Protocol):
    """An input file and the version of its content: a `ListedFile`, a `PlannedFile`, or the `Unit` of a single file."""

    @property
    def path(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def etag(self) -> str: ...


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """An input file as it was planned: a tar, a Parquet file, an image, or a text beside it.

    path: starts with the name of the source.
    """

    path: str
    bytes: int
    etag: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """The work of one task: a tar or Arrow file, a range of a large tar or another file, small tars, or images.

    name: unique, safe in a file name, and independent of the input's location.
    kind: tar, tars, zip, parquet, arrow, folder or manifest.
    range: (k, n) for range k of n of a large tar, a zip, a Parquet file or a manifest. bytes: of the whole input.
    root: URL of the source's root, without credentials. path: as of `ListedFile`; for a folder or a group of tars, the
    name of its source.
    For a folder, `paths` lists the images, and for a group the tars. `files` holds the sizes and ETags of these files
    and of the texts beside images (packed by `sources.sidecars`), and `etag` is the sha256 of `files`. For folders,
    tars, groups and zips, `metadata` has the paths, sizes and ETags of the tables with further columns of the samples.
    For a manifest, `files` is the URL of the folder of its images; "" for its own folder. For a range of a tar, `files`
    has its bytes.
    left_out: the tars of a group that are units of their own, because they could not be read. It follows from the plan.
    """

    name: str
    kind: str
    path: str
    range: tuple[int, int] | None = None
    paths: tuple[str, ...] = ()
    bytes: int = 0
    etag: str = ""
    files: str = ""
    root: str = ""
    metadata: str = ""
    left_out: frozenset[str] = frozenset()

    @property
    def url(self) -> str:
        """The location of the input; for a folder or a group of tars, of the root."""
        return self.root if self.paths else join_url(self.root, path_below_root(self.path))

    @property
    def source_name(self) -> str:
        """The name of the unit's source."""
        return source_name(self.path)

    @property
    def input_bytes(self) -> int:
        """The approximate number of the input's bytes that this unit reads."""
        return self.bytes // (self.range[1] if self.range else 1)


@dataclass(frozen=True, slots=True)
class Sample:
    """A key, the encoded bytes of an image, and its columns. position: in the unit's reading order, from 0.

    shard: the path of its tar, in a group of tars; in other units "", which stands for the unit's path.
    """

    position: int
    key: str
    image: bytes
    columns: Mapping[str, Any]
    shard: str = ""


@dataclass(frozen=True, slots=True)
class Reject:
    """A sample that is not in the cache, with the stage and the reason of its rejection. shard: as of `Sample`."""

    position: int
    key: str
    stage: str
    reason: str
    detail: str
    shard: str = ""

    @classmethod
    def from_error(cls, position: int, key: str, error: Rejected, shard: str = "") -> "Reject":
        """Return the reject of a sample that raised `error`."""
        return cls(position, key, error.stage, error.reason, error.detail, shard)


@dataclass(frozen=True, slots=True)
class Attempt:
    """Facts about the earlier attempts of a task.

    isolated: a worker died during an earlier attempt, perhaps because of one of the unit's images.
    damaged_at: the byte at which an earlier attempt found the shard damaged. If this attempt finds damage at the same
    byte, the damage is accepted as the file's own.
    is_retry: an earlier attempt of this run may have published parts.
    """

    isolated: bool = False
    damaged_at: int | None = None
    is_retry: bool = False


FIRST_ATTEMPT = Attempt()


@dataclass(frozen=True, slots=True)
class Filtered:
    """A sample that a setting leaves out. filter: the setting."""

    position: int
    filter: Filter


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedImage:
    """A decoded and transformed sample: pixels are RGB uint8 [H, W, 3], with the parameters of the transform.

    shard: the path of its tar or other file, or the name of a folder's source. With the key, it identifies the sample.
    truncated: whether its file lacks its end; None if such files are rejected.
    """

    shard: str
    position: int
    key: str
    columns: Mapping[str, Any]
    pixels: "Tensor"
    original_height: int
    original_width: int
    resized_height: int
    resized_width: int
    crop_top: int
    crop_left: int
    enlarged: bool
    flipped: bool = False
    truncated: bool | None = None

    @property
    def bucket(self) -> tuple[int, int]:
        """Height and width of the encoded image."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def geometry(self) -> dict[str, int | bool]:
        """The columns of a row that describe the transform of its image."""
        names = ("original_height", "original_width", "resized_height", "resized_width", "crop_top", "crop_left")
        height, width = self.bucket
        sizes = {name: getattr(self, name) for name in names}
        truncated = {} if self.truncated is None else {"truncated": self.truncated}
        return {"height": height, "width": width, **sizes, "flipped": self.flipped, **truncated}

    def drop_pixels(self) -> "PreparedImage":
        """Return the same image without its pixels. Only their shape remains, as a `meta` tensor of torch."""
        return replace(self, pixels=_make_meta_pixels(*self.bucket))


@cache
def _make_meta_pixels(height: int, width: int) -> "Tensor":
    """Return the one tensor of this shape that all images without pixels share."""
    import torch

    return torch.empty(height, width, 3, dtype=torch.uint8, device="meta")


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """The result of the model for one image.

    latent: as it is stored, [C, H/f, W/f] (moments: [2C, ...]), on the CPU; a Rejected if it is not finite.
    is_fallback: it overflowed in half precision, and was encoded again in float32.
    latent_flipped: with `--flip both`, that of the flipped image, in the same form.
    """

    latent: "Tensor | Rejected"
    is_fallback: bool = False
    latent_flipped: "Tensor | None" = None

    @property
    def latents(self) -> "tuple[Tensor, ...]":
        """The latent of the image, followed by that of the flipped image if there is one. Empty for a Rejected."""
        found = (self.latent, self.latent_flipped)
        return tuple(latent for latent in found if not isinstance(latent, Rejected | None))

    def with_flipped(self, flipped: "EncodedImage") -> "EncodedImage":
        """Return the result for the image and the flipped image. The image is rejected if either latent is."""
        if isinstance(flipped.latent, Rejected):
            return flipped
        return replace(self, latent_flipped=flipped.latent, is_fallback=self.is_fallback or flipped.is_fallback)


@dataclass(frozen=True, slots=True)
class Row:
    """An image and its raw latent as it is stored: [C, H/f, W/f] in the cache's dtype, on the CPU (moments: [2C, ...]).

    image: without its pixels, because thousands of rows stay in memory until their part is written.
    chunk, index: the latents of several rows, [rows, 1 or 2, C, H/f, W/f], and the place of this row's in it. The
    second one of a row is that of the flipped image, with `--flip both`. Tensors are made when they are needed: as
    small and long-lived blocks, they would keep the C library from using the memory of freed images beside them.
    """

    image: PreparedImage
    chunk: "Tensor"
    index: int

    @property
    def latents(self) -> "tuple[Tensor, ...]":
        """The latent of the image, followed by that of the flipped image if there is one."""
        return self.chunk[self.index].unbind()

    @property
    def latent_bytes(self) -> int:
        """The size of the latents in bytes."""
        return self.chunk.nbytes // len(self.chunk)


@dataclass(frozen=True, slots=True)
class Seconds:
    """The time that a unit took, in seconds.

    read: in the unit's thread. open: summed over the threads that open images. write: in the thread that publishes.
    Its share of the device's time: encode (the model ran), and the time in which the device had no images, because all
    openers were busy (idle_opening), samples were still to be read (idle_reading), or units were only written
    (idle_writing).
    """

    read: float = 0.0
    open: float = 0.0
    encode: float = 0.0
    write: float = 0.0
    idle_opening: float = 0.0
    idle_reading: float = 0.0
    idle_writing: float = 0.0

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(*(getattr(self, stage) + getattr(other, stage) for stage in Seconds.__slots__))


def source_name(path: str) -> str:
    """Return the name of a file's source: the first step of its path."""
    return path.split("/", 1)[0]


def path_below_root(path: str) -> str:
    """Return a file's path below the root of its source: all steps but the first."""
    return path.split("/", 1)[1]


def join_url(root: str, below: str) -> str:
    """Return the URL of a path below a root. The root of `memory://` itself ends with slashes that belong to it."""
    return f"{root if root.endswith('://') else root.rstrip('/')}/{below}"


def stem(path: str) -> str:
    """Return a path without its extension."""
    dot = path.rfind(".")
    return path[:dot] if path.rfind("/") + 1 < dot < len(path) - 1 else path


def extension(path: str) -> str:
    """Return the extension of a path in lower case, without its dot."""
    dot = path.rfind(".")
    return path[dot + 1 :].lower() if path.rfind("/") + 1 < dot else ""


def get_shard_kind(path: str) -> str:
    """Return the kind of unit that a file is read as, by the end of its name; "" for other files and images."""
    end = path[path.rfind(".") :].lower()
    if end in _SECOND_ENDINGS:
        end = _get_shard_ending(path)
    return SHARD_ENDINGS.get(end, "")


def get_shard_stem(path: str) -> str:
    """Return the path of a shard without the end that names its kind: `a/00000` for `a/00000.tar.gz`."""
    end = _get_shard_ending(path)
    return path[: len(path) - len(end)] if end in SHARD_ENDINGS else path


def _get_shard_ending(path: str) -> str:
    """Return the end of a path from its last dot on, in lower case, or from the dot before if that names a kind."""
    last = path.rfind(".")
    end = path[last:].lower()
    if end in _SECOND_ENDINGS and (longer := path[path.rfind(".", 0, last) :].lower()) in SHARD_ENDINGS:
        return longer
    return end


def is_image(path: str) -> bool:
    """Whether a path is an image's, by its extension."""
    return extension(path) in IMAGE_EXTENSIONS


def image_rank(kind: str) -> int:
    """Return which of several images with one name is used, by their extensions: those with the lowest rank."""
    return 0 if kind in _READ else 1 if kind in _BY_PLUGIN else 2
