"""Which files the sources name: files, directories, globs and brace ranges, on any storage."""

import glob
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, cast

from braceexpand import braceexpand

from pipeline.beside import is_image, near
from pipeline.errors import SourceError
from pipeline.limits import shown, text_of
from pipeline.records import Shard
from pipeline.storage import connect, etag_of, full_url, is_local, naming, parent
from pipeline.walk import Walk

WILDCARDS = frozenset("*?[{")
NAMED = 5  # of what is passed over

Found = Mapping[str, Mapping[str, Any]]


def list_shards(
    sources: tuple[str, ...], options: Mapping[str, Any], but: str, noticed: list[str] | None = None
) -> list[Shard]:
    """The files that the sources name, sorted by path; those below the URL `but` (the cache) are left out.

    A source is a file, a directory (all files below it, but hidden ones), a glob or a brace range; what has the name of
    an image, but for its extension, comes with it.
    noticed: a line is put in there for what is no file, and for folders that may not be entered.
    Raises SourceError for a source that names nothing, two files with one path, and a shard whose name is not UTF-8.
    """
    fs, inside = connect(but, options)
    cache = full_url(fs, inside).rstrip("/") + "/"
    found: dict[str, Shard] = {}
    others: list[str] = []
    local = inside if is_local(fs) else None
    for source in sources:
        for shard in _expand(source, options, local, others):
            twin = found.setdefault(shard.path, shard)
            if twin.url != shard.url:
                raise SourceError(
                    f"two inputs have the path {shard.path}: {twin.url} and {shard.url}; rename one of their folders"
                )
    if others and noticed is not None:
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        names = ", ".join(shown(text_of(path)) for path in sorted(others)[:NAMED])
        noticed.append(f"passed over what is no file, or a folder that may not be entered: {names}{more}")
    shards = [found[path] for path in sorted(found)]
    return [shard for shard in shards if not shard.url.startswith(cache)]


def _expand(source: str, options: Mapping[str, Any], but: str | None, others: list[str]) -> Iterator[Shard]:
    fs, path = connect(source, options)
    with naming(source, "list"):
        if fs.exists(path):
            root, patterns = (path if fs.isdir(path) else parent(path)), [path]
        else:
            root, patterns = _fixed_directory(path), _alternatives(path)
        files: dict[str, Mapping[str, Any]] = {}
        named: dict[str, set[str]] = {}
        for pattern in patterns:
            matches = _matches(fs, pattern)
            if not matches:
                raise SourceError(f"there is no source at {source}: nothing is called {full_url(fs, pattern)}")
            below = _files_of(fs, matches, root, but, others)
            if not below:
                raise SourceError(f"there is no source at {source}: there are no files in {full_url(fs, pattern)}")
            files.update(below)
            if images := {path for path in matches if path in below and is_image(path)}:
                place = f"{parent(pattern)}/" if pattern in matches else f"{parent(pattern)}/*"
                named.setdefault(place, set()).update(images)
        for place, images in named.items():
            files.update(_beside(fs, place, images, root, but, others))
    root = root.rstrip("/")
    name, url = PurePosixPath(root).name, full_url(fs, root)
    for file in sorted(files):
        path = file[len(root) + 1 :]
        if not any(step.startswith(".") for step in path.split("/")):
            _check_utf8(file, root)
            yield Shard(
                url=text_of(full_url(fs, file)),
                root=url,
                path=text_of(f"{name}/{path}"),
                bytes=int(files[file].get("size") or 0),
                etag=etag_of(files[file]),
            )


def _matches(fs: Any, pattern: str) -> Found:
    """The files and directories that a pattern names."""
    if fs.exists(pattern):
        return {pattern: fs.info(pattern)}
    if is_local(fs) and "**" not in pattern:  # fsspec's does not follow links to directories
        return {path: {} for path in glob.glob(pattern)}
    return cast(Found, fs.glob(pattern, detail=True))


def _files_of(fs: Any, paths: Found, root: str, but: str | None, others: list[str]) -> Found:
    """The files among these paths, and those below directories."""
    if is_local(fs):
        walk = Walk(root or "/", but, others=others)
        walk.run(paths)
        return walk.found
    found: dict[str, Mapping[str, Any]] = {}
    for path, info in paths.items():
        found.update(fs.find(path, detail=True) if info["type"] == "directory" else {path: info})
    return found


def _beside(fs: Any, place: str, images: set[str], root: str, but: str | None, others: list[str]) -> Found:
    """The files beside images that were named one by one, or by their extension, and not with all of their folder.

    place: that folder with a `/` at its end, or the pattern of all that lies there.
    """
    if place.endswith("/"):
        there = {str(entry["name"]): entry for entry in fs.ls(place, detail=True)}
    else:
        there = dict(_matches(fs, place))
    folders = fs.isdir if is_local(fs) else lambda path: there[path]["type"] == "directory"
    texts = {path: there[path] for path in near(there, images) if not folders(path)}
    return _files_of(fs, texts, root, but, others)


def _check_utf8(file: str, root: str) -> None:
    """Raise SourceError where the name of a shard is not UTF-8. (A picture's is a bad key.)"""
    is_shard = PurePosixPath(file).suffix.lower() in (".tar", ".parquet")
    if text_of(root) != root or (is_shard and text_of(file) != file):
        raise SourceError(f"the name of {shown(text_of(file))} is not UTF-8: rename it, or the folder that it lies in")


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
