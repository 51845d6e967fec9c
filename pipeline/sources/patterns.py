"""Find the files and directories that a source names: by their paths, by globs, or by brace ranges."""

import fnmatch
import glob
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, cast

from braceexpand import braceexpand

from latentmill.pages import Entry, has_pages, list_pages
from pipeline.sources.found import FoundFile, describe_entry
from pipeline.storage.connection import compile_glob, is_local, parent

WILDCARDS = frozenset("*?[{")
_IN_GLOBS = frozenset("*?[")
_FEW = 16  # paths of one folder that are looked up one by one

Matches = Mapping[str, FoundFile | None]  # by path; None for a directory. On a local disk, the values mean nothing.


def expand_braces(path: str) -> list[str]:
    """Expand the brace ranges of a path."""
    try:
        return list(braceexpand(path))
    except ValueError:  # unbalanced braces: the name contains a brace
        return [path]


def find_fixed_directory(path: str) -> str:
    """Return the last directory of a pattern before its first wildcard."""
    steps = path.split("/")
    first = next((i for i, step in enumerate(steps) if WILDCARDS & set(step)), len(steps) - 1)
    return "/".join(steps[:first])


def matches_pattern(below: str, pattern: str) -> bool:
    """Whether a pattern lists a path: the path, or a directory above it, matches."""
    if not pattern or below == pattern or below.startswith(f"{pattern}/"):
        return True
    if "**" in pattern:
        return fnmatch.fnmatchcase(below, pattern)
    steps, wanted = below.split("/"), pattern.split("/")
    pairs = zip(steps, wanted, strict=False)
    return len(steps) >= len(wanted) and all(fnmatch.fnmatchcase(step, want) for step, want in pairs)


def find_each(fs: Any, patterns: Sequence[str]) -> Iterator[tuple[str, Matches]]:
    """Yield each pattern with what it names. Many paths in one folder of a store are found in its listing."""
    listed = {} if is_local(fs) else _find_in_folders(fs, patterns)
    for pattern in patterns:
        yield pattern, {pattern: listed[pattern]} if pattern in listed else find_matches(fs, pattern)


def find_matches(fs: Any, pattern: str) -> Matches:
    """Return the files and directories that a pattern names."""
    if is_local(fs):
        if os.path.exists(pattern) or "**" in pattern:
            return dict.fromkeys([pattern] if os.path.exists(pattern) else fs.glob(pattern))
        return dict.fromkeys(glob.glob(pattern))  # fsspec's own glob does not follow links to directories
    if fs.exists(pattern):
        return {pattern: _describe(fs.info(pattern))}
    folder, name = parent(pattern), pattern.rpartition("/")[2]
    if "**" in pattern or _IN_GLOBS & set(folder) or not has_pages(fs):
        return {path: _describe(info) for path, info in cast(dict[str, Entry], fs.glob(pattern, detail=True)).items()}
    shape = compile_glob(pattern)
    fixed = name[: next((place for place, letter in enumerate(name) if letter in _IN_GLOBS), len(name))]
    pages = list_pages(fs, folder, prefix=fixed)
    return {entry["name"]: _describe(entry) for page in pages for entry in page if shape.match(entry["name"])}


def find_entries(fs: Any, folder: str) -> Matches:
    """Return the files and directories that a folder has."""
    return {entry["name"]: _describe(entry) for page in list_pages(fs, folder.rstrip("/")) for entry in page}


def _find_in_folders(fs: Any, paths: Sequence[str]) -> dict[str, FoundFile | None]:
    """Return those of the paths that exist and that share their folder with many others."""
    by_folder: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        by_folder[parent(path)].add(path)
    found: dict[str, FoundFile | None] = {}
    for folder, wanted in by_folder.items():
        if len(wanted) > _FEW and folder:
            common = takewhile(lambda pair: pair[0] == pair[1], zip(min(wanted), max(wanted), strict=False))
            prefix = "".join(letter for letter, _ in common)[len(folder) + 1 :]
            for page in list_pages(fs, folder, prefix=prefix):
                found |= {entry["name"]: _describe(entry) for entry in page if entry["name"] in wanted}
    return found


def _describe(entry: Entry) -> FoundFile | None:
    """Return a file on a store, or None for a directory."""
    return None if entry["type"] == "directory" else describe_entry(entry)
