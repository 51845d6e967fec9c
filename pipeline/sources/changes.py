"""Whether the sources are those that were planned: moved, renamed, changed, gone, or named twice.

A source is known by its name, the first step of its files' paths; where it lies may change. A file is what it was if
its size and its ETag are.
"""

import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from pipeline.errors import SourceError
from pipeline.readers.sidecars import (
    ImageFiles,
    SidecarIndex,
    files_of,
    find_differences,
    is_same_file,
    pin_files,
    unpack_files,
)
from pipeline.records import File, Shard, Unit
from pipeline.sources.listing import Listing, Source, abbreviate, free_name, same_root
from pipeline.sources.walk import file_id_at

OTHERWISE = ". If it is another one: --new-source"
MOVED_INSIDE = (
    "If they were moved inside it, move them back. To encode them once more, under their new paths: --new-source"
)
Vote = tuple[str, str, str]  # of a new file: the name of its source, the planned one's, and what lies between the roots


def input_files(unit: Unit) -> list[File]:
    """The files that a unit reads, as they were planned; without the texts beside images."""
    if unit.kind != "folder":
        return [File(unit.path, unit.bytes, unit.etag)]
    return [files.image for files in unpack_files(unit)]


def source_name(path: str) -> str:
    """The name of a file's source."""
    return path.split("/", 1)[0]


def path_below_root(path: str) -> str:
    """A file's path below the root of its source."""
    return path.split("/", 1)[1]


def move_to_root(unit: Unit, root: str) -> Unit:
    """The same unit in a source that lies elsewhere."""
    url = root if unit.kind == "folder" else f"{root.rstrip('/')}/{path_below_root(unit.path)}"
    return unit if (unit.root, unit.url) == (root, url) else replace(unit, root=root, url=url)


def source_roots(units: Iterable[Unit]) -> dict[str, str]:
    """Where each source lies, by its name: where it lay when something of it was planned last."""
    return {unit.source: unit.root for unit in units}


def relocate_units(
    planned: Sequence[Unit],
    listed: Mapping[str, Shard],
    sources: Sequence[Source],
    same_source: bool = False,
    whole: bool = True,
) -> tuple[list[Unit], list[str]]:
    """The planned units where their sources are now, and a note for each source that has moved.

    whole: all planned files must be there still, as far as the sources cover them.
    Raises SourceError if a source holds other files than the planned one of its name.
    """
    roots, notes = source_roots(planned), []
    moved: dict[str, str] = {}
    for source in sources:
        if source.name in roots and source.name not in moved and not same_root(roots[source.name], source.root):
            moved[source.name] = source.root
            notes.append(f"the source {source.name} has moved from {roots[source.name]} to {source.root}")
    if not moved:
        return list(planned), []
    files: dict[str, list[File]] = defaultdict(list)
    for unit in planned:
        if unit.source in moved:
            files[unit.source] += input_files(unit)
    for name in moved:
        mine = [source for source in sources if source.name == name]
        if not _holds(files[name], listed, mine if whole else [], same_source):
            _refuse_moved(files[name], listed, mine[0], roots, same_source)
    return [move_to_root(unit, moved[unit.source]) if unit.source in moved else unit for unit in planned], notes


def find_units_at(planned: Sequence[Unit], listing: Listing, same_source: bool) -> list[Unit]:
    """The planned units, those that the listing has where it has them. Some of their files may be missing there.

    same_source: of those found there, sizes are held against the plan when they are read, and no ETags.
    Raises SourceError if it has none of them, or other files.
    """
    listed = {shard.path: shard for shard in listing.shards}
    if not any(file.path in listed for unit in planned for file in input_files(unit)):
        given = " ".join(source.argument for source in listing.sources)
        missing = {file.path: file for unit in planned for file in input_files(unit)}
        check_renamed(listing.shards, missing, (), otherwise="")
        raise SourceError(f"none of the cache's inputs is at {given}")
    now, _ = relocate_units(planned, listed, listing.sources, same_source, whole=False)
    pairs = zip(planned, now, strict=True)
    there = ((old, unit, any(file.path in listed for file in input_files(unit))) for old, unit in pairs)
    return [(without_etags(unit) if same_source else unit) if found else old for old, unit, found in there]


def _holds(files: Sequence[File], listed: Mapping[str, Shard], sources: Sequence[Source], same_source: bool) -> bool:
    """Whether a source that has moved holds the planned files: all, and one proven by its ETag.

    If the user says that it is the same source, half of them by path and size are enough.
    """
    there = [file for file in files if file.path in listed]
    equal = [file for file in there if is_same_file(file, listed[file.path], same_source)]
    if same_source:
        return bool(equal) and 2 * len(equal) >= len(there)
    gone = (file for file in files if file.path not in listed)
    proven = any(file.etag and listed[file.path].etag for file in equal)
    return proven and len(equal) == len(there) and not any(_covers(sources, file.path) for file in gone)


def _covers(sources: Iterable[Source], path: str) -> bool:
    return any(source.covers(path) for source in sources)


def _refuse_moved(
    files: Sequence[File], listed: Mapping[str, Shard], source: Source, roots: Mapping[str, str], same_source: bool
) -> None:
    differ = [f.path for f in files if f.path not in listed or not is_same_file(f, listed[f.path], same_source)]
    named = format_argument(free_name(source.name, {*roots, *map(source_name, listed)}), source.argument)
    what = f"of {len(files):,} planned files {len(differ):,} are missing or differ ({abbreviate(differ)})"
    if not differ:
        what = "nothing but their sizes says that its files are the planned ones"
    copied = "" if same_source else "; if it is the same one, moved or copied without its files' times: --same-source"
    raise SourceError(
        f"the source {source.name} of this cache is {roots[source.name]}, and {source.root} holds other files: {what}. "
        f"If it is another source, give it a name: {named}{copied}"
    )


def format_argument(name: str, source: str) -> str:
    """What to write on the command line to give a source a name."""
    return shlex.quote(f"{name}={source}")


def with_etags(unit: Unit, listed: Mapping[str, Shard]) -> Unit:
    """The same unit with the ETags that its files have now, if their sizes are what was planned."""

    def as_now(file: File) -> File:
        now = listed.get(file.path)
        return replace(file, etag=now.etag) if now and now.bytes == file.bytes else file

    return _with_files(unit, as_now)


def without_etags(unit: Unit) -> Unit:
    """The same unit, its files told by their sizes alone."""
    return _with_files(unit, lambda file: replace(file, etag=""))


def _with_files(unit: Unit, change: Callable[[File], File]) -> Unit:
    if unit.kind != "folder":
        return replace(unit, etag=change(input_files(unit)[0]).etag)
    files = [ImageFiles(change(each.image), tuple(map(change, each.texts))) for each in unpack_files(unit)]
    return replace(unit, **pin_files(files))


def find_changed(
    planned: Iterable[Unit], listed: Mapping[str, Shard], beside: SidecarIndex, same_source: bool
) -> dict[str, list[str]]:
    """By unit, the paths of its files that are there and not what was planned: with the texts beside its images."""
    found = {}
    for unit in planned:
        if unit.kind == "folder":
            there = (files for files in unpack_files(unit) if files.image.path in listed)
            now = ((files, files_of(listed[files.image.path], beside.texts)) for files in there)
            paths = [path for pair in now for path in find_differences(*pair, same_source)]
        else:
            file = input_files(unit)[0]
            is_other = file.path in listed and not is_same_file(file, listed[file.path], same_source)
            paths = [file.path] if is_other else []
        if paths:
            found[unit.name] = paths
    return found


def find_missing(files: Iterable[str], listed: Collection[str], sources: Sequence[Source]) -> list[str]:
    """The planned paths that the sources would list and do not. Those of sources not named this time are no matter."""
    return [path for path in files if path not in listed and _covers(sources, path)]


def find_duplicates(
    new: Sequence[Shard], listed: Mapping[str, Shard], planned: Mapping[str, File], roots: Mapping[str, str]
) -> dict[str, str]:
    """Of the new files, those that are read under another source's name already, by path, with that other path.

    Of new ones, the source counts in which the file lies without a link, then the one that lies highest.
    """
    known = _known(new, listed, planned, roots)
    once: set[str] = set()
    again: dict[str, list[Shard]] = {identity: [] for identity in known}
    for identity in map(_identity, new):
        if identity in once:
            again[identity] = []
        once.add(identity)
    for shard in new:
        if (identity := _identity(shard)) in again:
            again[identity].append(shard)
    twice: dict[str, str] = {}
    for identity, twins in again.items():
        if twins:
            first = known.get(identity) or min(twins, key=_rank).path
            twice |= {twin.path: first for twin in twins if source_name(twin.path) != source_name(first)}
    return twice


def _known(
    new: Sequence[Shard], listed: Mapping[str, Shard], planned: Mapping[str, File], roots: Mapping[str, str]
) -> dict[str, str]:
    """The path of each planned file that a new one could be. One that is not listed is looked for where it was."""
    known: dict[str, str] = {}
    sizes = {shard.bytes for shard in new}
    for path, file in planned.items():
        if file.bytes not in sizes and path not in listed:
            continue
        url = f"{roots[source_name(path)].rstrip('/')}/{path_below_root(path)}"
        if identity := _identity(listed[path]) if path in listed else url if "://" in url else file_id_at(url):
            known[identity] = path
    return known


def _identity(shard: Shard) -> str:
    return shard.file or shard.url


def _rank(shard: Shard) -> tuple[bool, int, str]:
    """The least of several paths to one file is the one that counts."""
    local = "://" not in shard.url
    root = os.path.realpath(shard.root) if local else shard.root
    return local and os.path.islink(shard.url), len(root), shard.path


def check_renamed(
    new: Sequence[Shard],
    missing: Mapping[str, File],
    in_place: Collection[str],
    still: Collection[str] = (),
    otherwise: str = OTHERWISE,
) -> list[str]:
    """Raise SourceError if new files are mostly planned ones under another name, by relative path and size.

    ETags and times do not count: those of a copy differ on most storage.
    missing: planned files that no source lists now. in_place: the new files that are known to be planned ones, and are
    not read a second time. still: the names of sources that have other planned files where they were. otherwise: what
    to do if it is another source.
    Returns a note of what is alike, if it is too little for that.
    """
    if not new or not missing:
        return []
    votes: dict[Vote, list[tuple[str, str]]] = defaultdict(list)
    for vote, pair in _alike(new, missing):
        votes[vote].append(pair)
    totals = Counter(source_name(shard.path) for shard in new)
    planned = Counter(map(source_name, missing))
    roots = {source_name(shard.path): shard.root for shard in new}
    notes: list[str] = []
    for vote, pairs in sorted(votes.items(), key=lambda item: -len(item[1])):
        name, old, _ = vote
        doubled = [pair for pair in pairs if pair[0] not in in_place]
        if 2 * len(pairs) > totals[name] or 2 * len(doubled) > planned[old]:
            raise SourceError(
                f"{len(pairs):,} of {totals[name]:,} files in {roots[name]} are in this cache already, by relative "
                f"path and size, as files of the source {old}: {_some_pairs(pairs)}. "
                f"{MOVED_INSIDE if name == old and name in still else _advice(vote, roots) + otherwise}"
            )
        if doubled and not notes:
            notes.append(
                f"new files with the relative path and size of planned ones that are not listed now: {len(doubled):,} "
                f"({_some_pairs(doubled)}); they are encoded as new"
            )
    return notes


def _some_pairs(pairs: Sequence[tuple[str, str]]) -> str:
    return abbreviate([f"{new} is {old}" for new, old in pairs])


def _alike(new: Sequence[Shard], missing: Mapping[str, File]) -> Iterator[tuple[Vote, tuple[str, str]]]:
    """Pairs of a new and a planned path, one of which ends with the other, of files of one size.

    What lies between the roots is `+FOLDERS` if the new source begins higher up, `-FOLDERS` if it begins lower.
    """
    planned: dict[tuple[str, int], list[File]] = defaultdict(list)
    for file in missing.values():
        planned[path_below_root(file.path), file.bytes].append(file)
    fresh: dict[tuple[str, int], list[Shard]] = defaultdict(list)
    for shard in new:
        fresh[path_below_root(shard.path), shard.bytes].append(shard)
        for head, tail in _splits(path_below_root(shard.path)):
            for file in planned.get((tail, shard.bytes), ()):
                yield (source_name(shard.path), source_name(file.path), f"+{head}"), (shard.path, file.path)
    for file in missing.values():
        for head, tail in _splits(path_below_root(file.path)):
            for shard in fresh.get((tail, file.bytes), ()) if head else ():
                yield (source_name(shard.path), source_name(file.path), f"-{head}"), (shard.path, file.path)


def _splits(path: str) -> Iterator[tuple[str, str]]:
    """A path cut in two before each of its steps."""
    yield "", path
    place = path.find("/")
    while place >= 0:
        yield path[:place], path[place + 1 :]
        place = path.find("/", place + 1)


def _advice(vote: Vote, roots: Mapping[str, str]) -> str:
    """How the source is named so that it goes on as the planned one."""
    name, old, between = vote
    root, folders, say_so = roots[name].rstrip("/"), between[1:], "If it is that source, say so:"
    if between.startswith("+"):
        return f"{say_so} {format_argument(old, f'{root}/{folders}' if folders else root)}"
    if root.endswith(f"/{folders}"):
        return f"{say_so} {format_argument(old, root.removesuffix(f'/{folders}'))}"
    named = format_argument(old, "FOLDER")
    return f"If it is that source, put its files into {folders}/ of a folder, and name that: {named}"
