"""Find new files that are planned files of a renamed source.

A user may rename a source, or name a directory above or below its root. Then the planned files have other paths, and
would be encoded twice.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from pipeline.errors import SourceError
from pipeline.records import ListedFile, PinnedFile, path_below_root, source_name
from pipeline.sources.listing import abbreviate, format_argument

PathPair = tuple[str, str]  # paths of a new and of a planned file
PathAndSize = tuple[str, int]  # a path below the root, and the bytes of the file


class RootPair(NamedTuple):
    """The roots of a new and of a planned source whose files match.

    source, planned_source: the names of the sources. folders: the folders between the two roots; empty if the files
    have the same paths below both roots. is_above: the new root is above the planned one, or at its level.
    """

    source: str
    planned_source: str
    folders: str
    is_above: bool


def check_renamed(
    new: Sequence[ListedFile],
    missing: Mapping[str, PinnedFile],
    duplicates: Collection[str] = (),
    listed_sources: Collection[str] = (),
    offer_new_source: bool = True,
) -> list[str]:
    """Raise SourceError if most new files are planned files under another name, by relative path and size.

    ETags and times do not count: on most storage, those of a copy differ.
    missing: the planned files that no source lists, by path. duplicates: the paths of new files that are not read
    again, because they are known to be planned files. listed_sources: the names of sources of which other planned files
    are listed. offer_new_source: let the error mention `--new-source`.
    Returns a note if files match, but too few for an error.
    """
    if not new or not missing:
        return []
    matches: dict[RootPair, list[PathPair]] = defaultdict(list)
    for roots, paths in _match_files(new, missing):
        matches[roots].append(paths)
    new_counts = Counter(source_name(file.path) for file in new)
    missing_counts = Counter(map(source_name, missing))
    new_roots = {source_name(file.path): file.root for file in new}
    notes: list[str] = []
    for roots, pairs in sorted(matches.items(), key=lambda item: -len(item[1])):
        source, planned_source = roots.source, roots.planned_source
        unread = [(path, planned) for path, planned in pairs if path not in duplicates]
        if 2 * len(pairs) > new_counts[source] or 2 * len(unread) > missing_counts[planned_source]:
            is_inside = source == planned_source and source in listed_sources
            raise SourceError(
                f"{len(pairs):,} of {new_counts[source]:,} files in {new_roots[source]} are in this cache already, by "
                f"relative path and size, as files of the source {planned_source}: {_format_pairs(pairs)}. "
                f"{_advise(roots, new_roots[source].rstrip('/'), is_inside, offer_new_source)}"
            )
        if unread and not notes:
            notes.append(
                f"new files with the relative path and size of planned ones that are not listed now: {len(unread):,} "
                f"({_format_pairs(unread)}); they are encoded as new files"
            )
    return notes


def _match_files(new: Sequence[ListedFile], missing: Mapping[str, PinnedFile]) -> Iterator[tuple[RootPair, PathPair]]:
    """Yield the pairs of a new and a planned file with the same size, if one relative path ends with the other."""
    planned_files: dict[PathAndSize, list[PinnedFile]] = defaultdict(list)
    for file in missing.values():
        planned_files[path_below_root(file.path), file.bytes].append(file)
    new_files: dict[PathAndSize, list[ListedFile]] = defaultdict(list)
    for new_file in new:
        new_files[path_below_root(new_file.path), new_file.bytes].append(new_file)
        for folders, path in _split_before_each_step(path_below_root(new_file.path)):
            for file in planned_files.get((path, new_file.bytes), ()):
                roots = RootPair(source_name(new_file.path), source_name(file.path), folders, is_above=True)
                yield roots, (new_file.path, file.path)
    for file in missing.values():
        for folders, path in _split_before_each_step(path_below_root(file.path)):
            for new_file in new_files.get((path, file.bytes), ()) if folders else ():
                roots = RootPair(source_name(new_file.path), source_name(file.path), folders, is_above=False)
                yield roots, (new_file.path, file.path)


def _split_before_each_step(path: str) -> Iterator[tuple[str, str]]:
    """Yield a path in two parts, split before each of its steps. The first part of the first split is empty."""
    yield "", path
    slash = path.find("/")
    while slash >= 0:
        yield path[:slash], path[slash + 1 :]
        slash = path.find("/", slash + 1)


def _format_pairs(pairs: Sequence[PathPair]) -> str:
    """Return the first few pairs as text."""
    return abbreviate([f"{path} is {planned}" for path, planned in pairs])


def _advise(roots: RootPair, root: str, is_inside: bool, offer_new_source: bool) -> str:
    """Return what to do about a renamed source.

    root: the new source's. is_inside: the files were moved to another folder of their source.
    """
    if is_inside:
        return (
            "If they were moved inside the source, move them back. To encode them again under their new paths, use "
            "--new-source"
        )
    advice = f"If it is the same source, {_advise_on_argument(roots, root)}"
    return f"{advice}. If it is another source, use --new-source" if offer_new_source else advice


def _advise_on_argument(roots: RootPair, root: str) -> str:
    """Return how to name a renamed source on the command line, so that its planned files are found."""
    name, folders = roots.planned_source, roots.folders
    if roots.is_above:
        return f"name it: {format_argument(name, f'{root}/{folders}' if folders else root)}"
    if root.endswith(f"/{folders}"):
        return f"name it: {format_argument(name, root.removesuffix(f'/{folders}'))}"
    return f"put its files into FOLDER/{folders}/, and name it: {format_argument(name, 'FOLDER')}"
