"""The options of each command: one frozen dataclass per command.

Flags, YAML keys, `--help` and the record of a run are derived from the fields (jobs/parsing.py).
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jobs.parsing import REQUIRED, option, suggest
from pipeline.errors import UsageError
from pipeline.limits import Limits
from pipeline.records import Container, Crop, Flip, Interpolation, JpegDecode, Store

ALL = "all"


def storage_option() -> Any:
    """Return the field of `--storage-option`."""
    text = (
        "option for the storage that holds the cache, the sources and the VAE; KEY=env:NAME reads the value from an "
        "environment variable; repeatable"
    )
    return option((), text, "input", metavar="KEY=VALUE")


def source_option() -> Any:
    """Return the field of `--source-option`."""
    text = "option for the storage that holds the sources; if given, --storage-option does not apply to it; repeatable"
    return option((), text, "input", metavar="KEY=VALUE", default_text="--storage-option")


def input_limit() -> Any:
    """Return the field of `--input-limit`."""
    names = ", ".join(Limits.__dataclass_fields__)
    text = f"override an input limit, such as pixels=200000000; names: {names} (see docs/limits.md); repeatable"
    return option((), text, "input", metavar="NAME=N")


def moved_source() -> Any:
    """Return the field of `--source` of the commands that work on an existing cache."""
    text = "new location of the source data, as SOURCE or NAME=SOURCE; repeatable"
    return option((), text, "input", metavar="SOURCE", default_text="the location recorded in the cache")


def same_source() -> Any:
    """Return the field of `--same-source`."""
    text = "treat files with the same path and size as unchanged, even if their time or ETag differs (copied sources)"
    return option(False, text, "input")


def existing_cache() -> Any:
    """Return the positional field CACHE."""
    return option(REQUIRED, "path or URL of the cache", "input", metavar="CACHE", positional=True)


def recorded_vae() -> Any:
    """Return the field of `--vae` of the commands that work on an existing cache."""
    text = "VAE that made the cache; needed if it has moved"
    return option("", text, "model and performance", metavar="REF", default_text="the reference recorded in the cache")


def json_output() -> Any:
    """Return the field of `--json`."""
    return option(False, "print one JSON object to standard output, and nothing else", "other")


def verbose() -> Any:
    """Return the field of `--verbose`."""
    text = "show debug messages as well: the result of each unit, and warnings of other libraries"
    return option(False, text, "other", short="-v")


@dataclass(frozen=True, kw_only=True)
class Common:
    """The options of every command that runs a model."""

    device: Literal["auto", "cuda", "mps", "tpu", "cpu"] = option(
        "auto",
        "device that runs the model; auto: a GPU if there is one, with JAX also a TPU, otherwise the CPU",
        "model and performance",
    )
    backend: Literal["auto", "torch", "jax"] = option(
        "auto",
        "library that runs the model; jax: FlaxAutoencoderKL, also on TPUs; auto: that of an existing cache, "
        "otherwise torch",
        "model and performance",
    )
    workers: str = option(
        "auto",
        "number of workers; auto: one per GPU, or one per CPU without GPUs; 0: run in this process, without Ray",
        "cluster",
        metavar="N|auto|0",
    )
    gpus_per_worker: float = option(
        1.0, "GPUs that Ray reserves per worker if workers run on GPUs; may be a fraction", "cluster", metavar="N"
    )
    cpus_per_worker: int = option(
        1,
        "CPUs that Ray reserves per worker, and threads of a model on a CPU",
        "cluster",
        metavar="N",
    )
    address: str = option(
        "",
        "address of the Ray cluster",
        "cluster",
        metavar="HOST:PORT",
        default_text="RAY_ADDRESS, otherwise a local Ray",
    )
    stall_timeout: float = option(
        600.0,
        "replace a worker that makes no progress for this long; end the job if the storage fails for this long",
        "cluster",
        metavar="SECONDS",
    )
    storage_option: tuple[str, ...] = storage_option()
    source_option: tuple[str, ...] = source_option()
    input_limit: tuple[str, ...] = input_limit()
    json: bool = json_output()
    verbose: bool = verbose()


@dataclass(frozen=True, kw_only=True)
class EncodeOptions(Common):
    """Encode images into a cache of latents. To resume or to extend the cache, run the same command again."""

    source: tuple[str, ...] = option(
        REQUIRED,
        "tar shards, Parquet files with images, or folders of images, as files, directories, globs or brace ranges; "
        "NAME=SOURCE sets the name of the source (default: the name of its directory)",
        "input",
        metavar="SOURCE",
        positional=True,
    )
    to: str = option(REQUIRED, "path or URL of the cache, new or existing", "output", metavar="CACHE")
    new_source: bool = option(
        False,
        "encode the sources as new ones even if most of their files match files in the cache by path and size",
        "input",
    )
    same_source: bool = same_source()
    vae: str = option(
        REQUIRED,
        "VAE to use: a diffusers directory (or one that contains vae/), a single file (.safetensors, .ckpt), the URL "
        "of either, a hub id, or 'demo'",
        "model and performance",
        metavar="REF",
    )
    vae_config: str = option(
        "",
        "VAE config for a single-file checkpoint, which does not record how its latents are scaled: a preset (sd, "
        "sdxl, flux, ...) or a directory with a config.json",
        "model and performance",
        metavar="NAME",
    )
    resolution: int = option(
        512,
        "output size: resize the shorter side to PX, then crop to PX x PX",
        "preprocessing",
        metavar="PX",
    )
    buckets: int = option(
        0,
        "use aspect-ratio buckets of about PX x PX pixels instead of square crops",
        "preprocessing",
        metavar="PX",
        default_text="off",
    )
    multiple_of: int = option(64, "make the sides of buckets multiples of PX", "preprocessing", metavar="PX")
    min_size: int = option(
        0, "skip images whose shorter side is below PX pixels", "preprocessing", metavar="PX", default_text="off"
    )
    interpolation: Interpolation = option("bicubic", "resampling filter; always antialiased", "preprocessing")
    jpeg_decode: JpegDecode = option(
        "full",
        "scaled: decode large JPEGs at 1/2, 1/4 or 1/8 of their size, but at least at twice the output's; faster, but "
        "changes the latents slightly (see docs/performance.md)",
        "preprocessing",
    )
    crop: Crop = option("center", "crop position; random: drawn from a seed of --seed, shard and key", "preprocessing")
    flip: Flip = option(
        "none",
        "random: mirror half of the images, drawn from a seed of --seed, shard and key",
        "preprocessing",
    )
    store: Store = option(
        "mode",
        "what to store of the posterior: its mode, one sample drawn from a seed of --seed, shard and key, or its "
        "moments (mean and log-variance)",
        "output",
    )
    format: Container = option("parquet", "file format of the cache", "output")
    dtype: Literal["float16", "bfloat16", "float32"] = option("float16", "data type of the stored latents", "output")
    seed: int = option(
        0, "seed of random crops, flips and posterior samples", "preprocessing", metavar="N", default_text="0"
    )
    columns: str = option(
        ALL,
        "columns to copy from the source: text members of tars and Parquet columns; '' copies none",
        "output",
        metavar="NAME[,NAME...]",
    )
    image_column: str = option(
        "",
        "Parquet column that holds the images",
        "input",
        metavar="NAME",
        default_text="the column with bytes",
    )
    key_column: str = option(
        "", "Parquet column that holds the keys", "input", metavar="NAME", default_text="the row number"
    )
    max_shards: int = option(
        0,
        "process only the first N shards; run the command again without this option to process the rest",
        "input",
        metavar="N",
        default_text="all",
    )
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = option(
        "auto",
        "precision of the computation; auto: on CUDA GPUs fp16, or tf32 if the VAE overflows in fp16; otherwise fp32",
        "model and performance",
    )
    batch_size: int = option(
        0,
        "images per forward pass of the model; a batch that is not full is padded",
        "model and performance",
        metavar="N",
        default_text="the fastest on CUDA GPUs, 8 on other GPUs, 1 on CPUs",
    )
    open_workers: int = option(
        0,
        "number of images that a worker opens at the same time: in threads, or in processes if there are more than 2",
        "model and performance",
        metavar="N",
        default_text="on a GPU, the cores of its machine per GPU; otherwise --cpus-per-worker",
    )
    remote_openers: int = option(
        0,
        "open images also in N processes per worker on nodes of the cluster without GPUs; each reserves one CPU",
        "cluster",
        metavar="N",
    )
    encoder_form: Literal["auto", "plain", "fused", "compiled"] = option(
        "auto",
        "implementation of the encoder; plain: torch's kernels; fused: Triton kernels, for CUDA GPUs; compiled: "
        "torch.compile, once per shape; auto: the fastest on the GPU, otherwise plain",
        "model and performance",
    )
    tile_above: int = option(
        0,
        "encode images with a longer side above PX in tiles of PX pixels; uses less memory, but changes the latents",
        "model and performance",
        metavar="PX",
        default_text="never",
    )
    rows_per_part: int = option(
        0,
        "images per output file",
        "output",
        metavar="N",
        default_text="up to 4096 and about 256 MiB",
    )
    max_reject_rate: float = option(
        0.05, "exit with code 3 if a larger fraction of the samples is rejected", "output", metavar="R"
    )


@dataclass(frozen=True, kw_only=True)
class DecodeOptions(Common):
    """Render previews from a cache: images and contact sheets, next to the originals if these can be read."""

    cache: str = existing_cache()
    to: str = option(REQUIRED, "directory or URL for the previews", "output", metavar="OUT")
    limit: int = option(
        48, "number of images to render, evenly spaced over the cache; 0 renders all", "output", metavar="N"
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
        False, "rebuild _commits, _rejects and stats.json from the data files if these are intact", "checks"
    )


@dataclass(frozen=True, kw_only=True)
class StatusOptions(StatsOptions):
    """Show the progress of a cache: units, rejects, throughput and ETA. It reads only the cache, from any machine."""


OPTIONS: dict[str, type[Common | StatsOptions]] = {
    "encode": EncodeOptions,
    "decode": DecodeOptions,
    "retry": RetryOptions,
    "verify": VerifyOptions,
    "status": StatusOptions,
    "stats": StatsOptions,
}


def parse_storage_options(given: Sequence[str], flag: str = "--storage-option") -> dict[str, Any]:
    """Return `KEY=VALUE` pairs as a dict. Raises UsageError.

    `env:NAME` is the value of an environment variable. The values true, false and {...} are read as JSON.
    """
    options: dict[str, Any] = {}
    for pair in given:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"{flag} must be KEY=VALUE, not '{pair}'")
        if value.startswith("env:"):
            name = value.removeprefix("env:")
            if name not in os.environ:
                raise UsageError(f"{flag} {key}: the environment variable {name} is not set")
            options[key] = os.environ[name]
        elif value in ("true", "false") or value.startswith("{"):
            try:
                options[key] = json.loads(value)
            except ValueError as error:
                raise UsageError(f"{flag} {key}: {value} is not valid JSON") from error
        else:
            options[key] = value
    return options


def parse_source_options(options: "Common | VerifyOptions") -> dict[str, Any]:
    """Return the options for the storage of the sources: `--source-option`, otherwise `--storage-option`."""
    if options.source_option:
        return parse_storage_options(options.source_option, "--source-option")
    return parse_storage_options(options.storage_option)


def parse_limits(given: Sequence[str]) -> Limits:
    """Return the default limits with the `--input-limit NAME=N` pairs applied. Raises UsageError."""
    numbers: dict[str, int] = {}
    for pair in given:
        name, _, value = pair.partition("=")
        if name not in Limits.__dataclass_fields__:
            raise UsageError(
                f"--input-limit {pair}: unknown limit '{name}'{suggest(name, list(Limits.__dataclass_fields__))}"
            )
        if not value.isdigit() or not int(value):
            raise UsageError(f"--input-limit {pair} must be {name}=N with a whole number N above 0")
        numbers[name] = int(value)
    return Limits(**numbers)


def describe_options(options: Any) -> dict[str, Any]:
    """Return the options for the record of a run.

    The value of a storage option is recorded only if it names an environment variable: it may be a secret.
    """
    fields = dataclasses.asdict(options)
    for name in ("storage_option", "source_option"):
        fields[name] = [
            pair if pair.partition("=")[2].startswith("env:") else pair.partition("=")[0] + "=(not kept)"
            for pair in fields.get(name, ())
        ]
    return fields
