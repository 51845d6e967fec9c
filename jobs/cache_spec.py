"""The cache that the options describe: completed from an existing cache, checked, and written as its cache.json."""

import codecs
import dataclasses
from collections.abc import Mapping, Set
from typing import Any, Literal

from jobs.common_options import ALL, parse_columns
from jobs.encode_options import EncodeOptions
from jobs.messages import log_note
from jobs.resources import ResourcePlan, check_jax_settings
from jobs.transform_options import check_sizes, inherit_recipe, make_transform
from latentmill.cache_info import ColumnInfo, ComputeInfo, SourceRules, VaeInfo
from pipeline.cache import identity, parts, runs
from pipeline.cache.identity import CacheInfo, Identity
from pipeline.cache.preprocessing import describe_transform
from pipeline.cache.runs import get_library_versions
from pipeline.encoder import ComputeConfig
from pipeline.errors import UsageError
from pipeline.formats.schema import OutputSchema, PassthroughColumns
from pipeline.images.near_empty import MAX_STD
from pipeline.readers.labels import LABEL_COLUMNS
from pipeline.records import IMAGE_EXTENSIONS, Form
from pipeline.sources.columns import RESERVED
from pipeline.storage.folder import Folder
from pipeline.tuning import Candidates
from pipeline.weights import Vae
from pipeline.wording import to_flag

INPUT_EXTENSIONS = IMAGE_EXTENSIONS | {"tar", "parquet"}


def inherit_unset(options: EncodeOptions, given: set[str], existing: Identity) -> EncodeOptions:
    """Return the options. Options that the user did not set have the values of the existing cache's identity.

    given: the names of the options that the user set.
    """
    preprocessing = existing.preprocessing
    inherited: dict[str, Any] = {
        "min_size": preprocessing.min_size,
        "max_aspect": preprocessing.max_aspect or 0.0,
        "min_std": preprocessing.min_std,
        "flip": preprocessing.flip,
        "exif": preprocessing.exif,
        "alpha": preprocessing.alpha,
        "color": preprocessing.color,
        "allow_truncated": preprocessing.allow_truncated,
        "store": existing.store,
        "dtype": existing.dtype,
        "precision": existing.precision,
        "rows_per_part": existing.rows_per_part,
        "seed": existing.seed,
        "tile_above": existing.tile_above or 0,
        "format": existing.container,
        "columns": ALL if existing.columns is None else ",".join(existing.columns),
        "image_column": existing.image_column or "",
        "key_column": existing.key_column or "",
        "caption_extensions": ",".join(existing.sources.caption_extensions),
        "text_encoding": existing.sources.text_encoding,
        "include": existing.sources.include,
        "exclude": existing.sources.exclude,
        "label_from_folder": existing.sources.classes is not None,
    }
    inherited |= inherit_recipe(options, given, preprocessing)
    automatic = ("precision", "rows_per_part", "interpolation", "exif", "alpha", "color")
    given = given - {name for name in automatic if getattr(options, name) in ("auto", 0)}
    return dataclasses.replace(options, **{name: value for name, value in inherited.items() if name not in given})


def check_options(options: EncodeOptions, given: set[str], vae: Vae) -> None:
    """Raise UsageError for values that cannot work with this VAE or with each other.

    given: the names of the options that the user set.
    """
    check_sizes(options, given, vae.config.side_multiple)
    if options.tile_above % (4 * vae.config.downscale):
        raise UsageError(f"--tile-above {options.tile_above} is not a multiple of {4 * vae.config.downscale}")
    if options.format == "webdataset" and options.dtype == "bfloat16":
        raise UsageError(
            "--format webdataset stores numpy arrays, which do not support bfloat16: use float16 or float32"
        )
    if options.to.startswith("memory://") and options.workers != "0":
        raise UsageError("memory:// is the memory of one process: use it with --workers 0")
    if not 0 <= options.max_reject_rate <= 1:
        raise UsageError(f"--max-reject-rate must be from 0 to 1, such as 0.05 for 5%, not {options.max_reject_rate:g}")
    if not 0 <= options.min_std <= MAX_STD:
        raise UsageError(
            f"--min-std must be from 0 to {MAX_STD}, the highest standard deviation, not {options.min_std:g}"
        )
    counts = ("batch_size", "open_workers", "remote_openers", "rows_per_part", "min_size", "max_shards", "tile_above")
    for name in counts:
        if getattr(options, name) < 0:
            raise UsageError(f"{to_flag(name)} must not be negative")
    if options.max_aspect and not options.max_aspect >= 1:
        text = f"at least 1, not {options.max_aspect:g}"
        raise UsageError(f"--max-aspect is the longer side divided by the shorter one: {text}")


def check_input_options(options: EncodeOptions, kinds: Set[str], has_metadata: bool, is_new: bool) -> None:
    """Raise UsageError for an option that has no effect on these inputs.

    kinds: of their units. has_metadata: whether there is metadata of images. is_new: whether the cache is new. If not,
    options that are part of its identity are not checked.
    """
    if options.image_root and "manifest" not in kinds:
        raise UsageError("--image-root is for manifests, and the sources have none; leave it out")
    if not is_new:
        return
    tables = kinds & {"parquet", "arrow", "manifest"}
    if options.image_column and not (tables or has_metadata or kinds & {"tar", "zip"}):
        text = "is for tars, zips, Parquet and Arrow files, manifests and metadata, and there are none; leave it out"
        raise UsageError(f"--image-column {text}")
    if options.key_column and not tables:
        text = "is for Parquet files, Arrow files and manifests, and the sources have none; leave it out"
        raise UsageError(f"--key-column {text}")
    labels, wanted = LABEL_COLUMNS.names, parse_columns(options.columns)
    if options.label_from_folder and wanted is not None and not set(labels) & set(wanted):
        text = f"makes the columns {' and '.join(labels)}, and --columns has neither: add {labels[0]} to it"
        raise UsageError(f"--label-from-folder {text}")


def make_source_rules(options: EncodeOptions, classes: tuple[str, ...] | None = None) -> SourceRules:
    """Return how the samples of the sources and their texts are found. Raises UsageError for an invalid option."""
    names = (name.strip().lstrip(".").lower() for name in options.caption_extensions.split(","))
    captions = tuple(dict.fromkeys(filter(None, names)))
    for name in captions:
        if name in RESERVED | INPUT_EXTENSIONS:
            raise UsageError(f"--caption-extensions: .{name} is not an extension of text files; leave it out")
    try:
        encoding = codecs.lookup(options.text_encoding).name
        "text".encode(encoding)
    except (LookupError, ValueError):
        raise UsageError(
            f"--text-encoding: there is no encoding {options.text_encoding}; use a name of Python's, such as utf-8, "
            "utf-16, cp1252, shift_jis or gb18030"
        ) from None
    for glob in (*options.include, *options.exclude):
        if not glob.strip("/"):
            raise UsageError(f"--include and --exclude need globs such as '*_mask.png', not '{glob}'")
    return SourceRules(
        caption_extensions=captions,
        text_encoding=encoding,
        include=options.include,
        exclude=options.exclude,
        classes=classes,
    )


def describe_cache(
    options: EncodeOptions,
    vae: Vae,
    resources: ResourcePlan,
    existing: CacheInfo | None,
    columns: PassthroughColumns,
    classes: tuple[str, ...] | None = None,
) -> CacheInfo:
    """Return the cache.json that the options describe.

    existing: the cache.json of the existing cache. Only a new cache needs the device, and so a connection to Ray.
    classes: of `--label-from-folder`.
    """
    precision = resolve_precision(options, vae, resources)
    if resources.backend == "jax":
        check_jax_settings(precision, options.encoder_form, options.tile_above)
    transform = make_transform(options, vae.config.side_multiple)
    wanted = Identity(
        weights=vae.sha256,
        config=identity.select_raw_fields(vae.config),
        preprocessing=describe_transform(transform),
        store=options.store,
        dtype=options.dtype,
        precision=precision,
        tile_above=options.tile_above or None,
        rows_per_part=options.rows_per_part
        or identity.choose_rows_per_part(vae.config, transform.resolution, options.dtype, options.store, options.flip),
        seed=options.seed,
        container=options.format,
        columns=parse_columns(options.columns),
        image_column=options.image_column or None,
        key_column=options.key_column or None,
        sources=make_source_rules(options, classes),
    )
    if existing is not None:
        note_columns(identity.parse_schema(existing).columns, columns)
        note_constants(existing.vae, vae)
        return dataclasses.replace(existing, identity=wanted)
    layout = OutputSchema(
        container=options.format,
        store=options.store,
        columns=columns,
        has_flipped=options.flip == "both",
        has_truncated=options.allow_truncated,
    )
    return CacheInfo(
        format=identity.FORMAT,
        identity=wanted,
        identity_sha256=wanted.sha256,
        compute=describe_compute(options, resources, precision),
        vae=VaeInfo(
            reference=vae.reference,
            config={"_class_name": vae.config.class_names()[0], **vae.config.to_dict()},
            **vae.constants,
        ),
        schema=tuple(ColumnInfo(**column) for column in parts.describe_schema(layout)),
        columns=columns.to_info(),
    )


def resolve_precision(options: EncodeOptions, vae: Vae, resources: ResourcePlan) -> str:
    """Return the compute precision. A VAE with force_upcast in its configuration overflows in fp16, and runs in fp32.

    auto: on CUDA GPUs fp16, which is as fast as bf16 and several times more exact, or tf32 if the VAE has force_upcast;
    otherwise fp32. Raises UsageError for tf32 on other devices.
    """
    if options.precision == "auto" and (resources.backend, resources.device) == ("torch", "cuda"):
        return "tf32" if vae.config.force_upcast else "fp16"
    if options.precision == "auto":
        return "fp32"
    if options.precision == "tf32" and resources.device != "cuda":
        raise UsageError(f"--precision tf32 is for CUDA GPUs, and this job runs on {resources.device}; use fp32")
    if options.precision == "fp16" and vae.config.force_upcast:
        log_note("the VAE's configuration has force_upcast: it is run in fp32, as it overflows in fp16 (bf16 does not)")
        return "fp32"
    return options.precision


def note_constants(existing: VaeInfo, vae: Vae) -> None:
    """Log the scaling constants in which the cache and the VAE differ. The cache's constants are kept.

    existing: the entry `vae` of cache.json.
    """
    current = VaeInfo(reference=vae.reference, config={}, **vae.constants).constants
    for name, value in existing.constants.items():
        if value != current[name]:
            difference = f"the cache has {name} {value}, the VAE {current[name]}"
            log_note(f"{difference}; the value of the cache is kept")


def note_columns(existing: PassthroughColumns, available: PassthroughColumns) -> None:
    """Log the columns of the sources that the existing cache does not have."""
    if new := [name for name in available.schema.names if name not in existing.schema.names]:
        log_note(f"skipped, because the cache was created without them: the columns {', '.join(new)}")


def describe_compute(options: EncodeOptions, resources: ResourcePlan, precision: str) -> ComputeInfo:
    """Return the entry `compute` of a new cache.json. What workers choose is None or `auto`."""
    compute = resources.compute(precision, options.batch_size, options.encoder_form)
    is_chosen = resources.candidates(options.batch_size, options.encoder_form) is not None
    return ComputeInfo(
        backend=compute.backend,
        device=compute.device,
        batch_size=options.batch_size or (None if is_chosen else compute.batch_size),
        threads=compute.threads,
        form=options.encoder_form if is_chosen else compute.form,
    )


def inherit_compute(
    recorded: ComputeInfo, backend: str, device: str, batch_size: int = 0, form: Form | Literal["auto"] = "auto"
) -> tuple[int, Form | Literal["auto"]]:
    """Return the batch size and the form of a run on a cache.

    With torch on CUDA, what is not set has the values of the cache.

    recorded: the entry `compute` of cache.json. batch_size, form: 0 and `auto` if they are not set.
    """
    if {(backend, device), (recorded.backend, recorded.device)} != {("torch", "cuda")}:
        return batch_size, form
    return batch_size or recorded.batch_size or 0, recorded.form if form == "auto" else form


def note_differences(existing: ComputeInfo, compute: ComputeConfig, candidates: Candidates | None) -> None:
    """Log the compute settings in which this run differs from the run that created the cache.

    candidates: what the workers choose; it is not compared.
    """
    current = dataclasses.asdict(compute)
    if candidates is not None:
        chosen = {"batch_size": candidates.batch_sizes, "form": candidates.forms}
        current = {name: value for name, value in current.items() if len(chosen.get(name, ())) < 2}
    for name, value in dataclasses.asdict(existing).items():
        if value not in (None, "auto") and name in current and current[name] != value:
            before, now = (_format_compute_setting(name, setting) for setting in (value, current[name]))
            log_note(f"the cache was made with {before}, this command has {now}; bits may differ by rounding")


def _format_compute_setting(name: str, value: Any) -> str:
    """Return a compute setting as the option that sets it."""
    options = {"threads": "cpus_per_worker", "form": "encoder_form"}
    return f"{to_flag(options.get(name, name))} {value}"


def note_versions(cache: Folder, run: str) -> None:
    """Log the libraries whose versions differ from earlier runs of the cache, and can change bytes.

    run: the name of this run.
    """
    current = get_library_versions()
    earlier: dict[str, set[str]] = {name: set() for name in current if name != "python"}
    for name, record in runs.read_runs(cache).items():
        versions = record.get("versions")
        if name != run and isinstance(versions, Mapping):
            for library in earlier.keys() & versions.keys():
                earlier[library] |= {str(versions[library])} - {current[library]}
    for library, others in earlier.items():
        if others:
            log_note(
                f"earlier runs of this cache had {library} {', '.join(sorted(others))}, this one has "
                f"{current[library]}; the bytes of images or files may differ"
            )
