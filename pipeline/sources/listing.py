"""List the files of the sources: files, directories, globs and brace ranges, on any storage."""

import contextlib
import glob
import os
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from latentmill.byte_stream import name_url_in_errors
from pipeline.errors import Rejected, SourceError, StorageError
from pipeline.readers.metadata import METADATA_NAMES
from pipeline.records import ListedFile, get_shard_kind, is_image
from pipeline.sources import own_outputs
from pipeline.sources.alternates import find_alternates
from pipeline.sources.choosing import choose_files, may_be_input
from pipeline.sources.found import FoundFile, FoundFiles, find_files_below
from pipeline.sources.garbage import without_garbage_search
from pipeline.sources.patterns import (
    WILDCARDS,
    Matches,
    expand_braces,
    find_each,
    find_entries,
    find_fixed_directory,
    find_matches,
    matches_pattern,
)
from pipeline.sources.sidecars import NO_METADATA, MetadataIndex, find_nearby_texts, find_possible_texts
from pipeline.sources.walk import Walk, find_second_paths
from pipeline.storage.connection import full_url, get_filesystem, is_directory, is_local, parent, to_listed_url
from pipeline.storage.hub import pin_revision, strip_commit
from pipeline.storage.reading import read_file_if_exists
from pipeline.text import printable, to_valid_text

NAMED = 5  # files that a note names
SYSTEM_FOLDERS = frozenset({"@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX"})  # of thumbnails and deleted files
CLOSED_SYSTEM_FOLDERS = SYSTEM_FOLDERS | {"lost+found"}  # without images, if they are not readable

FolderListings = dict[str, tuple[Matches, Mapping[str, list[str]]]]  # files of folders, and which may be texts


@dataclass(frozen=True, slots=True)
class Source:
    """A source that the user named.

    name: the first step of its files' paths. argument: the source as it was written, without its name. root: the URL of
    its last directory without a wildcard. patterns: of the listed paths below the root; an empty pattern means all.
    """

    name: str
    argument: str
    root: str
    patterns: tuple[str, ...]

    def covers(self, path: str) -> bool:
        """Whether the source would list a file with this path, if the file existed."""
        name, _, below = path.partition("/")
        return name == self.name and any(matches_pattern(below, pattern) for pattern in self.patterns)


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of all sources, sorted by path.

    metadata: the tables beside the files, once `sources.metadata` has found them. notes: one line per kind of skipped
    file. unreadable: the folders without permission, whose files are not listed.
    """

    files: list[ListedFile]
    sources: tuple[Source, ...]
    metadata: MetadataIndex = NO_METADATA
    notes: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


@without_garbage_search()
def list_sources(
    sources: Sequence[str],
    options: Mapping[str, Any],
    excluded: str,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Listing:
    """List the files that the sources name. Files below the URL `excluded` (the cache) are skipped.

    include, exclude: globs that choose files (`sources.choosing`).

    A source is a file, a directory (all files below it that are not hidden), a glob or a brace range. Texts that share
    an image's name except for its extension are listed with the image. `NAME=SOURCE` names a source; default: the name
    of its root.
    The notes name special files, links to files that are listed themselves, and files that latentmill wrote.
    Raises SourceError if a source names nothing, if two sources have one name, or if a file's name is not UTF-8.
    """
    cache = to_listed_url(excluded).rstrip("/") + "/"
    local = None if "://" in cache else cache.rstrip("/")
    found: dict[str, ListedFile] = {}
    named: list[Source] = []
    skipped, listings = SkippedFiles(), FolderListings()
    for argument in sources:
        source, files = _expand(argument, options, local, cache, skipped, listings)
        _check_name(source, named)
        named.append(source)
        chosen, left_out = choose_files(files, include, exclude)
        skipped.left_out |= left_out
        for file in chosen:
            if file.is_named or file.path not in found:
                found[file.path] = file
    skipped.alternates |= find_alternates(found)
    shards = [found[path] for path in sorted(found) if path not in skipped.alternates]
    return Listing(shards, tuple(named), notes=skipped.describe(), unreadable=sorted(skipped.unreadable))


@dataclass(slots=True)
class SkippedFiles:
    """Entries of the sources that are not inputs.

    others: special files, and links to folders that contain the source. unreadable: folders without permission.
    system: files in folders of operating systems. left_out: files that globs leave out. links: links to files that are
    listed themselves. own_outputs: files that latentmill wrote, by cache or previews. alternates: images of which
    another format is used.
    """

    others: set[str] = field(default_factory=set)
    unreadable: set[str] = field(default_factory=set)
    system: set[str] = field(default_factory=set)
    left_out: set[str] = field(default_factory=set)
    links: set[str] = field(default_factory=set)
    own_outputs: dict[str, set[str]] = field(default_factory=dict)
    alternates: set[str] = field(default_factory=set)

    def describe(self) -> list[str]:
        """Return one line per kind of skipped entry."""
        notes = []
        if self.others:
            kinds = "special files (pipes and the like) and links to folders that contain the source"
            notes.append(f"skipped {kinds}: {abbreviate(self.others)}")
        if self.system:
            notes.append(f"skipped files of the operating system: {len(self.system):,} ({abbreviate(self.system)})")
        if self.left_out:
            notes.append(f"left out by --include or --exclude: {len(self.left_out):,} ({abbreviate(self.left_out)})")
        if self.links:
            notes.append(f"skipped links to files of the same source: {len(self.links):,} ({abbreviate(self.links)})")
        for owner, files in self.own_outputs.items():
            if files:
                notes.append(f"skipped files of {printable(to_valid_text(owner))}: {len(files):,}")
        if self.alternates:
            named = f"{len(self.alternates):,} ({abbreviate(self.alternates)})"
            notes.append(f"skipped images that exist in another format with the same name, which is used: {named}")
        return notes


def abbreviate(names: Collection[str]) -> str:
    """Return the first few sorted names, and how many more there are."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(printable(to_valid_text(name)) for name in sorted(names)[:NAMED]) + more


def _check_name(source: Source, others: Sequence[Source]) -> None:
    """Raise SourceError if another source has the same name and a different root."""
    for other in others:
        if other.name == source.name and not same_root(other.root, source.root):
            free = find_free_name(source.name, {other.name for other in others})
            raise SourceError(
                f"two sources have the name {source.name}: {other.root} and {source.root}; give one of them another: "
                f"{format_argument(free, source.argument)}"
            )


def is_covered(path: str, sources: Iterable[Source]) -> bool:
    """Whether one of the sources would list a file with this path, if the file existed."""
    return any(source.covers(path) for source in sources)


def format_argument(name: str, source: str) -> str:
    """Return the `NAME=SOURCE` that names a source on the command line, quoted for a shell."""
    return shlex.quote(f"{name}={source}")


def same_root(first: str, second: str) -> bool:
    """Whether two roots are the same directory: through links on a disk, or at another commit on the hub."""
    if first == second or "://" in first or "://" in second:
        return strip_commit(first) == strip_commit(second)
    return os.path.realpath(first) == os.path.realpath(second)


def find_free_name(name: str, taken: Collection[str]) -> str:
    """Return the name with the first number from 2 on that makes it free."""
    number = 2
    while f"{name}{number}" in taken:
        number += 1
    return f"{name}{number}"


def split_argument(argument: str) -> tuple[str, str]:
    """Split `NAME=SOURCE`. The name is empty if there is none. An existing path that contains `=` is a path."""
    name, equals, source = argument.partition("=")
    if not equals or "/" in name or ("://" not in argument and _matches_any(argument)):
        return "", argument
    if not name or name in (".", "..") or "%" in name or not name.isprintable() or to_valid_text(name) != name:
        raise SourceError(
            f"{printable(to_valid_text(argument))}: the name before `=` must not contain `/`, `%` or control "
            "characters; "
            f"for a path that contains `=`, write ./{printable(to_valid_text(argument))}"
        )
    if not source:
        raise SourceError(f"{argument} names no source: write {name}=SOURCE")
    return name, source


def _matches_any(path: str) -> bool:
    """Whether a local path, or one of its brace alternatives, exists."""
    local = get_filesystem(path, {})[1]
    return any(os.path.lexists(pattern) or glob.glob(pattern) for pattern in expand_braces(local))


def _expand(
    argument: str,
    options: Mapping[str, Any],
    excluded: str | None,
    cache: str,
    skipped: SkippedFiles,
    listings: FolderListings,
) -> tuple[Source, list[ListedFile]]:
    """Return one source and its files. Skipped entries are added to `skipped`."""
    name, source = split_argument(argument)
    fs, path = get_filesystem(pin_revision(source, options), options)
    path = _normalize_path(path) if is_local(fs) else path.rstrip("/")
    with name_url_in_errors(source, "list"):
        if fs.exists(path):
            root, patterns = (path if is_directory(fs, path) else parent(path)), [path]
        else:
            root, patterns = find_fixed_directory(path), expand_braces(path)
        name = name or PurePosixPath(strip_commit(full_url(fs, root)).split("://")[-1]).name
        files: dict[str, FoundFile] = {}
        named: dict[str, set[str]] = {}
        named_files: set[str] = set()
        for pattern, matches in find_each(fs, patterns):
            if not matches:
                place = full_url(fs, pattern)
                is_glob = bool(WILDCARDS & set(pattern))
                problem = f"no file matches {place}" if is_glob else f"{place} does not exist"
                raise SourceError(f"there is no source at {source}: {problem}")
            if not name:
                raise SourceError(f"the source {source} has no name: give it a name, as in NAME={source}")
            below = _find_files(fs, matches, root, excluded, skipped)
            if not below:
                closed = f"; folders not readable: {abbreviate(skipped.unreadable)}" if skipped.unreadable else ""
                problem = f"there are no files in {full_url(fs, pattern)}{closed}"
                raise SourceError(f"there is no source at {source}: {problem}")
            files |= below
            named_files.update(path for path in matches if path in below)
            if images := {path for path in matches if path in below and is_image(path)}:
                place = f"{parent(pattern)}/" if pattern in matches else f"{parent(pattern)}/*"
                named.setdefault(place, set()).update(images)
        for place, images in named.items():
            files |= _find_sidecars(fs, place, images, root, excluded, skipped, listings)
        root = root.rstrip("/")
        _drop_hidden_and_system_files(files, root, skipped)
        _drop_own_outputs(fs, files, root, source, options, cache, skipped)
    expanded = Source(
        name=name,
        argument=source,
        root=full_url(fs, root),
        patterns=tuple(to_valid_text(pattern[len(root) + 1 :]) for pattern in patterns),
    )
    return expanded, list(_make_listed_files(files, root, expanded, named_files))


def _make_listed_files(
    files: dict[str, FoundFile], root: str, source: Source, named: Collection[str]
) -> Iterator[ListedFile]:
    """Yield the files as `ListedFile`, sorted by path. named: those that the source itself names.

    Each file is taken from `files`, so that a million of them are not held twice.
    """
    for file in sorted(files):
        _check_utf8(file, root)
        size, etag, file_id = files.pop(file)
        yield ListedFile(
            root=source.root,
            path=to_valid_text(f"{source.name}/{file[len(root) + 1 :]}"),
            bytes=size,
            etag=etag,
            file_id=file_id,
            is_named=file in named,
        )


def _drop_hidden_and_system_files(files: dict[str, FoundFile], root: str, skipped: SkippedFiles) -> None:
    """Remove the files with a hidden step, and those of operating systems, which are added to `skipped`."""
    folders: dict[str, tuple[bool, bool]] = {}
    hidden, system = [], []
    for file in files:
        folder, _, name = file[len(root) + 1 :].rpartition("/")
        if folder not in folders:
            steps = folder.split("/")
            folders[folder] = any(step.startswith(".") for step in steps), not SYSTEM_FOLDERS.isdisjoint(steps)
        is_hidden, is_system = folders[folder]
        if is_hidden or name.startswith("."):
            hidden.append(file)
        elif is_system or name in SYSTEM_FOLDERS:
            system.append(file)
    skipped.system.update(system)
    for file in (*hidden, *system):
        del files[file]


def _drop_own_outputs(
    fs: Any,
    files: dict[str, FoundFile],
    root: str,
    source: str,
    options: Mapping[str, Any],
    cache: str,
    skipped: SkippedFiles,
) -> None:
    """Remove the cache's files, others that latentmill wrote, and second paths to a file.

    Raises SourceError if latentmill wrote all files.
    """
    url = f"{full_url(fs, root).rstrip('/')}/"
    if url.startswith(cache):
        files.clear()
    elif cache.startswith(url):
        inside = f"{root}/{cache[len(url) :]}"
        for file in [file for file in files if file.startswith(inside)]:
            del files[file]

    def read(path: str) -> bytes | None:
        with contextlib.suppress(
            StorageError, Rejected
        ):  # a file that cannot be read does not mark an output of latentmill
            return read_file_if_exists(full_url(fs, path), options, own_outputs.LIMIT)
        return None

    outputs = own_outputs.find_own_outputs(files, read)
    written = {file for owner_files in outputs.values() for file in owner_files}
    if files and written >= files.keys():
        raise SourceError(f"there is no source at {source}: latentmill wrote all files there, {', '.join(outputs)}")
    for owner, owner_files in outputs.items():
        skipped.own_outputs.setdefault(owner, set()).update(owner_files)
    inputs = (file for file in files if may_be_input(file) and file not in written)
    links = find_second_paths(files, inputs)
    skipped.links |= links
    for file in written | links:
        del files[file]


def _normalize_path(path: str) -> str:
    """Return a local path without `.`, `..` and `//`. The disk resolves `..`, because a link may precede it."""
    steps = path.split("/")
    if ".." in steps:
        last = len(steps) - steps[::-1].index("..")
        path = "/".join([os.path.realpath("/".join(steps[:last])), *steps[last:]])
    return re.sub(r"/(\.?/)+", "/", path).removesuffix("/.").rstrip("/") or "/"


def _find_files(fs: Any, paths: Matches, root: str, excluded: str | None, skipped: SkippedFiles) -> FoundFiles:
    """Return the files among these paths and below the directories among them. skipped: receives all other entries."""
    if is_local(fs):
        walk = Walk(root or "/", excluded)
        walk.run(paths)
        skipped.others.update(walk.others)
        for folder in walk.unreadable:
            is_system = not CLOSED_SYSTEM_FOLDERS.isdisjoint(folder[len(root) :].split("/"))
            (skipped.system if is_system else skipped.unreadable).add(folder)
        return walk.found
    found: dict[str, FoundFile] = {}
    for path, file in paths.items():
        found |= find_files_below(fs, path) if file is None else {path: file}
    return found


def _find_sidecars(
    fs: Any,
    place: str,
    images: set[str],
    root: str,
    excluded: str | None,
    skipped: SkippedFiles,
    listings: FolderListings,
) -> FoundFiles:
    """Return the texts and metadata of images that were named one by one, or by their extension.

    place: that folder with a trailing `/`, or the pattern of all entries in it.
    listings: the folders that were listed before. A shell expands one pattern to many sources.
    """
    url = full_url(fs, place)
    if url not in listings:
        found = find_entries(fs, place) if place.endswith("/") else find_matches(fs, place)
        listings[url] = found, find_possible_texts(found)
    entries, by_name = listings[url]
    is_directory = fs.isdir if is_local(fs) else lambda path: entries[path] is None
    near = {
        *find_nearby_texts(by_name, images),
        *(path for path in entries if PurePosixPath(path).name in METADATA_NAMES),
    }
    texts = {path: entries[path] for path in sorted(near) if not is_directory(path)}
    return _find_files(fs, texts, root, excluded, skipped)


def _check_utf8(file: str, root: str) -> None:
    """Raise SourceError if the name of a shard is not UTF-8. Such a name of an image is the reject `bad_key`."""
    if file.isascii():  # so is the root, which it begins with
        return
    if to_valid_text(root) != root or (get_shard_kind(file) and to_valid_text(file) != file):
        raise SourceError(f"the name of {printable(to_valid_text(file))} is not UTF-8; rename the file or its folder")
