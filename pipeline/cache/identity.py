"""The identity of a cache: everything that decides its bytes, written once to cache.json and never changed.

A job whose identity differs from the cache's is refused with the options named. `latentmill.cache_info` has the fields;
here they are written and compared. `preprocessing` makes them from a job's settings.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from latentmill.cache_info import (
    FORMAT,
    NAME,
    CacheInfo,
    Identity,
    Preprocessing,
    SourceRules,
    VaeInfo,
    parse_cache_json,
)
from latentmill.loading.layout import VALUE_BYTES
from pipeline.canonical_json import indented_json, with_checksum
from pipeline.errors import CacheError, IdentityError, NoCacheError
from pipeline.formats.schema import OutputSchema, PassthroughColumns
from pipeline.storage.folder import Folder
from pipeline.wording import to_flag
from vae import AutoencoderKLConfig, VaeConfig, scaling

__all__ = ["FORMAT", "NAME", "CacheInfo", "Identity", "Preprocessing", "SourceRules"]

MAX_ROWS_PER_PART = 4096
MAX_PART_BYTES = 256 << 20

# Fields of a model's configuration that do not change its raw latents.
_NOT_RAW = frozenset(
    {"scaling_factor", "shift_factor", "latents_mean", "latents_std", "sample_size", "force_upcast"}
    | {"up_block_types", "out_channels", "use_post_quant_conv", "decoder_block_out_channels"}
    | {"batch_norm_eps", "batch_norm_momentum", "patch_size"}
)
CONFIG_FIELDS = frozenset(AutoencoderKLConfig.__dataclass_fields__) - _NOT_RAW
_SIZE_SETTINGS = ("multiple_of", "min_bucket_reso", "max_bucket_reso")


def select_raw_fields(config: VaeConfig) -> dict[str, Any]:
    """Return the fields of a model's configuration that change raw latents."""
    return {key: value for key, value in config.to_dict().items() if key not in _NOT_RAW}


def has_constants_of_its_vae(vae: VaeInfo, config: VaeConfig) -> bool:
    """Return whether the scaling constants in cache.json can be those of the VAE with this configuration."""
    return scaling.fits(config, vae.constants)


def parse_schema(info: CacheInfo) -> OutputSchema:
    """Return the layout of a cache's files."""
    return OutputSchema(
        container=info.identity.container,
        store=info.identity.store,
        columns=PassthroughColumns.from_info(info.columns),
        has_truncated=info.identity.preprocessing.allow_truncated,
        has_flipped=info.identity.preprocessing.flip == "both",
    )


def choose_rows_per_part(config: VaeConfig, resolution: int, dtype: str, store: str, flip: str = "none") -> int:
    """Return as many rows as fit 256 MiB, and at most 4,096."""
    latents = (
        (2 if store == "moments" else 1)
        * (2 if flip == "both" else 1)
        * config.latent_channels
        * (resolution // config.downscale) ** 2
        * VALUE_BYTES[dtype]
    )
    return max(1, min(MAX_ROWS_PER_PART, MAX_PART_BYTES // latents))


def read_cache_json(cache: Folder) -> CacheInfo | None:
    """Return the content of cache.json, or None if there is no cache yet.

    Raises NoCacheError for a folder that holds something else, and CacheError for a format that this version does not
    support, and for a field that is missing or has another type.
    """
    data = cache.read_if_exists(NAME)
    if data is None:
        if cache.is_empty():
            return None
        data = cache.read_if_exists(NAME)  # another job may have created it just now
    if data is None:
        raise NoCacheError(f"{cache.url} is not a latentmill cache: it is not empty, and has no {NAME}")
    return parse_cache_json(data, cache.url)


def create_or_load(cache: Folder, wanted: CacheInfo) -> CacheInfo:
    """Create cache.json with this content, or return the content of the existing one.

    Raises IdentityError, with the options that differ, if the existing one has another identity.
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
    """Raise IdentityError, with the options that differ, unless the two identities are equal."""
    if existing.sha256 == wanted.sha256:
        return
    cache_settings, job_settings = describe_settings(existing), describe_settings(wanted)
    differing = [name for name, text in cache_settings.items() if job_settings.get(name, text) != text]
    explained: set[str] = set()  # by another difference
    if "weights" in differing:
        explained |= {name for name in differing if name.startswith("config.")}
    if "transform" in differing:
        explained |= {"size", "interpolation", "crop", "jpeg_decode", "no_upscale", "version", *_SIZE_SETTINGS}
    if {"size", *_SIZE_SETTINGS} & set(differing):
        explained.add("grid")
    differing = [name for name in differing if name not in explained]
    raise IdentityError(
        f"the cache {url} was made with {' and '.join(cache_settings[name] for name in differing)}, this command has "
        f"{' and '.join(job_settings[name] for name in differing)}; use the settings of the cache, or another --to"
    )


def describe_settings(identity: Identity) -> dict[str, str]:
    """Return the settings of an identity by name, each as the option that sets it if there is one.

    Every field is described.
    """
    settings, preprocessing = identity.to_dict(), identity.preprocessing
    names = sorted(CONFIG_FIELDS | settings["config"].keys())  # a cache of another version may lack some
    return {
        "weights": f"a VAE whose weights have the sha256 {identity.weights:.12}...",
        **{f"config.{name}": f"a VAE that has {name} {settings['config'].get(name)}" for name in names},
        **_describe_sizes(preprocessing),
        **_format_options(asdict(preprocessing), ("min_size", "jpeg_decode", "crop", "flip", "exif", "alpha", "color")),
        "max_aspect": f"--max-aspect {preprocessing.max_aspect or 0:g}",
        "allow_truncated": f"{'' if preprocessing.allow_truncated else 'no '}--allow-truncated",
        "min_std": f"--min-std {preprocessing.min_std:g}",
        **_format_options(settings, ("store", "dtype", "precision", "rows_per_part", "seed")),
        "tile_above": f"--tile-above {identity.tile_above or 0}",
        "container": f"--format {identity.container}",
        "columns": "--columns all" if identity.columns is None else f"--columns '{','.join(identity.columns)}'",
        "image_column": f"--image-column {identity.image_column}" if identity.image_column else "no --image-column",
        "key_column": f"--key-column {identity.key_column}" if identity.key_column else "no --key-column",
        **_describe_source_rules(identity.sources),
        "version": f"version {preprocessing.version} of the preprocessing",
    }


def _describe_source_rules(rules: SourceRules) -> dict[str, str]:
    """Return the rules for sources by name, each as the option that sets it."""
    globs = {"include": rules.include, "exclude": rules.exclude}
    return {
        "caption_extensions": f"--caption-extensions {','.join(rules.caption_extensions)}",
        "text_encoding": f"--text-encoding {rules.text_encoding}",
        **{name: " ".join(f"--{name} '{glob}'" for glob in given) or f"no --{name}" for name, given in globs.items()},
        "classes": "no --label-from-folder" if rules.classes is None else "--label-from-folder",
    }


def _describe_sizes(preprocessing: Preprocessing) -> dict[str, str]:
    """Return the settings of the recipe and its sizes, as the options that set them. What it lacks is left out."""
    is_sd_scripts = preprocessing.transform == "sd-scripts"
    has_grid = preprocessing.transform == "center-crop" and preprocessing.buckets
    flags = {
        "size": "--buckets" if has_grid else "--resolution",
        "multiple_of": "--bucket-reso-steps" if is_sd_scripts else "--multiple-of",
        "min_bucket_reso": "--min-bucket-reso",
        "max_bucket_reso": "--max-bucket-reso",
        "interpolation": "--interpolation",
    }
    values = asdict(preprocessing) | {"size": preprocessing.resolution}
    no_upscale = "--bucket-no-upscale" if is_sd_scripts else "--no-upscale"
    grid = ", ".join(f"{height}x{width}" for height, width in preprocessing.buckets or ())
    return {
        "transform": f"--transform {preprocessing.transform}",
        **{name: f"{flag} {values[name]}" for name, flag in flags.items() if values[name] is not None},
        **({"grid": f"the buckets {grid}"} if grid else {}),
        "no_upscale": no_upscale if preprocessing.no_upscale else f"no {no_upscale}",
    }


def _format_options(settings: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Return these settings as the options of the same names."""
    return {name: f"{to_flag(name)} {settings[name]}" for name in names}
