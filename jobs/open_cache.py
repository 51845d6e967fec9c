"""What jobs need of a cache that stands: its VAE, its inputs and files as they are now, its statistics made anew."""

from collections.abc import Mapping
from typing import Any

from jobs.options import DecodeOptions, RetryOptions, VerifyOptions, parse_source_options
from pipeline.cache import card, parts, plan, stats
from pipeline.cache.commit_reader import Repair
from pipeline.cache.reader import Cache
from pipeline.cache.runs import library_versions
from pipeline.errors import CacheError, VaeError
from pipeline.records import Unit
from pipeline.sources import changes
from pipeline.sources.listing import list_sources
from pipeline.storage.folder import Folder
from pipeline.weights import Vae, load_vae

ROUNDS = 3  # a job that goes on beside us sums up after us anyway


def load_matching_vae(given: str, cache: Cache) -> Vae:
    """The VAE that `--vae` names, or the cache. Raises VaeError where its weights are not those that made the cache."""
    ref = given or cache.content["vae"]["reference"]
    vae = load_vae(ref, cache.folder.options, cache.content["vae"]["config"])
    if vae.sha256 != cache.content["identity"]["weights"]:
        raise VaeError(f"{ref} is not the VAE that made the cache {cache.folder.url}: its weights differ")
    return vae


def read_units(
    options: DecodeOptions | RetryOptions | VerifyOptions, cache: Cache, same_source: bool = True
) -> dict[str, Unit]:
    """The cache's units by name, their inputs where `--source` says they are now.

    same_source: files of a planned path and size are taken for the planned ones, whatever their time or ETag.
    """
    planned = plan.read_plan(cache.folder)
    if options.source:
        listing = list_sources(options.source, parse_source_options(options), excluded=cache.folder.url)
        planned = changes.find_units_at(planned, listing, same_source)
    return {unit.name: unit for unit in planned}


def files_with_rows(cache: Cache, units: dict[str, Unit]) -> list[tuple[str, int, Unit]]:
    """The files with rows: name, rows, unit."""
    found = []
    for part in stats.read_parts(cache.folder, cache.content["identity_sha256"]):
        if part.unit not in units:
            raise CacheError(f"{cache.folder.at(part.file)} is of a unit that is not in the plan: the cache is damaged")
        if part.file.startswith(parts.DATA + "/"):
            found.append((part.file, part.rows, units[part.unit]))
    return found


def finalize_cache(cache: Folder, content: Mapping[str, Any], single_writer: bool) -> dict[str, Any]:
    """Statistics and card, from all that stands in the cache; `_commits` is mended on the way.

    single_writer: a writer may have overwritten another's part.
    """
    identity = content["identity_sha256"]
    mending = Repair(identity=identity, container=content["identity"]["container"], again=single_writer)
    summing = stats.StatsWriter(cache, identity, mending)
    for _ in range(ROUNDS):
        written = summing.write()
        cache.replace(card.NAME, card.render_card(Cache(cache, content), written, library_versions()["latentmill"]))
        # otherwise another job wrote parts meanwhile, and perhaps its statistics before us
        if tuple(parts.list_part_files(cache)) == summing.files:
            break
    return written
