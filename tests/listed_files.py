"""The files of sources, without the sources, for tests that plan or read them."""

from collections.abc import Mapping
from typing import Any

from pipeline.records import ListedFile
from pipeline.sources.listing import list_sources


def list_source_files(
    sources: tuple[str, ...], options: Mapping[str, Any], excluded: str, notes: list[str] | None = None
) -> list[ListedFile]:
    """Return the files of `list_sources`. notes: receives the notes of the listing."""
    listing = list_sources(sources, options, excluded)
    if notes is not None:
        notes += listing.notes
    return listing.files
