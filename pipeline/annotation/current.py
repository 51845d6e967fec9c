"""What a refresh of columns reads: the planned inputs where they are now, and the columns that follow from them."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.annotation.part_rows import is_exact_in_tars
from pipeline.annotation.sources import select_inputs
from pipeline.cache.plan_files import read_plan
from pipeline.cache.reader import Cache
from pipeline.errors import UsageError
from pipeline.formats.schema import PassthroughColumns
from pipeline.records import ListedFile, Unit
from pipeline.sources.listing import list_sources
from pipeline.sources.planned_files import find_source_roots
from pipeline.sources.relocation import relocate_listed_units


def select_refreshed(cache: Cache, wanted: Collection[str] | None) -> tuple[PassthroughColumns, dict[str, list[str]]]:
    """Return the columns that can be read again, and the names of the others by the reason.

    wanted: their names; None for all. Raises UsageError for a name that no column from the sources has.
    """
    columns = cache.layout.columns
    if lacking := [name for name in wanted or () if name not in columns.schema.names]:
        names = ", ".join(columns.schema.names) or "none"
        raise UsageError(f"--columns: the cache has no column {lacking[0]} from its sources; it has {names}")
    left: dict[str, list[str]] = {}
    chosen = []
    for item in columns.schema:
        provider = cache.overlays.providers.get(item.name)
        if wanted is not None and item.name not in wanted:
            continue
        if provider is not None and provider.info.table:
            reason = f"version {provider.number} replaced them by those of {provider.info.table}"
            left.setdefault(reason, []).append(item.name)
        elif not is_exact_in_tars(item.type, item.name, cache):
            left.setdefault("tars do not have their exact values", []).append(item.name)
        else:
            chosen.append(item)
    schema = pa.schema(chosen)
    return PassthroughColumns(schema, tuple(name for name in columns.texts if name in schema.names)), left


def list_current_inputs(cache: Cache, moved: Sequence[str], options: Mapping[str, Any]) -> tuple[list[Unit], list[str]]:
    """Return what to read (`select_inputs`), and the planned inputs that do not exist any more.

    moved: new locations of sources. options: of their storage. Raises SourceError if a source is not found.
    """
    units, rules = read_plan(cache.folder), cache.info.identity.sources
    files: list[ListedFile] = []
    names: set[str] = set()
    if moved:
        listing = list_sources(moved, options, cache.folder.url, rules.include, rules.exclude)
        units = relocate_listed_units(units, listing, same_source=True)
        files += listing.files
        names = {source.name for source in listing.sources}
    others = [f"{name}={root}" for name, root in find_source_roots(units).items() if name not in names]
    if others:
        files += list_sources(others, options, cache.folder.url, rules.include, rules.exclude).files
    return select_inputs(units, files, cache.layout.columns.texts)
