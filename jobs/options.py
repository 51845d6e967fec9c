"""The options of each command: one frozen dataclass per command.

Flags, YAML keys, `--help` and the record of a run are derived from the fields (jobs/parsing.py).
"""

import typing
from dataclasses import dataclass
from typing import Literal

from jobs.common_options import (
    ALL,
    Common,
    existing_cache,
    input_limit,
    json_output,
    moved_source,
    recorded_vae,
    same_source,
    source_option,
    storage_option,
    verbose,
)
from jobs.encode_options import EncodeOptions
from jobs.parsing import REQUIRED, option

# The names of `pipeline.exports.formats`, which imports torch: `--help` must not take seconds.
ExportName = Literal[
    "lightningdit",
    "sd-scripts-sd",
    "sd-scripts-sdxl",
    "sd-scripts-sd3",
    "sd-scripts-flux",
    "musubi-z-image",
    "musubi-flux2-dev",
    "musubi-flux2-klein-4b",
    "musubi-flux2-klein-9b",
    "simpletuner",
    "ai-toolkit-sdxl",
    "ai-toolkit-sd3",
    "ai-toolkit-flux",
    "repa",
    "mds",
    "safetensors",
]
EXPORT_NAMES = typing.get_args(ExportName)


@dataclass(frozen=True, kw_only=True)
class PlanOptions(EncodeOptions):
    """Estimate what encode with the same settings would find, take and write. It reads a little and writes nothing."""

    to: str = option("", "path or URL of the cache; if it exists, its settings are used", "output", metavar="CACHE")
    seconds: float = option(10.0, "approximate time to spend, in seconds", "checks", metavar="S")
    images_per_second: float = option(
        0.0,
        "images that a worker encodes per second; nothing is encoded",
        "checks",
        metavar="N",
        default_text="measured on the device of this machine",
    )
    price_per_hour: float = option(
        0.0, "price of a worker per hour, in any currency", "checks", metavar="X", default_text="no cost is shown"
    )


@dataclass(frozen=True, kw_only=True)
class DecodeOptions(Common):
    """Decode images of a cache, compare them with their originals if these can be read, and draw contact sheets.

    Run the same command again to resume.
    """

    cache: str = existing_cache()
    to: str = option(REQUIRED, "directory or URL for the previews", "output", metavar="OUT")
    limit: int = option(
        48, "number of images to decode, evenly spaced over the cache; 0 decodes all", "output", metavar="N"
    )
    sample: int = option(
        0, "decode N images at random instead, drawn by --seed", "output", metavar="N", default_text="off"
    )
    seed: int = option(0, "seed of --sample", "output", metavar="S")
    format: Literal["files", "webdataset", "parquet"] = option(
        "files", "how images are stored: each as a PNG file, in WebDataset tars, or in Parquet files", "output"
    )
    vae: str = recorded_vae()
    source: tuple[str, ...] = moved_source()


@dataclass(frozen=True, kw_only=True)
class RetryOptions(Common):
    """Retry the rejected samples of a cache. Samples that succeed are added to the cache."""

    cache: str = existing_cache()
    vae: str = recorded_vae()
    source: tuple[str, ...] = moved_source()
    same_source: bool = same_source()


@dataclass(frozen=True, kw_only=True)
class StatsOptions:
    """Show the statistics of a cache, next to the scaling constants of its VAE."""

    cache: str = existing_cache()
    storage_option: tuple[str, ...] = storage_option()
    json: bool = json_output()
    verbose: bool = verbose()


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(StatsOptions):
    """Check the integrity of a cache: files, records, plan and statistics; optionally the source and the VAE."""

    recount: bool = option(
        False, "read the sources to their end and check that their samples are those that were encoded", "checks"
    )
    reencode: int = option(
        0,
        "encode N images again, evenly spaced over the cache, and compare the latents",
        "checks",
        metavar="N",
        default_text="off",
    )
    source: tuple[str, ...] = moved_source()
    source_option: tuple[str, ...] = source_option()
    vae: str = recorded_vae()
    input_limit: tuple[str, ...] = input_limit()
    rebuild: bool = option(
        False,
        "rebuild _commits, _rejects, _log, stats.json and index.parquet from the data files if these are intact",
        "checks",
    )


@dataclass(frozen=True, kw_only=True)
class ReportOptions(StatsOptions):
    """Write one HTML page that shows a cache: how it was made, its images and numbers, and what looks wrong."""

    to: str = option(REQUIRED, "path or URL of the page", "output", metavar="FILE")
    sample: int = option(2000, "rows to examine, by whole row groups; 0 examines all", "checks", metavar="N")
    images: int = option(
        48, "images to decode, and to encode again if their sources can be read; 0: none", "checks", metavar="N"
    )
    source: tuple[str, ...] = moved_source()
    source_option: tuple[str, ...] = source_option()
    vae: str = recorded_vae()
    input_limit: tuple[str, ...] = input_limit()


@dataclass(frozen=True, kw_only=True)
class StatusOptions(StatsOptions):
    """Show the progress of a cache: units, rejects, throughput and ETA. It reads only the cache, from any machine."""

    watch: bool = option(
        False, "follow the runs until they end; with --json, print an object per line at each heartbeat", "output"
    )


@dataclass(frozen=True, kw_only=True)
class ExportOptions(StatsOptions):
    """Write the latents of a cache as the files of a trainer. Run the same command again to resume or to complete."""

    format: ExportName = option(
        REQUIRED, f"format to write: {', '.join(EXPORT_NAMES)} (see docs/exports.md)", "output", metavar="NAME"
    )
    to: str = option(REQUIRED, "directory or URL for the files", "output", metavar="OUT")
    caption_column: str = option(
        "", "column with the captions, if the format has captions", "output", metavar="NAME", default_text="txt, if any"
    )
    label_column: str = option(
        "", "column with the labels, if the format has labels", "output", metavar="NAME", default_text="label, if any"
    )
    with_shard: bool = option(False, "prefix file names with the shard, for shards that share keys", "output")
    workers: str = option(
        "auto",
        "number of processes; auto: one per CPU, or none for a few thousand rows; 0: export in this process",
        "other",
        metavar="N|auto|0",
    )


@dataclass(frozen=True, kw_only=True)
class AnnotateOptions:
    """Add columns to the rows of a cache, or replace columns: from a table, or from the sources as they are now.

    Nothing is encoded again, and no file in data/ changes. The columns are a new version, which readers see at once.
    """

    cache: str = existing_cache()
    from_: str = option(
        "",
        "table with a column key, the new columns, and a column shard if keys repeat across shards: a Parquet, Arrow, "
        "CSV, TSV or JSONL file, or a folder or glob of Parquet files",
        "input",
        metavar="TABLE",
    )
    refresh_columns: bool = option(
        False, "read the columns again from the sources, and publish those that have changed; opens no image", "input"
    )
    columns: str = option(ALL, "columns to take", "input", metavar="NAME[,NAME...]")
    source: tuple[str, ...] = moved_source()
    storage_option: tuple[str, ...] = storage_option()
    source_option: tuple[str, ...] = source_option()
    input_limit: tuple[str, ...] = input_limit()
    unmatched: Literal["null", "keep", "error"] = option(
        "keep",
        "rows of the cache that have no row in TABLE; keep: their columns keep the value that they have, and new ones "
        "are null; null: all are null there; error: fail, also if a row of TABLE has no row in the cache",
        "output",
    )
    json: bool = json_output()
    verbose: bool = verbose()


OPTIONS: dict[str, type[Common | StatsOptions | AnnotateOptions]] = {
    "plan": PlanOptions,
    "encode": EncodeOptions,
    "decode": DecodeOptions,
    "retry": RetryOptions,
    "annotate": AnnotateOptions,
    "verify": VerifyOptions,
    "status": StatusOptions,
    "stats": StatsOptions,
    "report": ReportOptions,
    "export": ExportOptions,
}
