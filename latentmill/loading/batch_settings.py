"""What a batch has: the settings, and the rules that follow from them for one cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import torch

from latentmill.cache_files import STATS, OpenCache, read_stats
from latentmill.errors import UsageError
from latentmill.loading.layout import LatentLayout
from latentmill.loading.row_groups import GEOMETRY
from latentmill.micro_conditioning import Convention
from latentmill.overlay_files import get_stored_type
from latentmill.scaling import Scaling

Sample = Literal["mode", "posterior", "moments"]
_SIZES = ("height", "width", *GEOMETRY[:-1])
BATCH_KEYS = frozenset(
    {"latents", "moments", "captions", "key", "shard", "original_size", "crop_top_left", "target_size", "time_ids"}
    | {"flipped", "valid", "epoch", "step", "bucket"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
    """What a batch has.

    columns: further columns. caption_column: the one that is `captions`; None: `txt` if the cache has it, otherwise
    captions are None. sample: of a cache of moments, "mode" (the mean; the default), "posterior" (a draw for each
    epoch) or "moments" (the moments, always raw). scale: True: model latents by the constants in cache.json.
    "dataset": (z - mean) / std by stats.json, per raw channel. False: raw latents. dtype: of floating-point tensors;
    None: as stored, which needs scale=False or moments. flip: "random" takes in each epoch, for each row, `latent` or
    `latent_flipped` of a cache with `--flip both`. conditioning: the meaning of the sizes (`latentmill.time_ids`).
    """

    columns: tuple[str, ...] = ()
    caption_column: str | None = None
    sample: Sample | None = None
    scale: bool | Literal["dataset"] = True
    dtype: torch.dtype | None = torch.float32
    flip: Literal["none", "random"] = "none"
    conditioning: Convention = "diffusers"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRules:
    """Settings that were checked against a cache.

    columns: those that a `GroupReader` must read. kinds: the numpy dtype of those that become tensors. scaling: of the
    latents; None: they stay raw. has_moments: whether the cache stores moments.
    """

    settings: BatchSettings
    layout: LatentLayout
    columns: tuple[str, ...]
    caption: str | None
    kinds: Mapping[str, Any]
    sample: Sample
    has_moments: bool
    scaling: Scaling | None


def check_settings(cache: OpenCache, settings: BatchSettings) -> BatchRules:
    """Return the rules of batches. Raises UsageError for settings that the cache does not allow, saying what it has."""
    sample = _choose_sample(cache, settings)
    schema = cache.overlays.add_to(cache.info.columns.read_schema())
    caption = settings.caption_column or ("txt" if "txt" in schema.names else None)
    names = tuple(dict.fromkeys([*settings.columns, *([caption] if caption else [])]))
    known = (*schema.names, *_SIZES)
    for name in names:
        if name not in known:
            raise UsageError(f"the cache {cache.folder.url} has no column {name}; it has {', '.join(known)}")
        if name in BATCH_KEYS and name != caption:
            raise UsageError(
                f"the column {name} has the name of an entry that each batch has; name it as caption_column"
            )
    _check_choice("flip", settings.flip, ("none", "random"))
    _check_choice("conditioning", settings.conditioning, get_args(Convention))
    if settings.flip == "random" and cache.info.identity.preprocessing.flip != "both":
        raise UsageError(
            f"flip='random' needs latents of the flipped images, which the cache {cache.folder.url} does not have; "
            "encode the images into a new one with --flip both"
        )
    if settings.dtype is not None and not (
        isinstance(settings.dtype, torch.dtype) and settings.dtype.is_floating_point
    ):
        raise UsageError(f"dtype must be a floating-point dtype of torch or None, not {settings.dtype!r}")
    kinds = {name: _choose_kind(name, schema) for name in names if name != caption}
    return BatchRules(
        settings=settings,
        layout=LatentLayout.from_info(cache.info),
        columns=names,
        caption=caption,
        kinds={name: kind for name, kind in kinds.items() if kind is not None},
        sample=sample,
        has_moments=cache.info.identity.store == "moments",
        scaling=_choose_scaling(cache, settings, sample),
    )


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise UsageError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")


def _choose_sample(cache: OpenCache, settings: BatchSettings) -> Sample:
    store = cache.info.identity.store
    _check_choice("sample", settings.sample, (None, *get_args(Sample)))
    if store == "moments" or settings.sample is None or (store, settings.sample) == ("mode", "mode"):
        return settings.sample or "mode"
    needed = "mode or moments" if settings.sample == "mode" else "moments"
    raise UsageError(
        f"sample={settings.sample!r} needs a cache that was made with --store {needed}; "
        f"{cache.folder.url} was made with --store {store}"
    )


def _choose_scaling(cache: OpenCache, settings: BatchSettings, sample: Sample) -> Scaling | None:
    _check_choice("scale", settings.scale, (True, False, "dataset"))
    if sample == "moments":
        if settings.scale == "dataset":
            raise UsageError("scale='dataset' does not apply to sample='moments', which are raw: scale what you draw")
        return None
    if settings.scale is False:
        return None
    if settings.dtype is None:
        raise UsageError("dtype=None gives latents as they are stored, so it needs scale=False; or name a dtype")
    return cache.info.scaling if settings.scale is True else _read_dataset_scaling(cache)


def _read_dataset_scaling(cache: OpenCache) -> Scaling:
    stats = read_stats(cache.folder) or {}
    if "mean" not in stats or "std" not in stats:
        raise UsageError(
            f"scale='dataset' needs {STATS}, which the cache {cache.folder.url} does not have: "
            "run the encode command to its end"
        )
    if not all(stats["std"]):
        raise UsageError(f"scale='dataset' is not possible: a channel of the cache {cache.folder.url} is constant")
    return Scaling.from_constants(1.0, latents_mean=stats["mean"], latents_std=stats["std"])


def _choose_kind(name: str, schema: pa.Schema) -> Any:
    """Return the numpy dtype of the tensors of a column; None if it stays a list."""
    if name in _SIZES:
        return np.int64
    kind = schema.field(name).type
    if pa.types.is_boolean(kind):
        return np.bool_
    if pa.types.is_integer(kind):
        return np.int64
    if pa.types.is_floating(kind):
        return np.float64 if kind == pa.float64() else np.float32
    return kind.value_type.to_pandas_dtype() if get_stored_type(kind) != kind else None
