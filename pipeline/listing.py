"""Which files the sources name: files, directories, globs and brace ranges, on any storage."""

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, cast

from braceexpand import braceexpand

from pipeline.errors import SourceError
from pipeline.records import Shard
from pipeline.storage import connect, etag_of, full_url, naming, parent

WILDCARDS = frozenset("*?[{")


def list_shards(sources: tuple[str, ...], options: Mapping[str, Any], but: str) -> list[Shard]:
    """The files that the sources name, sorted by path; those below the URL `but` (the cache) are left out.

    A source is a file, a directory (all files below it, but hidden ones), a glob or a brace range.
    Raises SourceError for a source that names nothing, and for two files with one path.
    """
    fs, inside = connect(but, options)
    cache = full_url(fs, inside).rstrip("/") + "/"
    found: dict[str, Shard] = {}
    for source in sources:
        for shard in _expand(source, options):
            twin = found.setdefault(shard.path, shard)
            if twin.url != shard.url:
                raise SourceError(
                    f"two inputs have the path {shard.path}: {twin.url} and {shard.url}; rename one of their folders"
                )
    shards = [found[path] for path in sorted(found)]
    return [shard for shard in shards if not shard.url.startswith(cache)]


def _expand(source: str, options: Mapping[str, Any]) -> Iterator[Shard]:
    fs, path = connect(source, options)
    with naming(source, "list"):
        if fs.exists(path):
            root, patterns = (path if fs.isdir(path) else parent(path)), [path]
        else:
            root, patterns = _fixed_directory(path), _alternatives(path)
        files: dict[str, Mapping[str, Any]] = {}
        for pattern in patterns:
            matches = _files(fs, pattern)
            if not matches:
                raise SourceError(f"there is no source at {source}: nothing is called {full_url(fs, pattern)}")
            files.update(matches)
    root = root.rstrip("/")
    name = PurePosixPath(root).name
    for file in sorted(files):
        below = file[len(root) + 1 :]
        if not any(step.startswith(".") for step in below.split("/")):
            yield Shard(
                url=full_url(fs, file),
                root=full_url(fs, root),
                path=f"{name}/{below}",
                bytes=int(files[file].get("size") or 0),
                etag=etag_of(files[file]),
            )


def _files(fs: Any, pattern: str) -> dict[str, Mapping[str, Any]]:
    if fs.isdir(pattern):
        return cast(dict[str, Mapping[str, Any]], fs.find(pattern, detail=True))
    if fs.exists(pattern):
        return {pattern: fs.info(pattern)}
    found: dict[str, Mapping[str, Any]] = {}
    for path, info in fs.glob(pattern, detail=True).items():
        found.update(fs.find(path, detail=True) if info["type"] == "directory" else {path: info})
    return found


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
