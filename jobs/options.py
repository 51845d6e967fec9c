"""The options of each job: one frozen dataclass a job, from which flags, YAML, `--help` and the run record are made."""

import argparse
import dataclasses
import difflib
import json
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from latentmill import __version__
from pipeline.errors import UsageError
from pipeline.limits import Limits
from pipeline.records import Container, Crop, Flip, Interpolation, Store


def option(
    default: Any, help: str, metavar: str | None = None, positional: bool = False, short: str | None = None
) -> Any:
    """A field with what `--help` says of it. MISSING as default: the option must be given. short: `-v`, say."""
    facts = {"help": help, "metavar": metavar, "positional": positional, "short": short}
    return field(default=default, metadata=facts)


REQUIRED: Any = dataclasses.MISSING
SOURCE_OPTION = "for the storage of the sources, in place of --storage-option; unset: those are for the sources, too"
INPUT_LIMIT = f"what an input may be at most: {', '.join(Limits.__dataclass_fields__)} (docs/limits.md)"
VERBOSE = "also show messages for debugging: what became of each unit, and warnings of other libraries"
SAME_SOURCE = "files of the same path and size are those of before, whatever their time or ETag says (a copied source)"
NOW = "where the inputs are now, as SOURCE or NAME=SOURCE; unset: where they were"
ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every job that runs a model takes."""

    device: Literal["auto", "cuda", "mps", "cpu"] = option("auto", "what replicas run on; auto: GPUs if there are any")
    workers: str = option(
        "auto", "replicas; auto: one a GPU, or one a CPU; 0: in this process, without Ray", "N|auto|0"
    )
    gpus_per_worker: float = option(
        1.0, "GPUs that Ray sets aside for a latent_encoder, where replicas run on GPUs", "N"
    )
    cpus_per_worker: int = option(
        1, "CPUs of a latent_encoder: threads that open images, and threads of a CPU model", "N"
    )
    address: str = option("", "the Ray cluster to use; unset: RAY_ADDRESS, else a local Ray", "HOST:PORT")
    stall_timeout: float = option(
        600.0, "replace a worker that makes no progress, and end a job whose storage fails, after so long", "SECONDS"
    )
    storage_option: tuple[str, ...] = option(
        (), "for the storage behind a URL; KEY=env:NAME takes it from the environment", "KEY=VALUE"
    )
    source_option: tuple[str, ...] = option((), SOURCE_OPTION, "KEY=VALUE")
    input_limit: tuple[str, ...] = option((), INPUT_LIMIT, "NAME=N")
    json: bool = option(False, "print one JSON object on standard output, and nothing else")
    verbose: bool = option(False, VERBOSE, short="-v")


@dataclass(frozen=True, kw_only=True)
class EncodeOptions(Common):
    """Encode images into a cache of latents. The same command again does only what is missing."""

    source: tuple[str, ...] = option(
        REQUIRED,
        "tar shards, Parquet files with images, folders of images: files, directories, globs, brace ranges; "
        "NAME=SOURCE names one that does not go by the name of its directory",
        "SOURCE",
        True,
    )
    to: str = option(REQUIRED, "where the cache is, or is to be", "CACHE")
    new_source: bool = option(
        False, "encode sources as new ones although most of their files have path and size of files in the cache"
    )
    same_source: bool = option(False, SAME_SOURCE)
    vae: str = option(
        REQUIRED,
        "a directory as diffusers saves it (or one with a vae/ in it), a single file (.safetensors, .ckpt), the URL of "
        "either, a hub id, or 'demo'",
        "REF",
    )
    vae_config: str = option(
        "",
        "of a single file, which does not say how its latents are scaled: sd, sdxl, flux, ... or a directory",
        "NAME",
    )
    resolution: int = option(512, "pixels a side: the short side is resized to it, then the middle is cut out", "PX")
    buckets: int = option(
        0, "instead: sizes of many shapes, each of about this area's side squared; 0: squares only", "PX"
    )
    multiple_of: int = option(64, "what the sides of buckets are multiples of", "PX")
    min_size: int = option(0, "leave out images whose shorter side has fewer pixels", "PX")
    interpolation: Interpolation = option("bicubic", "how images are resized; always antialiased")
    crop: Crop = option("center", "where the square is cut out; random: drawn by --seed, shard and key")
    flip: Flip = option("none", "random: mirror half of the images, drawn by --seed, shard and key")
    store: Store = option(
        "mode", "what is kept of the posterior: its mode, a sample drawn by --seed, shard and key, or its moments"
    )
    format: Container = option("parquet", "what the cache's files are")
    dtype: Literal["float16", "bfloat16", "float32"] = option("float16", "what latents are stored as")
    seed: int = option(0, "of the draws", "N")
    columns: str = option(
        ALL, "what comes along of each sample: text members and Parquet columns; '': nothing", "NAME[,NAME...]"
    )
    image_column: str = option("", "where Parquet files have their images; unset: the column with bytes", "NAME")
    key_column: str = option("", "where Parquet files have their keys; unset: the number of the row", "NAME")
    max_shards: int = option(
        0, "only the first N shards: a trial, which the same command without it goes on from; 0: all", "N"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "what is computed in; auto: fp32 on CPUs, bf16 on GPUs"
    )
    batch_size: int = option(0, "images handed to the device at once; 0: one slice", "N")
    slice_size: int = option(0, "images the model runs on at once; 0: 1 on CPUs, 8 on GPUs", "N")
    compile: bool = option(False, "run the encoder through torch.compile: slow to start, for long jobs on GPUs")
    tile_above: int = option(
        0, "encode images with a longer side in tiles of this many pixels: less memory, other numbers; 0: never", "PX"
    )
    rows_per_part: int = option(0, "images in an output file; 0: up to 4096 and about 256 MiB", "N")
    max_reject_rate: float = option(0.05, "end with exit code 3 where a larger share of the samples is rejected", "R")


@dataclass(frozen=True, kw_only=True)
class DecodeOptions(Common):
    """Render previews from a cache: images and contact sheets, beside the originals where these can be read."""

    cache: str = option(REQUIRED, "the cache", "CACHE", True)
    to: str = option(REQUIRED, "where the previews go", "OUT")
    limit: int = option(48, "how many images, spread evenly over the cache; 0: all", "N")
    vae: str = option("", "the VAE; unset: the one that the cache names", "REF")
    source: tuple[str, ...] = option((), NOW, "SOURCE")


@dataclass(frozen=True, kw_only=True)
class RetryOptions(Common):
    """Run the rejected samples of a cache again; what now succeeds is added to it."""

    cache: str = option(REQUIRED, "the cache", "CACHE", True)
    vae: str = option("", "the VAE; unset: the one that the cache names", "REF")
    source: tuple[str, ...] = option((), NOW, "SOURCE")
    same_source: bool = option(False, SAME_SOURCE)


@dataclass(frozen=True, kw_only=True)
class StatsOptions:
    """Print the statistics of a cache, beside the constants of its VAE."""

    cache: str = option(REQUIRED, "the cache", "CACHE", True)
    storage_option: tuple[str, ...] = option(
        (), "for the storage behind a URL; KEY=env:NAME takes it from the environment", "KEY=VALUE"
    )
    json: bool = option(False, "print one JSON object on standard output, and nothing else")
    verbose: bool = option(False, VERBOSE, short="-v")


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(StatsOptions):
    """Prove a cache: every file against its record, the plan, the statistics; on request against inputs and VAE."""

    recount: bool = option(False, "read the inputs to their end: their samples must be those that were encoded")
    reencode: int = option(0, "encode N images again, spread evenly over the cache, and compare", "N")
    source: tuple[str, ...] = option((), NOW, "SOURCE")
    source_option: tuple[str, ...] = option((), SOURCE_OPTION, "KEY=VALUE")
    vae: str = option("", "the VAE; unset: the one that the cache names", "REF")
    input_limit: tuple[str, ...] = option((), INPUT_LIMIT, "NAME=N")
    rebuild: bool = option(False, "write _commits, _rejects and stats.json again where the files with rows are sound")


@dataclass(frozen=True, kw_only=True)
class StatusOptions(StatsOptions):
    """Say how far a cache is: done, to do, rejected, pace and time left. Read from the cache alone, on any machine."""


Options = TypeVar("Options", bound=Common | StatsOptions)


def parse(kind: type[Options], verb: str, argv: Sequence[str]) -> tuple[Options, set[str]]:
    """The options of a job from its arguments and `--config`, and the names of those that the user gave.

    A flag beats the file. Raises UsageError; SystemExit(0) after `--help`.
    """
    parser = make_parser(kind, verb)
    arguments = vars(parser.parse_intermixed_args(argv))
    config = arguments.pop("config", None)
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    values = {**(read_config(kind, config) if config else {}), **given}
    for item in dataclasses.fields(kind):
        if item.default is REQUIRED and item.name not in values:
            raise UsageError(f"{flag_of(item)} is missing; see latentmill {verb} --help")
    return kind(**values), set(values)


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is an error of ours."""

    def error(self, message: str) -> typing.NoReturn:
        words = message.split(": ", 1)[-1].split()
        if message.startswith("unrecognized arguments"):
            known = [text for action in self._actions for text in action.option_strings]
            raise UsageError(f"unknown option {words[0]}{suggest(words[0].split('=')[0], known)}")
        raise UsageError(f"{message}; see {self.prog} --help")


def make_parser(kind: type[Any], verb: str) -> Parser:
    """A parser whose flags are the fields of a dataclass; what is not given is not in its result."""
    required = [item for item in dataclasses.fields(kind) if item.default is REQUIRED]
    shown = [
        text if text[0] != "-" else f"{text} {item.metadata['metavar']}"
        for item in required
        for text in [flag_of(item)]
    ]
    parser = Parser(
        prog=f"latentmill {verb}",
        usage=f"latentmill {verb} {' '.join(shown)} [OPTION ...]",
        description=kind.__doc__,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=112),
    )
    shared = {item.name for item in dataclasses.fields(Common)} if issubclass(kind, Common) else set()
    what, where = parser.add_argument_group("what to do"), parser.add_argument_group("where and how to run")
    for item in sorted(dataclasses.fields(kind), key=lambda item: item not in required):
        group = where if item.name in shared else what
        add_argument(group, item, typing.get_type_hints(kind)[item.name])
    what.add_argument("--config", metavar="YAML", help="a file with any of these options; a flag beats it")
    return parser


def add_argument(group: Any, item: "dataclasses.Field[Any]", hint: Any) -> None:
    """Add the flag of one field, of the type `hint`."""
    arguments: dict[str, Any] = {"help": help_of(item)}
    if hint is bool:
        arguments["action"] = "store_true"
    else:
        choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        arguments["metavar"] = "|".join(choices) or item.metadata["metavar"]
        arguments["type"] = make_converter(item.name, hint)
    if item.metadata["positional"]:
        arguments["nargs"] = "*" if hint == tuple[str, ...] else "?"
    elif hint == tuple[str, ...]:
        arguments["action"] = "append"
    names = [item.name] if item.metadata["positional"] else [*filter(None, [item.metadata["short"]]), flag_of(item)]
    group.add_argument(*names, **arguments)


def flag_of(item: "dataclasses.Field[Any]") -> str:
    """How a field is called on the command line."""
    if item.metadata["positional"]:
        return str(item.metadata["metavar"])
    return "--" + item.name.replace("_", "-")


def help_of(item: "dataclasses.Field[Any]") -> str:
    text = str(item.metadata["help"]).replace("%", "%%")
    shown = item.default not in (REQUIRED, "", (), False, 0)
    return f"{text} (default: {item.default})" if shown else text


def make_converter(name: str, hint: Any) -> Any:
    """A function from the text of a flag to a field's value, whose ValueError argparse turns into its message."""
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)

        def choose(text: str) -> str:
            if text not in choices:
                near = suggest(text, choices)
                raise argparse.ArgumentTypeError(f"'{text}' is not one of {', '.join(choices)}{near}")
            return text

        return choose
    plain = str if hint == tuple[str, ...] else hint

    def convert(text: str) -> Any:
        try:
            return plain(text)
        except ValueError:
            kind = "a whole number" if plain is int else "a number"
            raise argparse.ArgumentTypeError(f"'{text}' is not {kind}") from None

    return convert


def read_config(kind: type[Any], path: str) -> dict[str, Any]:
    """The options in a YAML file. Raises UsageError for an unknown key, with the nearest known one."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = os.strerror(error.errno).lower() if isinstance(error, OSError) and error.errno else "it is not YAML"
        raise UsageError(f"cannot read --config {path}: {reason}") from error
    if not isinstance(content, Mapping):
        raise UsageError(f"--config {path} must hold `option: value` lines")
    hints = typing.get_type_hints(kind)
    known = [item.name for item in dataclasses.fields(kind)]
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UsageError(f"--config {path} has the unknown key '{key}'{suggest(name, known)}")
        values[name] = config_value(name, hints[name], value, path)
    return values


def config_value(name: str, hint: Any, value: Any, path: str) -> Any:
    """A value of a YAML file as a field's."""
    if hint is bool:
        if not isinstance(value, bool):
            raise UsageError(f"{name} in --config {path} must be true or false, not {value!r}")
        return value
    if hint == tuple[str, ...]:
        return tuple(str(item) for item in (value if isinstance(value, list) else [value]))
    try:
        return make_converter(name, hint)(str(value))
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{name} in --config {path}: {error}") from None


def suggest(word: str, known: Sequence[str]) -> str:
    """A hint for a word that is not known."""
    near = difflib.get_close_matches(word, known, 1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def parse_storage_options(given: Sequence[str], flag: str = "--storage-option") -> dict[str, Any]:
    """`KEY=VALUE` pairs as a dict, `env:NAME` taken from the environment; true, false and {...} as JSON has them."""
    options: dict[str, Any] = {}
    for pair in given:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"{flag} must be KEY=VALUE, not '{pair}'")
        if value.startswith("env:"):
            name = value.removeprefix("env:")
            if name not in os.environ:
                raise UsageError(f"{flag} {key}: there is no environment variable {name}")
            options[key] = os.environ[name]
        elif value in ("true", "false") or value.startswith("{"):
            try:
                options[key] = json.loads(value)
            except ValueError as error:
                raise UsageError(f"{flag} {key}: {value} is not JSON") from error
        else:
            options[key] = value
    return options


def parse_source_options(options: "Common | VerifyOptions") -> dict[str, Any]:
    """The options for the storage of the sources: their own, otherwise those for all storage."""
    if options.source_option:
        return parse_storage_options(options.source_option, "--source-option")
    return parse_storage_options(options.storage_option)


def parse_limits(given: Sequence[str]) -> Limits:
    """`--input-limit NAME=N` pairs, over the defaults. Raises UsageError."""
    numbers: dict[str, int] = {}
    for pair in given:
        name, _, value = pair.partition("=")
        if name not in Limits.__dataclass_fields__:
            raise UsageError(
                f"--input-limit {pair}: there is no limit '{name}'{suggest(name, list(Limits.__dataclass_fields__))}"
            )
        if not value.isdigit() or not int(value):
            raise UsageError(f"--input-limit {pair}: it must be {name}=N, a whole number above 0")
        numbers[name] = int(value)
    return Limits(**numbers)


def options_as_record(options: Any) -> dict[str, Any]:
    """Options as a run's record keeps them: values of storage options only where they name an environment variable."""
    fields = dataclasses.asdict(options)
    for name in ("storage_option", "source_option"):
        fields[name] = [
            pair if pair.partition("=")[2].startswith("env:") else pair.partition("=")[0] + "=(not kept)"
            for pair in fields.get(name, ())
        ]
    return fields


VERSION = f"latentmill {__version__}"
