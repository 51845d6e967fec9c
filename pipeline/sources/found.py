"""The files below directories of an object store, in little memory: a source may have millions of them.

A store answers 1,000 objects at a time, one answer after another. So the folders of a large source are listed in
parallel. A folder with millions of files of its own is listed by one request after another.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import Any, NamedTuple

from latentmill.pages import Entry, list_pages
from pipeline.prefetch import map_in_order
from pipeline.storage.etags import get_etag

READERS = 16  # folders that are listed at once
FEW_PAGES = 2  # of a folder; one with more is listed folder by folder
MOST_FOLDERS = 4096  # of a folder; with more, one request a folder would cost more than one a page


class FoundFile(NamedTuple):
    """A file as it was found. etag: of `get_etag`. file_id: of `walk.file_id`, on a local disk."""

    size: int
    etag: str
    file_id: str = ""


FoundFiles = Mapping[str, FoundFile]  # by their path on the filesystem


def describe_entry(entry: Entry) -> FoundFile:
    """Return a file on a store as its library describes it."""
    return FoundFile(int(entry.get("size") or 0), get_etag(entry))


def find_files_below(fs: Any, path: str) -> dict[str, FoundFile]:
    """Return the files below a directory of a store, at any depth."""
    found: dict[str, FoundFile] = {}
    folders = [path]
    with ThreadPoolExecutor(READERS) as pool:
        while folders:
            listed = map_in_order(pool, lambda folder: _list_folder(fs, folder), folders, window=2 * READERS)
            folders = []
            for files, below in listed:
                found |= files
                folders += below
    return found


def _list_folder(fs: Any, path: str) -> tuple[dict[str, FoundFile], list[str]]:
    """Return the files below a folder, and those of its folders whose files are still to be listed.

    All files of a folder are listed at once if they are few, in very many folders, or in one whose name is empty.
    """
    pages = list_pages(fs, path, recursive=True)
    first = _describe_files(islice(pages, FEW_PAGES))
    if (next_page := next(pages, None)) is None:
        return first, []
    files: dict[str, FoundFile] = {}
    folders: list[str] = []
    for page in list_pages(fs, path):
        files |= _describe_files([page])
        folders += (entry["name"] for entry in page if entry["type"] == "directory")
        if len(folders) > MOST_FOLDERS or any(name.endswith("/") for name in folders):
            return first | _describe_files(chain([next_page], pages)), []
    return files, folders


def _describe_files(pages: Iterable[list[Entry]]) -> dict[str, FoundFile]:
    return {entry["name"]: describe_entry(entry) for page in pages for entry in page if entry["type"] == "file"}
