"""The options that commands share, and what reads their values."""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from jobs.parsing import REQUIRED, option, suggest
from pipeline.errors import UsageError
from pipeline.limits import Limits

ALL = "all"  # the value of `--columns` that stands for all columns


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


class SourceOptions(Protocol):
    """Options of a command that reads the sources."""

    @property
    def storage_option(self) -> tuple[str, ...]: ...
    @property
    def source_option(self) -> tuple[str, ...]: ...


def parse_source_options(options: SourceOptions) -> dict[str, Any]:
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


def parse_columns(text: str) -> tuple[str, ...] | None:
    """Return the names in `--columns`; None for all columns."""
    return None if text == ALL else tuple(name.strip() for name in text.split(",") if name.strip())


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
