"""Which files the sources name: files, directories, globs and brace ranges, on any storage."""

import contextlib
import fnmatch
import glob
import os
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, cast

from braceexpand import braceexpand

from latentmill.stream import name_url_in_errors
from pipeline.errors import Rejected, SourceError, StorageError
from pipeline.limits import printable, to_valid_text
from pipeline.readers.sidecars import is_near, possible_texts
from pipeline.records import IMAGE_EXTENSIONS, Shard, is_image
from pipeline.sources import own_outputs
from pipeline.sources.walk import Walk, find_second_paths
from pipeline.storage.store import connect, etag_of, full_url, is_local, parent, read_file_if_there, url_as_listed

WILDCARDS = frozenset("*?[{")
NAMED = 5  # of many files, in a note
SYSTEM = frozenset({"@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX"})  # thumbnails and rubbish of systems
INPUTS = frozenset({".tar", ".parquet", *(f".{name}" for name in IMAGE_EXTENSIONS)})

FoundFiles = Mapping[str, Mapping[str, Any]]
Places = dict[str, tuple[FoundFiles, Mapping[str, list[str]]]]  # what lies in folders, and which of it may be texts


@dataclass(frozen=True, slots=True)
class Source:
    """What the user named.

    name: the first step of its files' paths. given: as it was written, without its name. root: the URL of its last
    directory without a wildcard. patterns: what below the root it lists; an empty one is all of it.
    """

    name: str
    given: str
    root: str
    patterns: tuple[str, ...]

    def covers(self, path: str) -> bool:
        """Whether it would list a file of this path, if there was one."""
        name, _, below = path.partition("/")
        return name == self.name and any(_matches_pattern(below, pattern) for pattern in self.patterns)


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of all sources, sorted by path. noticed: a line for each kind of what was left out."""

    shards: list[Shard]
    sources: tuple[Source, ...]
    noticed: list[str] = field(default_factory=list)


def list_shards(
    sources: tuple[str, ...], options: Mapping[str, Any], but: str, noticed: list[str] | None = None
) -> list[Shard]:
    """The files of `list_sources`. noticed: its notes are put in there."""
    listing = list_sources(sources, options, but)
    if noticed is not None:
        noticed += listing.noticed
    return listing.shards


def list_sources(sources: Sequence[str], options: Mapping[str, Any], but: str) -> Listing:
    """The files that the sources name; those below the URL `but` (the cache) are left out.

    A source is a file, a directory (all files below it, but hidden ones), a glob or a brace range; what has the name of
    an image, but for its extension, comes with it. `NAME=SOURCE` gives it another name than its root's.
    Noted is what is no file, folders that may not be entered, links to files that are listed themselves, and what
    latentmill wrote.
    Raises SourceError for a source that names nothing, two with one name, and a shard whose name is not UTF-8.
    """
    cache = url_as_listed(but).rstrip("/") + "/"
    local = None if "://" in cache else cache.rstrip("/")
    found: dict[str, Shard] = {}
    named: list[Source] = []
    passed, places = SkippedFiles(), Places()
    for given in sources:
        source, shards = _expand(given, options, local, cache, passed, places)
        _check_name(source, named)
        named.append(source)
        for shard in shards:
            found.setdefault(shard.path, shard)
    return Listing([found[path] for path in sorted(found)], tuple(named), passed.notes())


@dataclass(slots=True)
class SkippedFiles:
    """What the sources have and is no input.

    others: no files. system: in folders that systems make. links: to files that are listed themselves. ours: what
    latentmill wrote, by what it belongs to.
    """

    others: set[str] = field(default_factory=set)
    system: set[str] = field(default_factory=set)
    links: set[str] = field(default_factory=set)
    ours: dict[str, set[str]] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """A line for each kind."""
        notes = []
        if self.others:
            notes.append(f"passed over what is no file, or a folder that may not be entered: {abbreviate(self.others)}")
        if self.system:
            notes.append(f"files of the system, left out: {len(self.system):,} ({abbreviate(self.system)})")
        if self.links:
            notes.append(f"links to files of the same source, left out: {len(self.links):,} ({abbreviate(self.links)})")
        for what, files in self.ours.items():
            if files:
                notes.append(f"files of {printable(to_valid_text(what))}, left out: {len(files):,}")
        return notes


def abbreviate(names: Collection[str]) -> str:
    """A few names in their order, and how many more there are."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(printable(to_valid_text(name)) for name in sorted(names)[:NAMED]) + more


def _check_name(source: Source, others: Sequence[Source]) -> None:
    """Raise SourceError if another source has this name and another root."""
    for other in others:
        if other.name == source.name and not same_root(other.root, source.root):
            free = free_name(source.name, {one.name for one in others})
            raise SourceError(
                f"two sources have the name {source.name}: {other.root} and {source.root}; give one of them another: "
                f"{shlex.quote(f'{free}={source.given}')}"
            )


def same_root(one: str, other: str) -> bool:
    """Whether two roots are one directory; local ones may lead there through links."""
    if one == other or "://" in one or "://" in other:
        return one == other
    return os.path.realpath(one) == os.path.realpath(other)


def free_name(name: str, taken: Collection[str]) -> str:
    """A name like this one that no other source has."""
    number = 2
    while f"{name}{number}" in taken:
        number += 1
    return f"{name}{number}"


def name_and_source(given: str) -> tuple[str, str]:
    """`NAME=SOURCE` in its two parts; an empty name if there is none. A path with `=` in it that exists is a path."""
    name, equals, source = given.partition("=")
    if not equals or "/" in name or ("://" not in given and _names_something(given)):
        return "", given
    if not name or name in (".", "..") or "%" in name or not name.isprintable() or to_valid_text(name) != name:
        raise SourceError(
            f"{printable(to_valid_text(given))}: the name before `=` must not contain `/`, `%` or control characters; "
            f"for a path with `=` in it, write ./{printable(to_valid_text(given))}"
        )
    if not source:
        raise SourceError(f"{given} names no source: write {name}=SOURCE")
    return name, source


def _names_something(path: str) -> bool:
    """Whether a local path, or one of its alternatives, is there."""
    local = connect(path, {})[1]
    return any(os.path.lexists(each) or glob.glob(each) for each in _alternatives(local))


def _expand(
    given: str, options: Mapping[str, Any], but: str | None, cache: str, passed: SkippedFiles, places: Places
) -> tuple[Source, list[Shard]]:
    name, source = name_and_source(given)
    fs, path = connect(source, options)
    path = _plain(path) if is_local(fs) else path.rstrip("/")
    with name_url_in_errors(source, "list"):
        if fs.exists(path):
            root, patterns = (path if fs.isdir(path) else parent(path)), [path]
        else:
            root, patterns = _fixed_directory(path), _alternatives(path)
        name = name or PurePosixPath(root).name
        if not name:
            raise SourceError(f"the source {source} has no name: give it one, as NAME={source}")
        files: dict[str, Mapping[str, Any]] = {}
        named: dict[str, set[str]] = {}
        for pattern in patterns:
            matches = _matches(fs, pattern)
            if not matches:
                raise SourceError(f"there is no source at {source}: nothing is called {full_url(fs, pattern)}")
            below = _files_of(fs, matches, root, but, passed.others)
            if not below:
                raise SourceError(f"there is no source at {source}: there are no files in {full_url(fs, pattern)}")
            files.update(below)
            if images := {path for path in matches if path in below and is_image(path)}:
                place = f"{parent(pattern)}/" if pattern in matches else f"{parent(pattern)}/*"
                named.setdefault(place, set()).update(images)
        for place, images in named.items():
            files.update(_beside(fs, place, images, root, but, passed.others, places))
        root = root.rstrip("/")
        files = {file: info for file, info in files.items() if _is_shown(file[len(root) + 1 :])}
        system = {file for file in files if not SYSTEM.isdisjoint(file[len(root) + 1 :].split("/"))}
        passed.system |= system
        for file in system:
            del files[file]
        wanted = _without_ours(fs, files, source, options, cache, passed)
    found = Source(
        name=name,
        given=source,
        root=full_url(fs, root),
        patterns=tuple(to_valid_text(pattern[len(root) + 1 :]) for pattern in patterns),
    )
    return found, list(_shards(fs, wanted, root, name))


def _shards(fs: Any, files: FoundFiles, root: str, name: str) -> Iterator[Shard]:
    """The files as shards, sorted by path."""
    for file in sorted(files):
        _check_utf8(file, root)
        yield Shard(
            url=to_valid_text(full_url(fs, file)),
            root=full_url(fs, root),
            path=to_valid_text(f"{name}/{file[len(root) + 1 :]}"),
            bytes=int(files[file].get("size") or 0),
            etag=etag_of(files[file]),
            file=files[file].get("file", ""),
        )


def _is_shown(below: str) -> bool:
    """Whether nothing of a path is hidden."""
    return not (below.startswith(".") or "/." in below)


def _without_ours(
    fs: Any, files: FoundFiles, source: str, options: Mapping[str, Any], cache: str, passed: SkippedFiles
) -> FoundFiles:
    """The files without those of the cache, those that latentmill wrote, and second paths to one of them.

    Raises SourceError if latentmill wrote all there is.
    """
    files = {file: info for file, info in files.items() if not full_url(fs, file).startswith(cache)}

    def read(path: str) -> bytes | None:
        with contextlib.suppress(StorageError, Rejected):  # what cannot be read is no mark of ours
            return read_file_if_there(full_url(fs, path), options, own_outputs.LIMIT)
        return None

    ours = own_outputs.find_own_outputs(files, read)
    left_out = {file for some_files in ours.values() for file in some_files}
    if files and left_out >= files.keys():
        raise SourceError(f"there is no source at {source}: latentmill wrote what is there, {', '.join(ours)}")
    for what, some_files in ours.items():
        passed.ours.setdefault(what, set()).update(some_files)
    inputs = [file for file in files if os.path.splitext(file)[1].lower() in INPUTS and file not in left_out]
    links = find_second_paths(files, inputs)
    passed.links |= links
    return {file: info for file, info in files.items() if file not in left_out and file not in links}


def _plain(path: str) -> str:
    """A local path without `.`, `..` and `//`. What `..` leads to is asked of the disk: a link may stand before it."""
    steps = path.split("/")
    if ".." in steps:
        last = len(steps) - steps[::-1].index("..")
        path = "/".join([os.path.realpath("/".join(steps[:last])), *steps[last:]])
    return re.sub(r"/(\.?/)+", "/", path).removesuffix("/.").rstrip("/") or "/"


def _matches_pattern(below: str, pattern: str) -> bool:
    """Whether a path is one that a pattern lists: it fits, or lies in a directory that does."""
    if not pattern or below == pattern or below.startswith(f"{pattern}/"):
        return True
    if "**" in pattern:
        return fnmatch.fnmatchcase(below, pattern)
    steps, wanted = below.split("/"), pattern.split("/")
    pairs = zip(steps, wanted, strict=False)
    return len(steps) >= len(wanted) and all(fnmatch.fnmatchcase(step, want) for step, want in pairs)


def _matches(fs: Any, pattern: str) -> FoundFiles:
    """The files and directories that a pattern names."""
    if fs.exists(pattern):
        return {pattern: fs.info(pattern)}
    if is_local(fs) and "**" not in pattern:  # fsspec's does not follow links to directories
        return {path: {} for path in glob.glob(pattern)}
    return cast(FoundFiles, fs.glob(pattern, detail=True))


def _files_of(fs: Any, paths: FoundFiles, root: str, but: str | None, others: set[str]) -> FoundFiles:
    """The files among these paths, and those below directories."""
    if is_local(fs):
        walk = Walk(root or "/", but)
        walk.run(paths)
        others.update(walk.others)
        return walk.found
    found: dict[str, Mapping[str, Any]] = {}
    for path, info in paths.items():
        found.update(fs.find(path, detail=True) if info["type"] == "directory" else {path: info})
    return found


def _beside(
    fs: Any, place: str, images: set[str], root: str, but: str | None, others: set[str], places: Places
) -> FoundFiles:
    """The files beside images that were named one by one, or by their extension, and not with all of their folder.

    place: that folder with a `/` at its end, or the pattern of all that lies there.
    places: those that were listed before. A shell makes many sources of one pattern.
    """
    url = full_url(fs, place)
    if url not in places:
        is_folder = place.endswith("/")
        found: FoundFiles = {e["name"]: e for e in fs.ls(place, detail=True)} if is_folder else _matches(fs, place)
        places[url] = found, possible_texts(found)
    there, by_name = places[url]
    folders = fs.isdir if is_local(fs) else lambda path: there[path]["type"] == "directory"
    texts = {path: there[path] for path in is_near(by_name, images) if not folders(path)}
    return _files_of(fs, texts, root, but, others)


def _check_utf8(file: str, root: str) -> None:
    """Raise SourceError where the name of a shard is not UTF-8. (An image's is a bad key.)"""
    is_shard = file.lower().endswith((".tar", ".parquet"))
    if to_valid_text(root) != root or (is_shard and to_valid_text(file) != file):
        raise SourceError(
            f"the name of {printable(to_valid_text(file))} is not UTF-8: rename it, or the folder that it lies in"
        )


def _alternatives(path: str) -> list[str]:
    try:
        return list(braceexpand(path))
    except ValueError:  # unbalanced braces: a name with a brace in it
        return [path]


def _fixed_directory(path: str) -> str:
    """The last directory of a pattern before its first wildcard."""
    steps = path.split("/")
    first = next((i for i, step in enumerate(steps) if WILDCARDS & set(step)), len(steps) - 1)
    return "/".join(steps[:first])
