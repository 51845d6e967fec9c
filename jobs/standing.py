"""What jobs need of a cache that stands: its VAE, its inputs and files as they are now, its statistics made anew."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jobs.options import DecodeOptions, RetryOptions, VerifyOptions, source_options
from pipeline import commit, listing, plan, report, stats
from pipeline.cache import Cache
from pipeline.encode import Vae, load_vae
from pipeline.errors import CacheError, SourceError, VaeError
from pipeline.records import Unit
from pipeline.runs import versions
from pipeline.storage import Folder

ROUNDS = 3  # a job that goes on beside us sums up after us anyway


def matching_vae(given: str, cache: Cache) -> Vae:
    """The VAE that `--vae` names, or the cache. Raises VaeError where its weights are not those that made the cache."""
    ref = given or cache.content["vae"]["reference"]
    vae = load_vae(ref, cache.folder.options, cache.content["vae"]["config"])
    if vae.sha256 != cache.content["identity"]["weights"]:
        raise VaeError(f"{ref} is not the VAE that made the cache {cache.folder.url}: its weights differ")
    return vae


def units(options: DecodeOptions | RetryOptions | VerifyOptions, cache: Cache) -> dict[str, Unit]:
    """The cache's units by name, their inputs where `--source` says they are now."""
    planned, source = plan.read(cache.folder), options.source
    if source:
        shards = listing.list_shards(source, source_options(options), but=cache.folder.url)
        roots = {shard.path.split("/", 1)[0]: shard.root for shard in shards}  # folders' units go by their root
        urls = roots | {shard.path: shard.url for shard in shards}
        planned = [dataclasses.replace(unit, url=urls.get(unit.path, unit.url)) for unit in planned]
        if not any(unit.path in urls for unit in planned):
            raise SourceError(f"none of the cache's inputs is at {' '.join(source)}")
    return {unit.name: unit for unit in planned}


def files(cache: Cache, units: dict[str, Unit]) -> list[tuple[str, int, Unit]]:
    """The files with rows: name, rows, unit."""
    found = []
    for part in stats.parts(cache.folder, cache.content["identity_sha256"]):
        if part.unit not in units:
            raise CacheError(f"{cache.folder.at(part.file)} is of a unit that is not in the plan: the cache is damaged")
        if part.file.startswith(commit.DATA + "/"):
            found.append((part.file, part.rows, units[part.unit]))
    return found


def finish(
    cache: Folder, content: Mapping[str, Any], weak: bool, on_unit: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Statistics and card, from all that stands in the cache. weak: a writer may have overwritten another's part."""
    identity = content["identity_sha256"]
    commit.mend(cache, identity, content["identity"]["container"], again=weak, on_unit=on_unit)
    for _ in range(ROUNDS):
        on_unit()
        files = commit.files(cache)
        written = stats.write(cache, identity)
        cache.replace(report.NAME, report.card(Cache(cache, content), written, versions()["latentmill"]))
        if commit.files(cache) == files:  # else another job wrote parts meanwhile, and perhaps its statistics before us
            break
    return written
