"""The VAE, the units and the files of an existing cache."""

from jobs.common_options import parse_source_options
from jobs.options import DecodeOptions, RetryOptions, VerifyOptions
from pipeline.cache import parts, plan
from pipeline.cache.commit_scan import read_summaries
from pipeline.cache.reader import Cache
from pipeline.cache.rows import FileWithRows
from pipeline.errors import CacheError, VaeError
from pipeline.records import Unit
from pipeline.sources.listing import list_sources
from pipeline.sources.relocation import relocate_listed_units
from pipeline.weights import Vae, load_vae


def load_matching_vae(reference: str, cache: Cache) -> Vae:
    """Load the VAE of `--vae`; empty: the VAE of cache.json. Raises VaeError if its weights did not make the cache."""
    ref = reference or cache.info.vae.reference
    vae = load_vae(ref, cache.folder.options, cache.info.vae.config)
    if vae.sha256 != cache.info.identity.weights:
        raise VaeError(f"{ref} is not the VAE that made the cache {cache.folder.url}: its weights differ")
    return vae


def read_units(
    options: DecodeOptions | RetryOptions | VerifyOptions, cache: Cache, same_source: bool = True
) -> dict[str, Unit]:
    """Return the cache's units by name. `--source` gives the new locations of their inputs.

    same_source: accept a file of the planned path and size, whatever its time or ETag.
    """
    planned = plan.read_plan(cache.folder)
    if options.source:
        listing = list_sources(options.source, parse_source_options(options), excluded=cache.folder.url)
        planned = relocate_listed_units(planned, listing, same_source)
    return {unit.name: unit for unit in planned}


def list_files_with_rows(cache: Cache, units: dict[str, Unit]) -> list[FileWithRows]:
    """Return the files with rows, in order. Raises CacheError if a unit is not in the plan."""
    files = []
    for part in read_summaries(cache.folder, cache.info.identity_sha256):
        unit = parts.parse_unit_name(part.file)
        if unit not in units:
            url = cache.folder.url_of(part.file)
            raise CacheError(f"{url} is of a unit that is not in the plan: the cache is damaged")
        if part.file.startswith(parts.DATA + "/"):
            files.append(FileWithRows(part.file, part.sha256, units[unit], part.groups))
    return sorted(files, key=lambda file: file.file)
