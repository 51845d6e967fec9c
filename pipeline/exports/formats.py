"""The formats that a cache can be exported to: what each stores, and what it needs of a cache."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from latentmill.scaling import Scaling
from pipeline.exports import ai_toolkit, lightningdit, mds, repa, row_files, sd_scripts, shards
from pipeline.exports.job import ExportJob, OutFile, Row, Space

SD = Scaling.from_constants(0.18215)
SDXL = Scaling.from_constants(0.13025)
SD3 = Scaling.from_constants(1.5305, 0.0609)
FLUX = Scaling.from_constants(0.3611, 0.1159)


def no_files(job: ExportJob, entries: Sequence[Any]) -> Iterator[tuple[str, bytes]]:
    """Yield nothing: the format has no files of the whole export."""
    yield from ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportFormat:
    """A format.

    program: the trainer that reads it.
    space: whether it stores raw latents or model latents; dtype: of these, None for that of the cache.
    scaling: the constants that the trainer has in its own code, so that a cache of another VAE would train wrongly.
    channels: of the raw latents; patch: of the VAE's scaling. None: any.
    prepared: whether images must have had their size before, because the trainer's names depend on how it resizes
    them. moments, one_size: whether the cache must have these. labels, mirrors: the same, for the label and the latent
    of the mirrored image. captions: whether captions are written if the cache has them. all_columns: whether it has all
    columns. plain_scaling: the trainer's rule has one factor and one shift, and no means of channels.
    grid: the multiple of pixels to which the trainer rounds the sides of an image, if images have several sizes.
    convert: a row as the format stores it; raises RefusedRow. pack: the files of a part's rows, and its number. finish:
    the files of the whole export, from the entries of all others. per_row: whether each row has its own files. is_flat:
    whether all are in one folder.
    options: of these functions.
    """

    program: str
    space: Space
    dtype: torch.dtype | None
    convert: Callable[[Row, ExportJob], Any]
    pack: Callable[[Iterator[Any], ExportJob, int], Iterator[OutFile]]
    finish: Callable[[ExportJob, Sequence[Any]], Iterator[tuple[str, bytes]]] = no_files
    per_row: bool = False
    is_flat: bool = False
    scaling: Scaling | None = None
    channels: int | None = None
    patch: tuple[int, int] | None = (1, 1)
    prepared: bool = False
    moments: bool = False
    labels: Literal["needed", "if present", "never"] = "never"
    mirrors: Literal["needed", "if present", "never"] = "never"
    one_size: bool = False
    all_columns: bool = False
    captions: bool = False
    plain_scaling: bool = False
    grid: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def sd_scripts_format(
    suffix: str, scaling: Scaling, channels: int, space: Space = "raw", size_in_keys: bool = False
) -> ExportFormat:
    """Return sd-scripts' format for one family of models. It multiplies raw latents itself, except for FLUX."""
    return ExportFormat(
        program="sd-scripts",
        space=space,
        dtype=torch.float32,
        convert=sd_scripts.convert,
        pack=row_files.pack,
        per_row=True,
        scaling=scaling,
        channels=channels,
        mirrors="if present",
        captions=True,
        grid=64,
        options={"suffix": suffix, "size_in_keys": size_in_keys},
    )


def musubi_format(
    architecture: str, architecture_name: str, scaling: Scaling | None = None, flux2: bool = False
) -> ExportFormat:
    """Return musubi-tuner's format for one model. Z-Image is scaled in training; FLUX.2's encoder scales by itself."""
    return ExportFormat(
        program="musubi-tuner",
        space="model" if flux2 else "raw",
        dtype=torch.float32,
        convert=row_files.convert_musubi,
        pack=row_files.pack,
        per_row=True,
        is_flat=True,
        scaling=scaling,
        channels=32 if flux2 else 16,
        patch=(2, 2) if flux2 else (1, 1),
        grid=16,
        options={"architecture": architecture, "architecture_name": architecture_name, "is_flux2": flux2},
    )


def ai_toolkit_format(latent_space: str, scaling: Scaling, channels: int) -> ExportFormat:
    """Return ai-toolkit's format for one family of models. latent_space: as the trainer names it."""
    return ExportFormat(
        program="ai-toolkit",
        space="model",
        dtype=None,
        convert=ai_toolkit.convert,
        pack=row_files.pack,
        per_row=True,
        scaling=scaling,
        channels=channels,
        prepared=True,
        grid=64,
        options={"latent_space": latent_space},
    )


FORMATS: dict[str, ExportFormat] = {
    "lightningdit": ExportFormat(
        program="LightningDiT",
        space="raw",
        dtype=torch.float32,
        convert=lightningdit.convert,
        pack=lightningdit.pack,
        finish=lightningdit.finish,
        patch=None,
        labels="needed",
        mirrors="needed",
        one_size=True,
    ),
    "sd-scripts-sd": sd_scripts_format("_sd", SD, 4),
    "sd-scripts-sdxl": sd_scripts_format("_sdxl", SDXL, 4),
    "sd-scripts-sd3": sd_scripts_format("_sd3", SD3, 16, size_in_keys=True),
    "sd-scripts-flux": sd_scripts_format("_flux", FLUX, 16, space="model", size_in_keys=True),
    "musubi-z-image": musubi_format("zi", "z_image", FLUX),
    "musubi-flux2-dev": musubi_format("f2d", "flux_2_dev", flux2=True),
    "musubi-flux2-klein-4b": musubi_format("f2k4b", "flux_2_klein_4b", flux2=True),
    "musubi-flux2-klein-9b": musubi_format("f2k9b", "flux_2_klein_9b", flux2=True),
    "simpletuner": ExportFormat(
        program="SimpleTuner",
        space="model",
        dtype=None,
        convert=row_files.convert_simpletuner,
        pack=row_files.pack,
        per_row=True,
        patch=None,
        plain_scaling=True,
    ),
    "ai-toolkit-sdxl": ai_toolkit_format("sdxl", SDXL, 4),
    "ai-toolkit-sd3": ai_toolkit_format("sd3", SD3, 16),
    "ai-toolkit-flux": ai_toolkit_format("flux1", FLUX, 16),
    "repa": ExportFormat(
        program="REPA",
        space="raw",
        dtype=torch.float32,
        convert=repa.convert,
        pack=row_files.pack,
        finish=repa.finish,
        per_row=True,
        scaling=SD,
        channels=4,
        moments=True,
        labels="needed",
        one_size=True,
    ),
    "mds": ExportFormat(
        program="MosaicML Streaming",
        space="model",
        dtype=torch.float16,
        convert=mds.convert,
        pack=mds.pack,
        finish=mds.finish,
        patch=None,
        labels="if present",
        captions=True,
    ),
    "safetensors": ExportFormat(
        program="any program",
        space="raw",
        dtype=None,
        convert=shards.convert,
        pack=shards.pack,
        all_columns=True,
        patch=None,
    ),
}
