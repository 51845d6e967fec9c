"""List the entries of a folder page by page, as a store answers: a folder may have millions of files."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

PAGE = 1000  # entries, as in one answer of S3

Entry = Mapping[str, Any]  # as fsspec describes it: at least its `name` (the whole path) and its `type`


def has_pages(filesystem: Any) -> bool:
    """Whether `list_pages` yields several pages: of s3fs, whose public methods keep a dict of 1 kB for each object."""
    return hasattr(filesystem, "_iterdir")


def list_pages(filesystem: Any, path: str, recursive: bool = False, prefix: str = "") -> Iterator[list[Entry]]:
    """Yield the entries of a folder on a store of fsspec, in no particular order, page by page if its library can.

    recursive: list the files at any depth instead. prefix: the store may leave out names that do not start with it.
    Empty objects that stand for folders, as some tools create, are left out. A folder that does not exist has no
    entries. Raises what the library raises.
    """
    try:
        for page in _request_pages(filesystem, path, recursive, prefix):
            yield [entry for entry in page if entry["type"] != "file" or not entry["name"].endswith("/")]
    except FileNotFoundError:
        return


def _request_pages(filesystem: Any, path: str, recursive: bool, prefix: str) -> Iterator[list[Entry]]:
    if not has_pages(filesystem) or not path.strip("/"):
        yield _list_at_once(filesystem, path, recursive)
        return
    bucket, key, _ = filesystem.split_path(path.rstrip("/"))
    prefix = f"{key}/{prefix}" if key else prefix
    entries = filesystem._iterdir(bucket, delimiter="" if recursive else "/", prefix=prefix)
    is_first = True
    while True:
        try:
            page = asyncio.run_coroutine_threadsafe(_take(entries, PAGE), filesystem.loop).result()
        except Exception as error:
            if not is_first or not hasattr(error, "response"):
                raise
            page = _list_at_once(filesystem, path, recursive)  # raises the library's own error
        if not page:
            return
        yield page
        is_first = False


def _list_at_once(filesystem: Any, path: str, recursive: bool) -> list[Entry]:
    if recursive:
        return list(filesystem.find(path, detail=True).values())
    entries: list[Entry] = filesystem.ls(path, detail=True, refresh=True)
    return entries


async def _take(entries: AsyncIterator[Entry], count: int) -> list[Entry]:
    """Return the next `count` entries, or fewer at the end."""
    taken = []
    async for entry in entries:
        taken.append(entry)
        if len(taken) == count:
            break
    return taken
