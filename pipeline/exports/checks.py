"""Whether a cache has what a format needs. Each refusal names the cache, the format, and the option that helps."""

import math
from collections.abc import Collection, Iterable, Sequence

import torch

from latentmill.scaling import Scaling
from pipeline.cache.reader import Cache
from pipeline.errors import UsageError
from pipeline.exports.formats import FORMATS, ExportFormat
from pipeline.exports.job import ExportJob
from pipeline.exports.manifest import FOLDER
from pipeline.storage.folder import Folder
from pipeline.wording import count_noun

CAPTION, LABEL = "txt", "label"  # the columns that are used unless the user names others
SHOWN = 5  # sizes in a message

Size = tuple[int, int]  # height, width


def make_job(
    cache: Cache, name: str, sizes: Sequence[Size], captions: str = "", labels: str = "", with_shard: bool = False
) -> ExportJob:
    """Return the settings of an export. Raises UsageError if the cache lacks what the format needs.

    sizes: of the images in the cache, in pixels. captions, labels: the columns that the user named.
    """
    form = FORMATS[name]
    columns = cache.overlays.add_to(cache.info.columns.read_schema()).names
    for flag, column, is_used in (
        ("--caption-column", captions, form.captions),
        ("--label-column", labels, form.labels != "never"),
        ("--with-shard", with_shard, form.per_row),
    ):
        if column and not is_used:
            raise UsageError(f"{flag} does not apply to --format {name}; leave it out")
        if isinstance(column, str) and column and column not in columns:
            raise UsageError(f"{flag} {column}: {describe_columns(cache, columns)}")
    check_scaling(cache, name, form)
    check_rows(cache, name, form, columns, labels or LABEL)
    check_sizes(cache, name, form, sizes)
    default_caption = CAPTION if form.captions and CAPTION in columns else ""
    default_label = LABEL if form.labels != "never" and LABEL in columns else ""
    has_flipped = cache.info.identity.preprocessing.flip == "both" and form.mirrors != "never"
    return ExportJob(
        cache=cache,
        space=form.space,
        dtype=form.dtype or getattr(torch, cache.info.identity.dtype),
        caption_column=captions or default_caption,
        label_column=labels or default_label,
        with_shard=with_shard,
        is_flat=form.is_flat,
        has_flipped=has_flipped,
        options=form.options,
    )


def describe_columns(cache: Cache, columns: Sequence[str]) -> str:
    """Return which passed-through columns a cache has."""
    return (
        f"the cache {cache.folder.url} has the columns {', '.join(columns)}"
        if columns
        else (f"the cache {cache.folder.url} has no columns of its sources")
    )


def refuse(cache: Cache, name: str, missing: str, remedy: str) -> UsageError:
    """Return the error of a cache that lacks something."""
    return UsageError(f"the cache {cache.folder.url} cannot be exported with --format {name}: {missing}; {remedy}")


def check_scaling(cache: Cache, name: str, form: ExportFormat) -> None:
    """Raise UsageError if the latents are not of the VAE that the trainer has in its own code."""
    config, scaling = cache.config, cache.scaling
    if form.channels not in (None, config.latent_channels):
        problem = f"its latents have {config.latent_channels} channels, but {form.program} expects {form.channels}"
        raise refuse(cache, name, problem, "choose the format of the model that the VAE belongs to")
    if form.patch not in (None, scaling.patch):
        what = "packs patches of positions into channels" if form.patch == (1, 1) else "does not pack patches"
        raise refuse(cache, name, f"its VAE {what}", "choose the format of the model that the VAE belongs to")
    if form.scaling not in (None, scaling):
        ours, theirs = describe_scaling(scaling), describe_scaling(form.scaling)
        problem = f"its VAE has {ours}, but {form.program} uses {theirs} for this model"
        raise refuse(cache, name, problem, "choose the format of the model that the VAE belongs to")
    if form.plain_scaling and scaling.patch == (1, 1) and len(scaling.shift) > 1:
        problem = f"its VAE has a mean of each channel, which {form.program} does not subtract"
        raise refuse(cache, name, problem, "let the trainer make its own cache for this VAE")


def describe_scaling(scaling: Scaling | None) -> str:
    """Return the constants of a rule in words."""
    if scaling is None or len(scaling.scale) > 1:
        return "constants for each channel"
    return f"the scaling factor {scaling.scale[0]:g} and the shift {scaling.shift[0]:g}"


def check_rows(cache: Cache, name: str, form: ExportFormat, columns: Sequence[str], labels: str) -> None:
    """Raise UsageError if the rows lack moments, labels or mirrored latents."""
    identity = cache.info.identity
    if form.moments and identity.store != "moments":
        raise refuse(
            cache,
            name,
            f"it has only the {identity.store} of each posterior, not its moments",
            "encode the images into a new cache with --store moments",
        )
    if form.labels == "needed" and labels not in columns:
        raise refuse(
            cache,
            name,
            f"it has no column '{labels}' with the number of each image's class",
            "name another column with --label-column, or encode the images into a new cache with --label-from-folder",
        )
    if form.mirrors == "needed" and identity.preprocessing.flip != "both":
        raise refuse(
            cache,
            name,
            "it has no latents of the mirrored images",
            "encode the images into a new cache with --flip both",
        )


def check_overlays(cache: Cache, columns: Collection[str], files: Iterable[str]) -> None:
    """Raise UsageError if added columns are of other parts only, so that rows would lack them.

    columns: those that are exported. files: the parts.
    """
    for version, names in cache.overlays.group_by_version(columns):
        if others := set(files).difference(version.files["file"].to_pylist()):
            raise UsageError(
                f"version {version.number} of the columns of {cache.folder.url} ({', '.join(names)}) does not cover "
                f"{count_noun(len(others), 'part')}, such as {min(others)}; run latentmill annotate again"
            )


def check_folder(out: Folder, name: str) -> None:
    """Raise UsageError if the folder has the export to another format, and the files of both would be mixed up.

    Formats with files per image may share a folder. Programs that read files of many rows read all in the folder.
    """
    _, others = out.list_entries(FOLDER)
    for other in sorted(FORMATS.keys() & set(others) - {name}):
        if not (FORMATS[name].per_row and FORMATS[other].per_row):
            raise UsageError(f"{out.url} has an export with --format {other}; export to an empty folder")


def check_sizes(cache: Cache, name: str, form: ExportFormat, sizes: Sequence[Size]) -> None:
    """Raise UsageError if the trainer would put images into buckets of other sizes than their latents have."""
    if form.prepared and cache.info.identity.preprocessing.transform != "none":
        raise refuse(
            cache,
            name,
            f"its images were resized, and {form.program} names its files by how it resizes images itself",
            "resize the images first, and encode them into a new cache with --transform none",
        )
    if len(sizes) < 2 and not form.prepared:
        return
    if form.one_size:
        raise refuse(
            cache,
            name,
            f"its images have {len(sizes)} sizes ({show_sizes(sizes)}), but {form.program} reads one size",
            "encode the images into a new cache with --resolution and without buckets",
        )
    step = form.grid
    if step is None or is_own_recipe(cache, form):
        return
    if others := [size for size in sizes if size[0] % step or size[1] % step]:
        remedy = f"--buckets and --multiple-of {step}"
        if form.prepared:
            remedy = f"images whose sides are multiples of {step}"
        elif form.program == "sd-scripts":
            remedy = "--transform sd-scripts"
        raise refuse(
            cache,
            name,
            f"{form.program} derives buckets in steps of {step} pixels, and images of {show_sizes(others)} do not fit",
            f"encode the images into a new cache with {remedy}",
        )


def is_own_recipe(cache: Cache, form: ExportFormat) -> bool:
    """Whether the images were prepared exactly as the trainer does it, so that its own rule gives their sizes."""
    return form.program == "sd-scripts" and cache.info.identity.preprocessing.transform == "sd-scripts"


def show_sizes(sizes: Sequence[Size]) -> str:
    """Return some sizes as text, width before height as trainers have it."""
    shown = ", ".join(f"{width}x{height}" for height, width in sizes[:SHOWN])
    return shown + (f" and {len(sizes) - SHOWN} more" if len(sizes) > SHOWN else "")


def parse_sizes(names: Iterable[str]) -> list[Size]:
    """Return the sizes of buckets "HxW", sorted."""
    return sorted({(int(height), int(width)) for height, width in (name.split("x") for name in names)})


def list_settings(cache: Cache, name: str, sizes: Sequence[Size]) -> dict[str, object]:
    """Return the settings of the trainer's data set with which it finds the files and forms the same buckets."""
    form, recipe = FORMATS[name], cache.info.identity.preprocessing
    if form.grid is None or not sizes:
        return {}
    if is_own_recipe(cache, form):
        steps: dict[str, object] = {
            "enable_bucket": True,
            "bucket_reso_steps": recipe.multiple_of,
            "resolution": recipe.resolution,
        }
        if recipe.no_upscale:
            return {**steps, "bucket_no_upscale": True}
        return {**steps, "min_bucket_reso": recipe.min_bucket_reso, "max_bucket_reso": recipe.max_bucket_reso}
    side = math.isqrt(max(height * width for height, width in sizes) - 1) + 1  # a square of at least the largest area
    if form.prepared:
        return {"resolution": side, "bucket_tolerance": form.grid, "cache_latents_to_disk": True}
    if len(sizes) == 1:
        ((height, width),) = sizes
        return {"enable_bucket": False, "resolution": [width, height]}
    settings: dict[str, object] = {"enable_bucket": True, "bucket_no_upscale": True, "resolution": side}
    return {**settings, "bucket_reso_steps": form.grid} if form.program == "sd-scripts" else settings
