"""`latentmill verify`: check the integrity of a cache, and name the remedy of each problem."""

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress

from jobs.cache_inputs import list_files_with_rows, load_matching_vae, read_units
from jobs.common_options import parse_source_options, parse_storage_options
from jobs.encode_spec import make_encode_spec
from jobs.entry import print_json, run_as_script
from jobs.finalize import finalize_cache
from jobs.messages import configure_logging, log_info, log_note
from jobs.options import VerifyOptions
from jobs.parsing import parse
from jobs.progress import ProgressMeter
from jobs.resources import choose_device
from pipeline.cache import identity, parts
from pipeline.cache.part_info import find_unread_rests
from pipeline.cache.reader import Cache
from pipeline.cache.rows import choose_rows
from pipeline.encoder import ComputeConfig
from pipeline.errors import CacheError, NoCacheError, UsageError
from pipeline.flow import EncodeSpec
from pipeline.maintenance import verify
from pipeline.maintenance.reencode import recount, reencode
from pipeline.maintenance.verify import CheckResult
from pipeline.maintenance.verify_derived import drop_index
from pipeline.maintenance.verify_log import rebuild_log
from pipeline.maintenance.verify_part import Problem
from pipeline.wording import count_noun


def main(argv: Sequence[str]) -> int:
    """Run the job. Returns 0 if there are no problems, otherwise 1."""
    options, _ = parse(VerifyOptions, "verify", argv)
    configure_logging(options.verbose)
    if options.reencode < 0:
        raise UsageError("--reencode must not be negative")
    try:
        # the added columns are checked like all other files
        cache = Cache.open(options.cache, parse_storage_options(options.storage_option), columns_version=0)
    except NoCacheError:
        raise
    except CacheError as error:
        print_result(options, CheckResult(problems=[Problem(identity.NAME, str(error), verify.RESTORE)]), [])
        return 1
    meter = ProgressMeter("checked", len(cache.files()))
    with meter.shown():
        result = verify.verify_cache(cache, lambda: meter.task_done(1, 1, 0))
    rebuilt: list[str] = []
    if options.rebuild and (result.rebuildable or result.is_log_wrong or result.is_index_wrong):
        if result.is_log_wrong:
            rebuild_log(cache.folder)
        if result.is_index_wrong:
            drop_index(cache.folder)
        rebuilt = verify.rebuild_records(cache, result)
        with suppress(CacheError):  # the second check reports the remaining problems
            finalize_cache(cache.folder, cache.info, single_writer=False)
        result = verify.verify_cache(cache)
    is_sound = not result.problems
    if is_sound:
        result.problems += check_against_inputs(options, cache, result)
    print_result(options, result, rebuilt)
    if not is_sound and (options.recount or options.reencode):
        log_info("skipped --recount and --reencode because of the problems above; fix them, and run verify again")
    return 1 if result.problems else 0


def check_against_inputs(options: VerifyOptions, cache: Cache, result: CheckResult) -> Iterator[Problem]:
    """Yield the problems that `--recount` and `--reencode` find, as far as they are requested."""
    if not options.recount and not options.reencode:
        return
    precision = cache.info.identity.precision
    compute = ComputeConfig(
        device=choose_device(),
        precision=precision,
        batch_size=1,
        threads=cache.info.compute.threads,
    )
    spec: EncodeSpec = make_encode_spec(
        cache.folder, cache.info, compute, options.input_limit, 1, "", parse_source_options(options)
    )
    units = read_units(options, cache)
    superseded = parts.read_superseded(cache.folder, cache.info.identity_sha256, set(units))
    spec = dataclasses.replace(spec, superseded=superseded)
    if options.recount:
        uncounted = find_uncounted(result)
        parts_of_units = result.group_by_unit()
        for unit in units.values():
            yield from recount(unit, parts_of_units.get(unit.name, []), uncounted.get(unit.name), spec)
    if options.reencode:
        refs = choose_rows(list_files_with_rows(cache, units), options.reencode)
        yield from reencode(cache, refs, spec.build(load_matching_vae(options.vae, cache), threading.Event()))


def find_uncounted(result: CheckResult) -> dict[str, int]:
    """Return the units whose input is damaged, with the number of samples before the damage. The rest is unknown."""
    return {unit: min(positions) for unit, positions in find_unread_rests(part.record for part in result.parts).items()}


def print_result(options: VerifyOptions, result: CheckResult, rebuilt: Sequence[str]) -> None:
    """Print the problems, file by file, and the summary."""
    rows = sum(part.record.rows for part in result.parts)
    uncounted = [{"unit": unit, "samples": count} for unit, count in sorted(find_uncounted(result).items())]
    if options.json:
        content = {"problems": [dataclasses.asdict(problem) for problem in result.problems]}
        content |= {"uncounted": uncounted} if options.recount else {}
        print_json({"cache": options.cache, "files": len(result.parts), "rows": rows, **content})
        return
    for name in rebuilt:
        log_info(f"rebuilt the records of {name}")
    for rest in uncounted if options.recount else []:
        log_note(f"the input of {rest['unit']} is damaged after {rest['samples']} samples: what follows is not counted")
    for problem in result.problems:
        print(f"{problem.file}: {problem.what}\n  {problem.do}")
    print(
        f"{options.cache}: {count_noun(len(result.parts), 'file')}, {count_noun(rows, 'row')}: "
        f"{summarize_result(options, result, rows)}"
    )


def summarize_result(options: VerifyOptions, result: CheckResult, rows: int) -> str:
    """Return the results of the requested checks in one line."""
    if result.problems:
        return count_noun(len(result.problems), "problem")
    results = ["all files match their records"]
    if options.recount:
        uncounted = len(find_uncounted(result))
        but = f", except after the damage of {count_noun(uncounted, 'input')}" if uncounted else ""
        results.append(f"the inputs have the samples that are recorded{but}")
    if options.reencode:
        images = count_noun(min(options.reencode, rows), "image")
        results.append(f"{images} encoded again, with the same latents except for rounding")
    return "; ".join(results)


if __name__ == "__main__":
    run_as_script(main)
