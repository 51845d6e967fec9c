"""cache.json as one typed object: the settings that made a cache, its VAE, and the columns of its rows.

Everything that decides the bytes of a cache is in the identity. A job with another identity is refused, with
the options that differ. `compute` is not part of the identity: another batch size or thread count may change bits by
rounding.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import pyarrow as pa

from latentmill.canonical_json import canonical_json
from latentmill.errors import CacheError
from latentmill.scaling import Scaling
from latentmill.typed_json import FieldError, parse_fields

FORMAT = 1
NAME = "cache.json"

Recipe = Literal[
    "center-crop",
    "center-crop-dhariwal",
    "diffusers",
    "sd-scripts",
    "aspect-ratio-512",
    "aspect-ratio-1024",
    "aspect-ratio-2048",
    "none",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """How the pixels of an image are made.

    resolution: pixels of a square's side, or the side of a square with the area of the buckets. buckets: (height,
    width) of each, in pixels; None for squares, and if the sizes depend on the images. multiple_of: of the sides, in
    pixels; None for squares and tables. min_size: images with a shorter side are filtered; 0 filters none.
    interpolation: None if the transform fixes it. flip: "random" if half of the images were mirrored, "both" if each
    row has the latent of the mirrored image as well. version: of the transform itself; it goes up if the same settings
    give other pixels. transform: the rule by which images are resized and cropped. jpeg_decode: "scaled" if large JPEGs
    were decoded at a reduced size. min_bucket_reso, max_bucket_reso: of sd-scripts, in pixels. no_upscale: images that
    would be enlarged keep their size, or are filtered. max_aspect: images with a longer side of more than this many
    times the shorter one are filtered. min_std: images whose standard deviation is lower, in gray levels, are filtered;
    0 filters none. exif: whether the EXIF orientation was applied. alpha: the color behind transparent pixels, or
    "drop" if their own color was kept. color: "srgb" if embedded color profiles were converted. allow_truncated:
    whether images that lack their end were accepted. The file has the fields with a default only if they have another
    value.
    """

    resolution: int
    buckets: tuple[tuple[int, int], ...] | None
    multiple_of: int | None
    min_size: int
    interpolation: Literal["bicubic", "bilinear", "lanczos"] | None
    crop: Literal["center", "random"]
    flip: Literal["none", "random", "both"]
    version: int
    transform: Recipe = "center-crop"
    jpeg_decode: Literal["full", "scaled"] = "full"
    min_bucket_reso: int | None = None
    max_bucket_reso: int | None = None
    no_upscale: bool = False
    max_aspect: float | None = None
    min_std: float = 0.0
    exif: Literal["apply", "ignore"] = "apply"
    alpha: Literal["white", "black", "drop"] = "white"
    color: Literal["keep", "srgb"] = "keep"
    allow_truncated: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the entry `preprocessing`, without defaults, so that later fields do not change an identity."""
        values = asdict(self)
        return {item.name: values[item.name] for item in fields(self) if values[item.name] != item.default}


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRules:
    """How the samples of the sources and their texts are found.

    caption_extensions: of the text files beside an image that are columns unless `columns` names others.
    text_encoding: of these files. include, exclude: the globs that choose files. classes: the sorted names of the
    folders that give the column `label`; None if folders give no labels.
    """

    caption_extensions: tuple[str, ...] = ("txt", "json")
    text_encoding: str = "utf-8"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None


_DEFAULT_RULES: Mapping[str, Any] = json.loads(canonical_json(asdict(SourceRules())))


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The fields that decide a cache's bytes. Differences are reported in the order of the fields.

    weights: sha256 of the VAE's weights. config: the fields of the VAE's configuration that change raw latents.
    store: the stored form of a posterior. dtype: of the stored latents. precision: of the computation. tile_above: side
    in pixels above which an image is encoded in tiles; None for never. columns: the requested columns; None for
    all. image_column, key_column: of Parquet sources; None if they were found by their type or name. sources: how
    samples and texts are found.
    """

    weights: str
    config: Mapping[str, Any]
    preprocessing: Preprocessing
    store: Literal["mode", "sample", "moments"]
    dtype: Literal["float16", "bfloat16", "float32"]
    precision: str
    tile_above: int | None
    rows_per_part: int
    seed: int
    container: Literal["parquet", "webdataset"]
    columns: tuple[str, ...] | None
    image_column: str | None
    key_column: str | None
    sources: SourceRules = SourceRules()  # the file has only the fields that differ from the default

    def to_dict(self) -> dict[str, Any]:
        """Return the entry `identity` of cache.json."""
        content: dict[str, Any] = asdict(self) | {"preprocessing": self.preprocessing.to_dict()}
        plain: dict[str, Any] = json.loads(canonical_json(content))
        rules = {name: value for name, value in plain.pop("sources").items() if value != _DEFAULT_RULES[name]}
        return {**plain, "sources": rules} if rules else plain

    @property
    def sha256(self) -> str:
        """The sha256 of the identity as canonical JSON, in hex."""
        return hashlib.sha256(canonical_json(self.to_dict())).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeInfo:
    """The compute settings of the run that created the cache. They can change bits by rounding.

    batch_size: None if workers choose it on their GPU. form: `auto` if they choose it.
    """

    backend: Literal["torch", "jax"]
    device: str
    batch_size: int | None
    threads: int
    form: Literal["auto", "plain", "fused", "compiled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeInfo:
    """The VAE that made the latents: its reference (`--vae`), its config.json, and the constants of its scaling.

    patch_size: height and width of the patches of raw latents that model latents have as channels; None for no patches.
    latents_mean and latents_std are of these channels (`latentmill.scaling`).
    """

    reference: str
    config: Mapping[str, Any]
    scaling_factor: float
    shift_factor: float | None
    latents_mean: tuple[float, ...] | None
    latents_std: tuple[float, ...] | None
    patch_size: tuple[int, int] | None = None

    @property
    def constants(self) -> dict[str, Any]:
        """The constants of `Scaling.from_constants` by name, lists as lists."""
        return {
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
            "latents_mean": self.latents_mean and list(self.latents_mean),
            "latents_std": self.latents_std and list(self.latents_std),
            "patch_size": self.patch_size and list(self.patch_size),
        }


@dataclass(frozen=True, slots=True)
class ColumnInfo:
    """A column of a Parquet row, or a member of a WebDataset sample."""

    name: str
    type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PassthroughInfo:
    """The columns that were copied from the sources.

    texts: the columns that were files beside an image, or members of its sample in a tar or zip, by extension.
    arrow_schema: all columns, as Arrow's serialized schema in base64.
    """

    texts: tuple[str, ...]
    arrow_schema: str

    def read_schema(self) -> pa.Schema:
        """Return the names and types of the columns. Raises ValueError or OSError if they cannot be read."""
        return pa.ipc.read_schema(pa.BufferReader(base64.b64decode(self.arrow_schema)))

    @property
    def binary(self) -> frozenset[str]:
        """Those of `texts` that are bytes, such as further images."""
        schema = self.read_schema()
        return frozenset(name for name in self.texts if pa.types.is_binary(schema.field(name).type))


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheInfo:
    """The content of a cache.json. It is written once and never changed."""

    format: int
    identity: Identity
    identity_sha256: str
    compute: ComputeInfo
    vae: VaeInfo
    schema: tuple[ColumnInfo, ...]
    columns: PassthroughInfo

    @property
    def scaling(self) -> Scaling:
        """The rule between the raw latents in the cache and model latents."""
        vae = self.vae
        return Scaling.from_constants(
            vae.scaling_factor, vae.shift_factor, vae.latents_mean, vae.latents_std, vae.patch_size
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the content of cache.json in its order, without the file's own sha256."""
        return {
            "format": self.format,
            "identity": self.identity.to_dict(),
            "identity_sha256": self.identity_sha256,
            "compute": asdict(self.compute),
            "vae": {"reference": self.vae.reference, "config": dict(self.vae.config), **self.vae.constants},
            "schema": [asdict(column) for column in self.schema],
            "columns": {"texts": list(self.columns.texts), "arrow_schema": self.columns.arrow_schema},
        }


def parse_cache_json(data: bytes, url: str) -> CacheInfo:
    """Return the content of a cache.json. url: of the cache.

    Raises CacheError, which names the file and the field, if a field is missing, has another type, or is unknown to
    this version.
    """
    file = f"{url.rstrip('/')}/{NAME}"
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{url} is not a latentmill cache: its {NAME} is not JSON") from error
    if not isinstance(content, dict):
        raise CacheError(f"{url} is not a latentmill cache: its {NAME} is not an object")
    if content.get("format", FORMAT) != FORMAT:
        raise CacheError(f"{url} has cache format {content['format']}; this version knows {FORMAT}")
    try:
        info = parse_fields(CacheInfo, content)
        info.columns.read_schema()
    except FieldError as error:
        raise CacheError(f"{url} is not a latentmill cache: in its {NAME}, {error}") from error
    except (ValueError, TypeError, OSError) as error:  # Arrow's errors are of these kinds
        text = f"the field 'columns.arrow_schema' is not a schema of Arrow: restore {file} from a copy"
        raise CacheError(f"{url} is not a latentmill cache: in its {NAME}, {text}") from error
    if hashlib.sha256(canonical_json(content["identity"])).hexdigest() != info.identity_sha256:
        raise CacheError(f"{file} was changed by hand: its identity does not have its own sha256")
    if unknown := _find_unknown_field(content["identity"], info.identity.to_dict()):
        text = f"{file} has the field 'identity.{unknown}', which this version of latentmill does not know"
        raise CacheError(f"{text}: use the version that made the cache")
    return info


def _find_unknown_field(written: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """Return the first field of an identity that the dataclass does not have; empty if there is none."""
    for name, value in written.items():
        if name not in known:
            return name
        if name in ("preprocessing", "sources") and (inner := _find_unknown_field(value, known[name])):
            return f"{name}.{inner}"
    return ""
