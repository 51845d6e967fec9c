"""`latentmill verify`: whether a cache is what it says it is, and what to do where it is not."""

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch

from jobs.cache_spec import make_encode_spec
from jobs.entry import print_json, run_as_script
from jobs.messages import configure_logging
from jobs.open_cache import files_with_rows, finalize_cache, load_matching_vae, read_units
from jobs.options import VerifyOptions, parse, parse_source_options, parse_storage_options
from jobs.progress import ProgressMeter, log_info
from pipeline.cache import identity, parts
from pipeline.cache.reader import Cache
from pipeline.cache.rows import choose_rows
from pipeline.encoder import ComputeConfig
from pipeline.errors import CacheError, UsageError
from pipeline.flow import EncodeSpec
from pipeline.formats.record import find_unread_rests
from pipeline.maintenance import verify
from pipeline.maintenance.reencode import recount, reencode
from pipeline.maintenance.verify import Findings
from pipeline.maintenance.verify_part import Problem


def main(argv: Sequence[str]) -> int:
    """Run the job; 0 where nothing is wrong, else 1."""
    options, _ = parse(VerifyOptions, "verify", argv)
    configure_logging(options.verbose)
    if options.reencode < 0:
        raise UsageError("--reencode must not be negative")
    try:
        cache = Cache.open(options.cache, parse_storage_options(options.storage_option))
    except CacheError as error:
        print_findings(options, Findings(problems=[Problem(identity.NAME, str(error), verify.RESTORE)]), [])
        return 1
    meter = ProgressMeter("checked", len(cache.files()))
    with meter.shown():
        found = verify.verify_cache(cache, lambda: meter.task_done(1, 1, 0))
    rebuilt: list[str] = []
    if options.rebuild and found.rebuildable:
        rebuilt = verify.rebuild_records(cache, found)
        with suppress(CacheError):  # what else is wrong is said by the second look
            finalize_cache(cache.folder, cache.content, single_writer=False)
        found = verify.verify_cache(cache)
    sound = not found.problems
    if sound:
        found.problems += check_against_inputs(options, cache, found)
    print_findings(options, found, rebuilt)
    if not sound and (options.recount or options.reencode):
        log_info("not held against the inputs yet: run this again when the above is mended")
    return 1 if found.problems else 0


def check_against_inputs(options: VerifyOptions, cache: Cache, found: Findings) -> Iterator[Problem]:
    """The proofs that were asked for: `--recount`, `--reencode`."""
    if not options.recount and not options.reencode:
        return
    settings = cache.content["identity"]
    compute = ComputeConfig(
        device="cuda" if torch.cuda.is_available() else "cpu",
        precision=settings["precision"],
        slice_size=1,
        batch_size=1,
        threads=cache.content["compute"]["threads"],
    )
    job: EncodeSpec = make_encode_spec(
        cache.folder, cache.content, compute, options.input_limit, 1, "", parse_source_options(options)
    )
    units = read_units(options, cache)
    retried = parts.read_superseded(cache.folder, cache.content["identity_sha256"], set(units))
    job = dataclasses.replace(job, superseded=retried)
    if options.recount:
        left = find_uncounted(found)
        parts_of_units = found.group_by_unit()
        for unit in units.values():
            yield from recount(unit, parts_of_units.get(unit.name, []), left.get(unit.name), job)
    if options.reencode:
        refs = choose_rows(files_with_rows(cache, units), options.reencode)
        yield from reencode(cache, refs, job.build(load_matching_vae(options.vae, cache), threading.Event()))


def find_uncounted(found: Findings) -> dict[str, int]:
    """The units whose input is damaged, and how many of its samples stand before that: nobody knows what follows."""
    return {unit: min(positions) for unit, positions in find_unread_rests(part.record for part in found.parts).items()}


def print_findings(options: VerifyOptions, found: Findings, rebuilt: Sequence[str]) -> None:
    """What was found, file by file."""
    rows = sum(part.record.rows for part in found.parts)
    left = [{"unit": unit, "samples": count} for unit, count in sorted(find_uncounted(found).items())]
    if options.json:
        content = {"problems": [dataclasses.asdict(problem) for problem in found.problems]}
        content |= {"uncounted": left} if options.recount else {}
        print_json({"cache": options.cache, "files": len(found.parts), "rows": rows, **content})
        return
    for name in rebuilt:
        log_info(f"written again: what is said of {name}")
    for one in left if options.recount else []:
        log_info(
            f"note: the input of {one['unit']} is damaged after {one['samples']} samples: what follows is not counted"
        )
    for problem in found.problems:
        print(f"{problem.file}: {problem.what}\n  {problem.do}")
    print(
        f"{options.cache}: {_count(len(found.parts), 'file')}, {_count(rows, 'row')}: "
        f"{summarize_findings(options, found, rows)}"
    )


def summarize_findings(options: VerifyOptions, found: Findings, rows: int) -> str:
    """How the proofs that were asked for came out, in a line."""
    if found.problems:
        return _count(len(found.problems), "problem")
    proofs = ["all of it is as it was written"]
    if options.recount:
        left = len(find_uncounted(found))
        but = f", but for what follows the damage of {_count(left, 'input')}" if left else ""
        proofs.append(f"the inputs have the samples that are recorded{but}")
    if options.reencode:
        proofs.append(
            f"{_count(min(options.reencode, rows), 'image')} encoded again, with the same latents but for rounding"
        )
    return "; ".join(proofs)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


if __name__ == "__main__":
    run_as_script(main)
