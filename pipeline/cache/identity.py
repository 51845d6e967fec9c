"""The identity of a cache: everything that decides its bytes, written once to cache.json and never changed.

A job whose identity differs from the cache's is refused with the field named. `latentmill.cache_info` has the fields;
here they are made from a job's settings, written, and compared.
"""

from collections.abc import Mapping
from typing import Any

from latentmill.cache_info import FORMAT, NAME, CacheInfo, Identity, Preprocessing, parse_cache_json
from pipeline.canonical_json import indented_json, with_checksum
from pipeline.errors import CacheError, IdentityError
from pipeline.formats.schema import OutputSchema, PassthroughColumns
from pipeline.images import transform
from pipeline.storage.folder import Folder
from vae import AutoencoderKLConfig

__all__ = ["FORMAT", "NAME", "CacheInfo", "Identity", "Preprocessing"]

MAX_ROWS_PER_PART = 4096
MAX_PART_BYTES = 256 << 20

# Fields of a model's configuration that do not change its raw latents.
_NOT_RAW = frozenset(
    {"scaling_factor", "shift_factor", "latents_mean", "latents_std", "sample_size", "force_upcast"}
    | {"up_block_types", "out_channels", "use_post_quant_conv"}
)
_VALUE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def select_raw_fields(config: AutoencoderKLConfig) -> dict[str, Any]:
    """Return the fields of a model's configuration that change raw latents."""
    return {key: value for key, value in config.to_dict().items() if key not in _NOT_RAW}


def describe_transform(settings: transform.Transform) -> Preprocessing:
    """Return a transform as the identity names it."""
    return Preprocessing(
        resolution=settings.resolution,
        buckets=settings.buckets or None,
        multiple_of=settings.multiple_of or None,
        min_size=settings.min_size,
        interpolation=settings.interpolation,
        crop=settings.crop,
        flip=settings.flip,
        version=transform.VERSION,
    )


def parse_transform(identity: Identity) -> transform.Transform:
    """Return the transform that a cache's identity describes."""
    preprocessing = identity.preprocessing
    return transform.Transform(
        resolution=preprocessing.resolution,
        buckets=preprocessing.buckets or (),
        multiple_of=preprocessing.multiple_of or 0,
        min_size=preprocessing.min_size,
        interpolation=preprocessing.interpolation,
        crop=preprocessing.crop,
        flip=preprocessing.flip,
        seed=identity.seed,
    )


def parse_schema(info: CacheInfo) -> OutputSchema:
    """Return the layout of a cache's files."""
    return OutputSchema(
        container=info.identity.container,
        store=info.identity.store,
        columns=PassthroughColumns.from_info(info.columns),
    )


def choose_rows_per_part(config: AutoencoderKLConfig, resolution: int, dtype: str, store: str) -> int:
    """Return as many rows as fit 256 MiB, and at most 4,096."""
    latent = (
        (2 if store == "moments" else 1)
        * config.latent_channels
        * (resolution // config.downscale) ** 2
        * _VALUE_BYTES[dtype]
    )
    return max(1, min(MAX_ROWS_PER_PART, MAX_PART_BYTES // latent))


def read_cache_json(cache: Folder) -> CacheInfo | None:
    """Return the content of cache.json, or None if there is no cache yet.

    Raises CacheError for a folder that holds something else, for a format that this version does not support, and for a
    field that is missing or has another type.
    """
    data = cache.read_if_exists(NAME)
    if data is None:
        if cache.is_empty():
            return None
        data = cache.read_if_exists(NAME)  # another job may have created it just now
    if data is None:
        raise CacheError(f"{cache.url} is not a latentmill cache: it is not empty, and has no {NAME}")
    return parse_cache_json(data, cache.url)


def create_or_load(cache: Folder, wanted: CacheInfo) -> CacheInfo:
    """Create cache.json with this content, or return the content of the existing one.

    Raises IdentityError, with the first field that differs, if the existing one has another identity.
    """
    cache.create(NAME, encode_cache_json(with_checksum(wanted.to_dict())))
    existing = read_cache_json(cache)
    if existing is None:
        raise CacheError(f"{cache.url_of(NAME)} was created and is gone again")
    check_same_identity(cache.url, existing.identity, wanted.identity)
    return existing


def encode_cache_json(content: Mapping[str, Any]) -> bytes:
    """Return the bytes of a cache.json with this content."""
    return indented_json(content, ensure_ascii=False)


def check_same_identity(url: str, existing: Identity, wanted: Identity) -> None:
    """Raise IdentityError unless the two identities are equal."""
    for field, cache_value, job_value in _find_differences(existing.to_dict(), wanted.to_dict(), ""):
        raise IdentityError(
            f"the cache {url} was made with {field}={_shorten(cache_value)}, this job has {field}="
            f"{_shorten(job_value)}; use its setting, or another --to"
        )


def _find_differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str) -> list[tuple[str, Any, Any]]:
    differences: list[tuple[str, Any, Any]] = []
    for key in [*b, *(key for key in a if key not in b)]:
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            differences += _find_differences(left, right, f"{prefix}{key}.")
        elif left != right:
            differences.append((prefix + key, left, right))
    return differences


def _shorten(value: Any) -> str:
    text = str(value)
    return text[:12] + "..." if len(text) == 64 and text.isalnum() else text
