"""What cache the options ask for: completed from the one that stands there, checked, and said as its cache.json."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.options import ALL, EncodeOptions, parse_limits
from jobs.progress import log_info
from jobs.resources import ResourcePlan
from pipeline.cache import identity, parts, runs
from pipeline.cache.identity import Identity
from pipeline.cache.runs import library_versions
from pipeline.encoder import ComputeConfig
from pipeline.errors import UsageError
from pipeline.flow import EncodeSpec
from pipeline.formats.schema import OutputSchema, PassthroughColumns
from pipeline.images import buckets
from pipeline.images.transform import Transform
from pipeline.storage.folder import Folder
from pipeline.weights import Vae

COMPUTE = ("device", "threads", "slice_size", "compile")  # what can change bits by rounding


def inherit_unset(options: EncodeOptions, given: set[str], standing: Mapping[str, Any]) -> EncodeOptions:
    """The options, those that the user left open taken from the identity of the cache that is there."""
    settings = standing["preprocessing"]
    kept = {
        **{name: settings[name] for name in ("min_size", "interpolation", "crop", "flip")},
        **{name: standing[name] for name in ("store", "dtype", "precision", "rows_per_part", "seed")},
        "tile_above": standing["tile_above"] or 0,
    }
    kept["format"] = standing["container"]
    kept["columns"] = ALL if standing["columns"] is None else ",".join(standing["columns"])
    kept |= {name: standing[name] or "" for name in ("image_column", "key_column")}
    if not given & {"resolution", "buckets", "multiple_of"}:
        if settings["buckets"]:
            kept |= {"buckets": settings["resolution"], "multiple_of": settings["multiple_of"]}
        else:
            kept |= {"resolution": settings["resolution"]}
    given = given - {name for name in ("precision", "rows_per_part") if getattr(options, name) in ("auto", 0)}
    return dataclasses.replace(options, **{name: value for name, value in kept.items() if name not in given})


def check_options(options: EncodeOptions, vae: Vae) -> None:
    """Raise UsageError for values that cannot work."""
    name = "multiple_of" if options.buckets else "resolution"
    value = getattr(options, name)
    if value < 1 or value % vae.config.downscale:
        near = max(1, round(value / vae.config.downscale)) * vae.config.downscale
        raise UsageError(
            f"--{name.replace('_', '-')} {value} is not a multiple of the VAE's factor {vae.config.downscale}; "
            f"the nearest is {near}"
        )
    if options.buckets and options.buckets < 2 * options.multiple_of:
        raise UsageError(f"--buckets {options.buckets} is less than twice --multiple-of {options.multiple_of}")
    if options.tile_above % (4 * vae.config.downscale):
        raise UsageError(f"--tile-above {options.tile_above} is not a multiple of {4 * vae.config.downscale}")
    if options.format == "webdataset" and options.dtype == "bfloat16":
        raise UsageError("--format webdataset stores numpy arrays, which know no bfloat16: use float16 or float32")
    if options.to.startswith("memory://") and options.workers != "0":
        raise UsageError("memory:// is the memory of one process: it works with --workers 0 only")
    for name in ("slice_size", "batch_size", "rows_per_part", "min_size", "max_shards", "tile_above"):
        if getattr(options, name) < 0:
            raise UsageError(f"--{name.replace('_', '-')} must not be negative")


def wanted_columns(options: EncodeOptions) -> tuple[str, ...] | None:
    """`--columns`; None for all."""
    if options.columns == ALL:
        return None
    return tuple(name.strip() for name in options.columns.split(",") if name.strip())


def describe_cache(
    options: EncodeOptions,
    vae: Vae,
    where: ResourcePlan,
    standing: Mapping[str, Any] | None,
    columns: PassthroughColumns,
) -> dict[str, Any]:
    """The cache.json that this job asks for. Only a new cache needs to know the device, and so connects to Ray."""
    precision = resolved_precision(options, vae, where)
    side = options.buckets or options.resolution
    transform = Transform(
        resolution=side,
        buckets=buckets.grid(side, options.multiple_of) if options.buckets else (),
        multiple_of=options.multiple_of if options.buckets else 0,
        min_size=options.min_size,
        interpolation=options.interpolation,
        crop=options.crop,
        flip=options.flip,
        seed=options.seed,
    )
    wanted = Identity(
        weights=vae.sha256,
        config=identity.raw_config(vae.config),
        preprocessing=identity.describe_transform(transform),
        store=options.store,
        dtype=options.dtype,
        precision=precision,
        tile_above=options.tile_above or None,
        rows_per_part=options.rows_per_part
        or identity.default_rows_per_part(vae.config, side, options.dtype, options.store),
        seed=options.seed,
        container=options.format,
        columns=wanted_columns(options),
        image_column=options.image_column or None,
        key_column=options.key_column or None,
    )
    if standing is not None:
        note_columns(identity.parse_schema(standing).columns, columns)
        note_constants(standing["vae"], vae)
        return {**standing, "identity": wanted.to_dict()}
    config = vae.config.to_dict()
    compute = where.compute(precision, options.slice_size, options.batch_size, options.compile)
    return {
        "format": identity.FORMAT,
        "identity": wanted.to_dict(),
        "identity_sha256": wanted.sha256,
        "compute": {name: value for name, value in dataclasses.asdict(compute).items() if name in COMPUTE},
        "vae": {"reference": vae.ref, "config": config, **{name: config[name] for name in identity.CONSTANTS}},
        "schema": parts.schema_as_json(OutputSchema(container=options.format, store=options.store, columns=columns)),
        "columns": columns.to_dict(),
    }


def resolved_precision(options: EncodeOptions, vae: Vae, where: ResourcePlan) -> str:
    """What is computed in. A VAE whose configuration says force_upcast overflows in fp16, and is run in fp32."""
    if options.precision == "auto":
        return "fp32" if where.device != "cuda" else "bf16"
    if options.precision == "fp16" and vae.config.force_upcast:
        log_info(
            "note: the VAE's configuration has force_upcast: it is run in fp32, as it overflows in fp16 (bf16 does not)"
        )
        return "fp32"
    return options.precision


def note_constants(standing: Mapping[str, Any], vae: Vae) -> None:
    """Say where the cache scales latents by other constants than the VAE's configuration has now: its own stay."""
    offered = vae.config.to_dict()
    for name in identity.CONSTANTS:
        if standing[name] != offered[name]:
            log_info(
                f"note: the cache has {name} {standing[name]}, the VAE's configuration {offered[name]}; the first stays"
            )


def note_columns(standing: PassthroughColumns, offered: PassthroughColumns) -> None:
    """Say what the sources have that the cache, begun before, has no place for."""
    if new := [name for name in offered.schema.names if name not in standing.schema.names]:
        log_info(f"note: left out, because the cache was begun without them: the columns {', '.join(new)}")


def note_differences(standing: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Say where this run computes otherwise than the one that made the cache."""
    for name, value in standing.items():
        if ours[name] != value:
            log_info(f"note: the cache was begun with {name}={value}, now {ours[name]}; bits may differ by rounding")


def note_versions(cache: Folder, run: str) -> None:
    """Say where earlier runs of the cache had other versions of what decides bytes. run: the name of this one."""
    ours = library_versions()
    earlier: dict[str, set[str]] = {name: set() for name in ours if name != "python"}
    for name, told in runs.read_runs(cache).items():
        theirs = told.get("versions")
        if name != run and isinstance(theirs, Mapping):
            for library in earlier:
                earlier[library] |= {str(theirs[library])} - {ours[library]} if library in theirs else set()
    for library, others in earlier.items():
        if others:
            log_info(
                f"note: earlier runs of this cache had {library} {', '.join(sorted(others))}, this one has "
                f"{ours[library]}; the bytes of images or files may differ"
            )


def make_encode_spec(
    cache: Folder,
    content: Mapping[str, Any],
    compute: ComputeConfig,
    limits: Sequence[str],
    open_threads: int,
    run: str,
    source_options: Mapping[str, Any],
) -> EncodeSpec:
    """What workers must know to encode into a cache. content: its cache.json. limits: `--input-limit`."""
    settings = content["identity"]
    return EncodeSpec(
        cache=cache,
        source_options=source_options,
        identity=content["identity_sha256"],
        transform=identity.parse_transform(settings),
        dtype=settings["dtype"],
        layout=identity.parse_schema(content),
        image_column=settings["image_column"],
        key_column=settings["key_column"],
        seed=settings["seed"],
        rows_per_part=settings["rows_per_part"],
        tile_above=settings["tile_above"],
        limits=parse_limits(limits),
        compute=compute,
        open_threads=open_threads,
        run=run,
        versions=library_versions(),
    )
