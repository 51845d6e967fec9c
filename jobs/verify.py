"""`latentmill verify`: whether a cache is what it says it is, and what to do where it is not."""

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch

from jobs.entry import print_json, run_as_script
from jobs.options import VerifyOptions, parse, storage_options
from jobs.progress import Meter, say
from jobs.settings import encode_job
from jobs.standing import files, finish, matching_vae, units
from pipeline import commit, identity, verify
from pipeline.cache import Cache
from pipeline.encode import Compute
from pipeline.errors import CacheError, UsageError
from pipeline.flow import EncodeJob
from pipeline.reencode import recount, reencode
from pipeline.render import choose
from pipeline.verify import Found
from pipeline.verify_part import Problem


def main(argv: Sequence[str]) -> int:
    """Run the job; 0 where nothing is wrong, else 1."""
    options, _ = parse(VerifyOptions, "verify", argv)
    if options.reencode < 0:
        raise UsageError("--reencode must not be negative")
    try:
        cache = Cache.open(options.cache, storage_options(options.storage_option))
    except CacheError as error:
        tell(options, Found(problems=[Problem(identity.NAME, str(error), verify.RESTORE)]), [])
        return 1
    meter = Meter("checked", len(cache.files()))
    with meter.shown():
        found = verify.verify(cache, lambda: meter.task_done(1, 1, 0))
    rebuilt: list[str] = []
    if options.rebuild and found.rebuildable:
        rebuilt = verify.rebuild(cache, found)
        with suppress(CacheError):  # what else is wrong is said by the second look
            finish(cache.folder, cache.content, weak=False)
        found = verify.verify(cache)
    sound = not found.problems
    if sound:
        found.problems += against_inputs(options, cache, found)
    tell(options, found, rebuilt)
    if not sound and (options.recount or options.reencode):
        say("not held against the inputs yet: run this again when the above is mended")
    return 1 if found.problems else 0


def against_inputs(options: VerifyOptions, cache: Cache, found: Found) -> Iterator[Problem]:
    """The proofs that were asked for: `--recount`, `--reencode`."""
    if not options.recount and not options.reencode:
        return
    settings = cache.content["identity"]
    compute = Compute(
        device="cuda" if torch.cuda.is_available() else "cpu",
        precision=settings["precision"],
        slice_size=1,
        batch_size=1,
        threads=cache.content["compute"]["threads"],
    )
    job: EncodeJob = encode_job(cache.folder, cache.content, compute, options.input_limit, 1, run="")
    where = units(options.source, cache)
    retried = commit.superseded(cache.folder, cache.content["identity_sha256"], set(where))
    job = dataclasses.replace(job, superseded=retried)
    if options.recount:
        for unit in where.values():
            parts = [part for part in found.parts if part.record.unit == unit.name and not part.record.round]
            yield from recount(unit, parts, job)
    if options.reencode:
        wanted = [row for sheet in choose(files(cache, where), options.reencode) for row in sheet.rows]
        yield from reencode(cache, wanted, job.build(matching_vae(options.vae, cache), threading.Event()))


def tell(options: VerifyOptions, found: Found, rebuilt: Sequence[str]) -> None:
    """What was found, file by file."""
    rows = sum(part.record.rows for part in found.parts)
    if options.json:
        problems = [dataclasses.asdict(problem) for problem in found.problems]
        print_json({"cache": options.cache, "files": len(found.parts), "rows": rows, "problems": problems})
        return
    for name in rebuilt:
        say(f"written again: what is said of {name}")
    for problem in found.problems:
        print(f"{problem.file}: {problem.what}\n  {problem.do}")
    print(
        f"{options.cache}: {_count(len(found.parts), 'file')}, {_count(rows, 'row')}: {verdict(options, found, rows)}"
    )


def verdict(options: VerifyOptions, found: Found, rows: int) -> str:
    """How the proofs that were asked for came out, in a line."""
    if found.problems:
        return _count(len(found.problems), "problem")
    proofs = ["all of it is as it was written"]
    if options.recount:
        proofs.append("the inputs have the samples that are recorded")
    if options.reencode:
        proofs.append(
            f"{_count(min(options.reencode, rows), 'picture')} encoded again, with the same latents but for rounding"
        )
    return "; ".join(proofs)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


if __name__ == "__main__":
    run_as_script(main)
