"""Find files that are in two sources. They are encoded once."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence

from pipeline.records import ListedFile, PinnedFile, join_url, path_below_root, source_name
from pipeline.sources.walk import file_id_at


def find_duplicates(
    new: Sequence[ListedFile],
    listed: Mapping[str, ListedFile],
    planned: Mapping[str, PinnedFile],
    roots: Mapping[str, str],
) -> dict[str, str]:
    """Return the new files that are also in another source: for the path of each, the path under which it is read.

    A planned path takes precedence, then a path that is not a link, then the path whose source has the shortest root.
    listed, planned: the files by path. roots: the planned roots by name of the source.
    """
    if not (alike := _find_overlapping_sources({**roots, **{source_name(file.path): file.root for file in new}})):
        return {}
    new = [file for file in new if source_name(file.path) in alike]
    planned_paths = _identify_planned_files(new, listed, planned, roots)
    counts = Counter(map(_identify_file, new))
    groups: dict[str, list[ListedFile]] = {}
    for file in new:
        identity = _identify_file(file)
        if identity in planned_paths or counts[identity] > 1:
            groups.setdefault(identity, []).append(file)
    duplicates: dict[str, str] = {}
    for identity, files in groups.items():
        kept = planned_paths.get(identity) or min(files, key=_rank_path).path
        duplicates |= {file.path: kept for file in files if source_name(file.path) != source_name(kept)}
    return duplicates


def _find_overlapping_sources(roots: Mapping[str, str]) -> set[str]:
    """Return the sources that may share files with another one: on a local disk all, as there are links.

    On a store, the root of one is the other's, or is above it. roots: by name of the source.
    """
    local = {name for name, root in roots.items() if "://" not in root}
    alike = local if len(local) > 1 else set()
    for name, root in roots.items():
        if below := {other for other in roots if other != name and f"{roots[other]}/".startswith(f"{root}/")}:
            alike |= {name, *below}
    return alike


def _identify_planned_files(
    new: Sequence[ListedFile],
    listed: Mapping[str, ListedFile],
    planned: Mapping[str, PinnedFile],
    roots: Mapping[str, str],
) -> dict[str, str]:
    """Return the paths of the planned files by identity. Files that are not listed and match no new size are left out.

    A file that is not listed is looked up at its planned location.
    """
    paths: dict[str, str] = {}
    sizes = {file.bytes for file in new}
    for path, file in planned.items():
        if path in listed:
            identity = _identify_file(listed[path])
        elif file.bytes in sizes:
            url = join_url(roots[source_name(path)], path_below_root(path))
            identity = url if "://" in url else file_id_at(url)
        else:
            continue
        if identity:
            paths[identity] = path
    return paths


def _identify_file(file: ListedFile) -> str:
    """Return a text that is equal for two paths to the same file."""
    return file.file_id or file.url


def _rank_path(file: ListedFile) -> tuple[bool, int, str]:
    """Return the sort key of a path to a file. The smallest one is read."""
    is_local = "://" not in file.url
    root = os.path.realpath(file.root) if is_local else file.root
    return is_local and os.path.islink(file.url), len(root), file.path
