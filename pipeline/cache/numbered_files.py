"""Append-only folders of a cache: files `NNNNN.parquet`, each created once under the next free number."""

import re

from pipeline.storage.folder import Folder


def list_numbered_files(cache: Folder, folder: str) -> list[str]:
    """Return the names of the files of such a folder, in order."""
    return [name for name in cache.list_files(folder) if re.fullmatch(r"\d{5}\.parquet", name)]


def get_next_number(names: list[str]) -> int:
    """Return the number after that of the last file. names: of all files, in order."""
    return int(names[-1].partition(".")[0]) + 1 if names else 0


def name_numbered_file(number: int) -> str:
    """Return the name of the file with this number."""
    return f"{number:05d}.parquet"
