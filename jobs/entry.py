"""The boundary between a job and the shell: an error becomes one line and an exit code."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, NoReturn

from pipeline.errors import LatentmillError, UsageError
from pipeline.text import printable_lines


def check_platform() -> None:
    """Raise UsageError if the platform lacks modules that Python has on Linux and macOS."""
    if any(find_spec(name) is None for name in ("resource", "fcntl")):
        raise UsageError(f"{sys.platform} is not supported; use Linux, macOS, or WSL on Windows")


def run_guarded(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run a job and return its exit code.

    A LatentmillError becomes one line on standard error. Any other exception is a bug and is raised.
    """
    try:
        check_platform()
        return main(argv)
    except LatentmillError as error:
        print(f"latentmill: {printable_lines(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("latentmill: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output has exited, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def run_as_script(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a job as this process: for the `latentmill` command, and for `python -m jobs.NAME` with `ray job submit`.

    Everything is closed and written when the job returns, so the process ends at once. An orderly exit takes 0.7 s,
    because torch and Ray are torn down module by module.
    """
    try:
        code = run_guarded(main, sys.argv[1:])
    except SystemExit as exit:  # from --help
        code = int(exit.code or 0)
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):
            stream.flush()
    os._exit(code)


def print_json(value: Any) -> None:
    """Print the JSON object of `--json`."""
    print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False), flush=True)
