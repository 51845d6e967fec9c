"""The machinery of the command line: a frozen dataclass becomes flags, YAML keys and `--help`.

The fields of the dataclass are made by `option`. jobs/options.py has the dataclasses.
"""

import argparse
import dataclasses
import difflib
import math
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pipeline.errors import UsageError
from pipeline.wording import to_flag

if TYPE_CHECKING:  # a module that only type checkers have
    from _typeshed import DataclassInstance

# The headings of `--help`, in order.
Group = Literal["input", "output", "preprocessing", "model and performance", "checks", "cluster", "other"]

REQUIRED: Any = dataclasses.MISSING
Options = TypeVar("Options", bound="DataclassInstance")


def option(
    default: Any,
    help: str,
    group: Group,
    *,
    metavar: str | None = None,
    positional: bool = False,
    short: str | None = None,
    default_text: str = "",
) -> Any:
    """Return a dataclass field with the texts of its `--help`.

    default: the value, or REQUIRED. short: a second flag, such as `-v`.
    default_text: the text of `--help` after "default:", if the value is not clear by itself.
    """
    facts = {
        "help": help,
        "group": group,
        "metavar": metavar,
        "positional": positional,
        "short": short,
        "default_text": default_text,
    }
    return field(default=default, metadata=facts)


def parse(kind: type[Options], verb: str, argv: Sequence[str]) -> tuple[Options, set[str]]:
    """Return the options of a job from its arguments and `--config`, and the names of the options that the user set.

    Flags take precedence over the file. Raises UsageError for a mistake, and SystemExit(0) after `--help`.
    """
    parser = make_parser(kind, verb)
    arguments = vars(parser.parse_intermixed_args(argv))
    config = arguments.pop("config", None)
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    values = {**(read_config(kind, config) if config else {}), **given}
    for item in dataclasses.fields(kind):
        if item.default is REQUIRED and item.name not in values:
            raise UsageError(f"{format_flag(item)} is missing; see latentmill {verb} --help")
    return kind(**values), set(values)


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises UsageError instead of printing its usage and exiting."""

    def error(self, message: str) -> typing.NoReturn:
        words = message.split(": ", 1)[-1].split()
        if message.startswith("unrecognized arguments"):
            known = [text for action in self._actions for text in action.option_strings]
            hint = suggest(words[0].split("=")[0], known) or f"; see {self.prog} --help"
            raise UsageError(f"unknown option {words[0]}{hint}")
        raise UsageError(f"{message}; see {self.prog} --help")


def make_parser(kind: type[Any], verb: str) -> Parser:
    """Return a parser whose flags are the fields of a dataclass. Its result has only the options that the user set."""
    fields = sorted(dataclasses.fields(kind), key=lambda item: item.default is not REQUIRED)
    hints = typing.get_type_hints(kind)
    required = [format_usage(item, hints[item.name]) for item in fields if item.default is REQUIRED]
    parser = Parser(
        prog=f"latentmill {verb}",
        usage=f"latentmill {verb} {' '.join(required)} [OPTION ...]",
        description=kind.__doc__,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,  # it gets a group like every other option
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=112),
    )
    for name in typing.get_args(Group):
        group = parser.add_argument_group(name)  # a group without options is not shown
        for item in fields:
            if item.metadata["group"] == name:
                add_argument(group, item, hints[item.name])
    group.add_argument("--config", metavar="YAML", help="read options from a YAML file; flags take precedence")
    group.add_argument("-h", "--help", action="help", help="show this help and exit")
    return parser


def format_usage(item: "dataclasses.Field[Any]", hint: Any) -> str:
    """Return how the usage line shows a required field."""
    if item.metadata["positional"]:
        return f"{format_flag(item)} ..." if hint == tuple[str, ...] else format_flag(item)
    return f"{format_flag(item)} {item.metadata['metavar']}"


def add_argument(group: Any, item: "dataclasses.Field[Any]", hint: Any) -> None:
    """Add the flag of one field of the type `hint`."""
    arguments: dict[str, Any] = {"help": format_help(item)}
    if hint is bool:
        arguments["action"] = "store_true"
    else:
        choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        arguments["metavar"] = item.metadata["metavar"] or "|".join(choices)
        arguments["type"] = make_converter(item.name, hint)
    if item.metadata["positional"]:
        arguments["nargs"] = "*" if hint == tuple[str, ...] else "?"
    elif hint == tuple[str, ...]:
        arguments["action"] = "append"
    if item.metadata["positional"]:
        group.add_argument(item.name, **arguments)
    else:
        flags = [*filter(None, [item.metadata["short"]]), format_flag(item)]
        group.add_argument(*flags, dest=item.name, **arguments)


def format_flag(item: "dataclasses.Field[Any]") -> str:
    """Return the name of a field on the command line."""
    if item.metadata["positional"]:
        return str(item.metadata["metavar"])
    return to_flag(item.name)


def format_help(item: "dataclasses.Field[Any]") -> str:
    """Return the help text of a field, with its default."""
    text = str(item.metadata["help"]).replace("%", "%%")
    default = item.metadata["default_text"]
    if not default and item.default not in (REQUIRED, "", (), False):
        default = f"{item.default:g}" if isinstance(item.default, float) else str(item.default)
    return f"{text} (default: {default})" if default else text


def make_converter(name: str, hint: Any) -> Any:
    """Return a function from the text of a flag to the value of a field. It raises ArgumentTypeError."""
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
            value = plain(text)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError
            return value
        except ValueError:
            kind = "a whole number" if plain is int else "a number"
            raise argparse.ArgumentTypeError(f"'{text}' is not {kind}") from None

    return convert


def read_config(kind: type[Any], path: str) -> dict[str, Any]:
    """Return the options in a YAML file. Raises UsageError; for an unknown key, it suggests the nearest known one."""
    import yaml  # it takes a quarter of the time of `latentmill --help`

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = os.strerror(error.errno).lower() if isinstance(error, OSError) and error.errno else "invalid YAML"
        raise UsageError(f"cannot read --config {path}: {reason}") from error
    if not isinstance(content, Mapping):
        raise UsageError(f"--config {path} must be a mapping with lines such as `resolution: 512`")
    hints = typing.get_type_hints(kind)
    known = {item.name.rstrip("_"): item.name for item in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = known.get(str(key).replace("-", "_"), "")
        if not name:
            near = suggest(str(key).replace("-", "_"), list(known))
            raise UsageError(f"--config {path}: unknown key '{key}'{near}")
        values[name] = parse_config_value(name, hints[name], value, path)
    return values


def parse_config_value(name: str, hint: Any, value: Any, path: str) -> Any:
    """Return a value of a YAML file as the value of a field of the type `hint`. Raises UsageError."""
    if value is None:
        raise UsageError(f"{name} in --config {path} has no value; give it one, or remove the line")
    if hint is bool:
        if not isinstance(value, bool):
            raise UsageError(f"{name} in --config {path} must be true or false, not {value!r}")
        return value
    is_several = hint == tuple[str, ...]
    items = value if is_several and isinstance(value, list) else [value]
    for item in items:
        if item is None or isinstance(item, (bool, list, Mapping)):  # `no` and `a: b` without quotes, for instance
            raise UsageError(f"{name} in --config {path} must be text or a number, not {item!r}; put it in quotes")
    if is_several:
        return tuple(map(str, items))
    try:
        return make_converter(name, hint)(str(value))
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{name} in --config {path}: {error}") from None


def suggest(word: str, known: Sequence[str]) -> str:
    """Return a hint that names the known word nearest to an unknown one, or an empty string."""
    near = difflib.get_close_matches(word, known, 1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
