"""The edge between a job and the shell: errors become one line and an exit code."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, NoReturn

from pipeline.errors import LatentmillError, UsageError


def check_platform() -> None:
    """Raise UsageError where Python does not have what Linux and macOS have."""
    if any(find_spec(name) is None for name in ("resource", "fcntl")):
        raise UsageError(f"it runs on Linux and macOS, not on {sys.platform}; on Windows it runs in WSL")


def run_guarded(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run a job; the exit code. Errors of ours become one line on standard error, anything else is a bug of ours."""
    try:
        check_platform()
        return main(argv)
    except LatentmillError as error:
        print(f"latentmill: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("latentmill: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def run_as_script(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """`python -m jobs.VERB`, for `ray job submit`; and what the `latentmill` command does.

    Everything is closed and written by now, so the process ends at once: to take torch and Ray down module by module
    is 0.7 s.
    """
    try:
        code = run_guarded(main, sys.argv[1:])
    except SystemExit as asked:  # --help
        code = int(asked.code or 0)
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):
            stream.flush()
    os._exit(code)


def print_json(value: Any) -> None:
    """The one JSON object of `--json`."""
    print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False), flush=True)
