"""The `latentmill` command: run the job that the first argument names. Each job is also `python -m jobs.NAME`."""

import importlib
from collections.abc import Sequence

from jobs.entry import run_as_script
from jobs.parsing import parse, suggest
from latentmill import __version__
from pipeline.errors import UsageError

VERSION = f"latentmill {__version__}"

VERBS = {
    "plan": "estimate what encode would find, take and write; reads a little and writes nothing",
    "encode": "encode images into a cache of latents; run the same command again to resume",
    "decode": "decode images of a cache: files, contact sheets and fidelity",
    "retry": "retry the rejected samples of a cache",
    "annotate": "add columns to the rows of a cache, such as new captions, or refresh those of its sources",
    "verify": "check the integrity of a cache: files, records and statistics",
    "status": "show the progress of a cache: units, rejects, throughput and ETA",
    "stats": "show the statistics of a cache, next to the scaling constants of its VAE",
    "report": "write one HTML page that shows a cache, and what looks wrong in it",
    "export": "write the latents of a cache as the files of a trainer",
}

HELP = f"""\
usage: latentmill COMMAND [OPTION ...]

Precompute VAE latents for diffusion training, on one machine or on a Ray cluster.

commands:
{chr(10).join(f"  {verb:<9} {text}" for verb, text in VERBS.items())}

options:
  -h, --help     show this help and exit; `latentmill COMMAND --help` lists the options of a command
  -V, --version  show the version and exit

quick start, with the demo VAE that latentmill includes:
  latentmill encode photos/ --to latents/ --vae demo --resolution 256
  latentmill decode latents/ --to previews/

exit codes:
  0         success
  1         failure
  2         usage error
  3         finished, but the reject rate is above --max-reject-rate, a shard is damaged, or an export left rows out
  130, 143  stopped by SIGINT or SIGTERM; the cache is consistent, and the same command resumes"""


def main(argv: Sequence[str]) -> int:
    """Run a command and return its exit code. Raises UsageError for an unknown command."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(VERSION)
        return 0
    if argv[0] not in VERBS:
        hint = suggest(argv[0], list(VERBS)) or "; see latentmill --help"
        raise UsageError(f"unknown command '{argv[0]}'{hint}")
    if {"-h", "--help"} & set(argv[1:]):
        from jobs.options import OPTIONS  # it imports pyarrow, which `latentmill --help` does not need

        parse(OPTIONS[argv[0]], argv[0], argv[1:])  # shows the help and exits before the job imports torch
    job = importlib.import_module(f"jobs.{argv[0]}")
    return int(job.main(argv[1:]))


def command() -> None:
    """Run the `latentmill` command in this process. Called by latentmill/__main__.py."""
    run_as_script(main)
