"""`latentmill VERB ...`: picks the job. Each is also `python -m jobs.VERB`."""

import importlib
from collections.abc import Sequence

from jobs.entry import run_as_script
from jobs.options import VERSION, suggest
from pipeline.errors import UsageError

VERBS = {
    "encode": "encode images into a cache of latents; the same command again does only what is missing",
    "decode": "render previews from a cache: images and contact sheets, beside the originals",
    "retry": "run the rejected samples of a cache again; what now succeeds is added to it",
    "verify": "prove a cache: every file, every row, the statistics; on request against inputs and VAE",
    "status": "say how far a cache is, from the cache alone, on any machine",
    "stats": "print the statistics of a cache, beside the constants of its VAE",
}

HELP = f"""\
usage: latentmill VERB ...

Precompute VAE latents for diffusion training.

{chr(10).join(f"  {verb:<8} {text}" for verb, text in VERBS.items())}

A first try, with the model that ships with latentmill:

  latentmill encode photos/ --to latents/ --vae demo --resolution 256
  latentmill decode latents/ --to previews/

`latentmill VERB --help` lists a verb's options. Exit codes: 0 done; 1 failed; 2 wrong usage;
3 done, but more rejected than --max-reject-rate, or a shard is damaged; 130 and 143 stopped by a signal, the cache is
whole."""


def main(argv: Sequence[str]) -> int:
    """Run the verb; the exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(VERSION)
        return 0
    if argv[0] not in VERBS:
        raise UsageError(f"there is no verb '{argv[0]}'{suggest(argv[0], list(VERBS))}; see latentmill --help")
    job = importlib.import_module(f"jobs.{argv[0]}")
    return int(job.main(argv[1:]))


def command() -> None:
    """The `latentmill` command, once the front door has found us."""
    run_as_script(main)
