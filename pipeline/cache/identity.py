"""What a cache is: everything that decides its bytes, written once to cache.json and never changed.

A job whose identity differs from the cache's is refused with the field named; so is a reader that says what it
expects. `compute` stands beside the identity: another slice size or thread count may change bits by rounding.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.canonical_json import canonical_json, with_checksum
from pipeline.errors import CacheError, IdentityError
from pipeline.formats.schema import OutputSchema, PassthroughColumns
from pipeline.images import transform
from pipeline.storage.folder import Folder
from vae import AutoencoderKLConfig

FORMAT = 1
NAME = "cache.json"
MAX_ROWS_PER_PART = 4096
MAX_PART_BYTES = 256 << 20

# Fields of a model's configuration that do not change its raw latents.
_NOT_RAW = frozenset(
    {"scaling_factor", "shift_factor", "latents_mean", "latents_std", "sample_size", "force_upcast"}
    | {"up_block_types", "out_channels", "use_post_quant_conv"}
)
CONSTANTS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
_VALUE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The fields that a cache's bytes follow from. Dataclass order is the order in which differences are reported."""

    weights: str
    config: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    store: str
    dtype: str
    precision: str
    tile_above: int | None
    rows_per_part: int
    seed: int
    container: str
    columns: tuple[str, ...] | None
    image_column: str | None
    key_column: str | None

    def to_dict(self) -> dict[str, Any]:
        return json.loads(canonical_json(asdict(self)))  # type: ignore[no-any-return]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(canonical_json(self.to_dict())).hexdigest()


def raw_config(config: AutoencoderKLConfig) -> dict[str, Any]:
    """The fields of a model's configuration that change raw latents."""
    return {key: value for key, value in config.to_dict().items() if key not in _NOT_RAW}


def describe_transform(settings: transform.Transform) -> dict[str, Any]:
    """What a transform does to pixels, as the identity names it."""
    return {
        "resolution": settings.resolution,
        "buckets": [list(bucket) for bucket in settings.buckets] or None,
        "multiple_of": settings.multiple_of or None,
        "min_size": settings.min_size,
        "interpolation": settings.interpolation,
        "crop": settings.crop,
        "flip": settings.flip,
        "version": transform.VERSION,
    }


def parse_transform(identity: Mapping[str, Any]) -> transform.Transform:
    """The transform that a cache's identity describes."""
    preprocessing = identity["preprocessing"]
    return transform.Transform(
        resolution=preprocessing["resolution"],
        buckets=tuple((height, width) for height, width in preprocessing["buckets"] or ()),
        multiple_of=preprocessing["multiple_of"] or 0,
        min_size=preprocessing["min_size"],
        interpolation=preprocessing["interpolation"],
        crop=preprocessing["crop"],
        flip=preprocessing["flip"],
        seed=identity["seed"],
    )


def parse_schema(content: Mapping[str, Any]) -> OutputSchema:
    """What the files of a cache look like, from its cache.json."""
    identity = content["identity"]
    return OutputSchema(
        container=identity["container"],
        store=identity["store"],
        columns=PassthroughColumns.from_dict(content["columns"]),
    )


def default_rows_per_part(config: AutoencoderKLConfig, resolution: int, dtype: str, store: str) -> int:
    """As many rows as fit 256 MiB, and at most 4,096."""
    latent = (
        (2 if store == "moments" else 1)
        * config.latent_channels
        * (resolution // config.downscale) ** 2
        * _VALUE_BYTES[dtype]
    )
    return max(1, min(MAX_ROWS_PER_PART, MAX_PART_BYTES // latent))


def read_cache_json(cache: Folder) -> dict[str, Any] | None:
    """The content of cache.json; None where there is no cache yet.

    Raises CacheError for a folder that holds something else, and for a format that this version does not know.
    """
    data = cache.read_if_there(NAME)
    if data is None:
        if cache.is_empty():
            return None
        data = cache.read_if_there(NAME)  # another job may have begun it just now
    if data is None:
        raise CacheError(f"{cache.url} is not a latentmill cache: it is not empty, and has no {NAME}")
    try:
        content = json.loads(data)
        if content["format"] != FORMAT:
            raise CacheError(f"{cache.url} has cache format {content['format']}; this version knows {FORMAT}")
        if hashlib.sha256(canonical_json(content["identity"])).hexdigest() != content["identity_sha256"]:
            raise CacheError(f"{cache.at(NAME)} was changed by hand: its identity does not have its own sha256")
        parse_schema(content)
    except (ValueError, KeyError, TypeError, OSError) as error:  # Arrow's errors are of these kinds
        raise CacheError(f"{cache.url} is not a latentmill cache: its {NAME} cannot be understood") from error
    return content  # type: ignore[no-any-return]


def create_or_load(cache: Folder, content: Mapping[str, Any]) -> dict[str, Any]:
    """Create cache.json with this content, or take the one that stands there.

    Raises IdentityError, with the first field that differs, where that one is another cache's.
    """
    cache.create(NAME, encode_json(with_checksum(content)))
    standing = read_cache_json(cache)
    if standing is None:
        raise CacheError(f"{cache.at(NAME)} was created and has gone again")
    check_same_identity(cache.url, standing["identity"], content["identity"])
    return standing


def encode_json(content: Mapping[str, Any]) -> bytes:
    """cache.json with this content."""
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode()


def check_same_identity(url: str, standing: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise IdentityError unless the two identities are equal."""
    for field, theirs, ours in _differences(standing, wanted, ""):
        raise IdentityError(
            f"the cache {url} was made with {field}={_short(theirs)}, this job has {field}={_short(ours)}; "
            f"use its setting, or another --to"
        )


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str) -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for key in [*b, *(key for key in a if key not in b)]:
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found += _differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append((prefix + key, left, right))
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] + "..." if len(text) == 64 and text.isalnum() else text
