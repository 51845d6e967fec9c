"""README.md of a cache: the data-set card. It describes the cache, and has the location of data/ for `datasets`.

It also has the columns of Parquet files, so that the Hub shows them. The number of rows is only in the text: with the
numbers of a split, `datasets` refuses a cache that has grown since the card was written.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from latentmill.cache_info import Preprocessing
from latentmill.scaling import Scaling
from pipeline.cache.reader import Cache
from pipeline.formats.parquet import make_schema

NAME = "README.md"

_CARD = """\
---
configs:
- config_name: default
  data_files: data/*
  version: 0.0.{parts}
{features}---
# Latents of {rows:,} images

Made by latentmill {version}. Each row has the latent of one image, *raw*, as the VAE's encoder puts it out.

| | |
|---|---|
| VAE | `{vae}`, weights sha256 `{weights}` |
| latents | {channels} channels, 1/{downscale} of the image's height and width, {dtype}, {store} of the posterior |
| images | {images} |
| rows | {rows:,} in {parts:,} files; {rejected:,} rejected, {filtered:,} filtered, {enlarged:,} enlarged |
| digest | `{digest}` |

What a diffusion model sees is {rule}, with

    shift = {shift}
    scale = {scale}

`export LC_ALL=C; sha256sum _empty/* data/* 2>/dev/null | sha256sum` prints the digest. Rejected samples are in
`_rejects/`, with the reason of each; statistics in `stats.json`.
"""

# Arrow's names of types that `datasets` names otherwise, and those of the types that it names alike
_DTYPES = {"halffloat": "float16", "float": "float32", "double": "float64", "date32[day]": "date32"}
_SAME_DTYPE = re.compile(r"bool|u?int\d+|(large_)?(string|binary)|(timestamp|duration|time\d\d)\[.*\]|decimal128\(.*\)")


def describe_features(schema: pa.Schema) -> str:
    """Return the YAML lines that list the columns of Parquet files, as `datasets` does.

    They are empty if `datasets` has no name for a type, such as that of a map.
    """
    try:
        lines = [_to_flow_yaml({"name": field.name, **_describe_type(field.type)}) for field in schema]
    except TypeError:
        return ""
    return "".join(["dataset_info:\n  features:\n", *(f"  - {line}\n" for line in lines)])


def _to_flow_yaml(value: Mapping[str, Any]) -> str:
    """Return a value as one line of YAML. It is JSON, except that YAML does not combine two escapes to a character."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(char if " " <= char <= "~" else f"\\U{ord(char):08x}" for char in text)


def _describe_type(kind: pa.DataType) -> dict[str, Any]:
    """Return a type as a card has it. Raises TypeError if it has no name there."""
    if pa.types.is_struct(kind):
        return {"struct": [{"name": field.name, **_describe_type(field.type)} for field in kind]}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        value = _describe_type(kind.value_type)
        short = value if "list" in value or "large_list" in value else next(iter(value.values()))
        return {"large_list" if pa.types.is_large_list(kind) else "list": short}
    name = _DTYPES.get(str(kind), str(kind))
    if name not in _DTYPES.values() and not _SAME_DTYPE.fullmatch(name):
        raise TypeError(f"{kind} has no name in a card")
    return {"dtype": name}


def _describe_image_size(settings: Preprocessing) -> str:
    """Return the size and the crop of the images, in a few words."""
    cut = "cut from the middle" if settings.crop == "center" else "cut at a random place"
    mirrored = {
        "none": "",
        "random": ", half of them mirrored",
        "both": "; `latent_flipped` is the latent of the image mirrored left to right",
    }[settings.flip]
    decoded = {
        ", large JPEGs decoded at a reduced size": settings.jpeg_decode == "scaled",
        ", EXIF orientation ignored": settings.exif == "ignore",
        ", transparent pixels over black": settings.alpha == "black",
        ", alpha dropped": settings.alpha == "drop",
        ", color profiles converted to sRGB": settings.color == "srgb",
        ", truncated files accepted": settings.allow_truncated,
    }
    notes = "".join(note for note, is_so in decoded.items() if is_so) + mirrored
    if settings.transform == "none":
        return f"prepared beforehand, neither resized nor cropped{notes}"
    size, buckets = f"{settings.resolution} px", settings.buckets
    if buckets:
        size = f"one of {len(buckets)} buckets of about {size} squared"
    elif settings.transform == "sd-scripts":
        size = f"at most {size} squared, never enlarged,"
    if settings.transform != "center-crop":
        return f"resized to {size} by the recipe {settings.transform}, {cut}{notes}"
    return f"resized to {size} ({settings.interpolation}), {cut}{notes}"


def _describe_rule(scaling: Scaling) -> str:
    """Return how model latents are made, in a few words."""
    if scaling.patch == (1, 1):
        return "`(latent - shift) * scale`"
    height, width = scaling.patch
    return (
        f"`(pack(latent) - shift) * scale`. `pack` makes each patch of {height} x {width} positions one position,\n"
        f"whose channels are in the order channel, row, column. Shift and scale are per packed channel"
    )


def render_card(cache: Cache, stats: Mapping[str, Any], version: str, parts: int) -> bytes:
    """Return the card of a cache.

    stats: its stats.json. version: of the latentmill that writes it. parts: the number of files in `data/`.
    """
    identity = cache.info.identity
    shift, scale = (
        ", ".join(f"{value:g}" for value in values) for values in (cache.scaling.shift, cache.scaling.scale)
    )
    return _CARD.format(
        rows=stats["count"],
        parts=parts,
        features=describe_features(make_schema(cache.layout)) if identity.container == "parquet" else "",
        version=version,
        vae=cache.info.vae.reference,
        weights=identity.weights,
        channels=cache.config.latent_channels,
        downscale=cache.config.downscale,
        dtype=identity.dtype,
        store=identity.store,
        images=_describe_image_size(identity.preprocessing),
        rejected=sum(stats["rejected"].values()),
        filtered=sum(stats["filtered"].values()),
        enlarged=stats["enlarged"],
        digest=stats["digest"],
        rule=_describe_rule(cache.scaling),
        shift=shift,
        scale=scale,
    ).encode()
