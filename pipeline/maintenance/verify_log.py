"""Check the commit log against the parts, and write it again."""

from collections.abc import Collection, Iterator, Sequence

import pyarrow as pa

from pipeline.cache import commit_log
from pipeline.cache.part_info import PartInfo
from pipeline.cache.part_table import SCHEMA, make_table
from pipeline.cache.parts import parse_commit_name
from pipeline.canonical_json import REBUILD_HINT
from pipeline.errors import CacheError
from pipeline.maintenance.verify_part import Problem
from pipeline.storage.folder import Folder


def check_log(folder: Folder, parts: Sequence[PartInfo], committed: Collection[str]) -> Iterator[Problem]:
    """Compare the rows of the log that count with the parts.

    parts: those with a readable record, without twins. committed: the names of all commits.
    """
    tables: dict[str, pa.Table] = {}
    for name in commit_log.list_log_files(folder):
        file = f"{commit_log.FOLDER}/{name}"
        data = folder.read(file)
        try:
            tables[file] = commit_log.parse_log(data, file)
        except CacheError:
            yield Problem(file, "it cannot be read as a commit log", REBUILD_HINT)
            continue
        if not commit_log.is_as_written(data, tables[file]):
            yield Problem(file, "it was changed after it was written", REBUILD_HINT)
    latest = {commit: file for file, table in tables.items() for commit in table["commit"].unique().to_pylist()}
    parts_of_commits: dict[str, list[PartInfo]] = {}
    for part in parts:
        parts_of_commits.setdefault(parse_commit_name(part.file), []).append(part)
    for file, table in tables.items():
        rows: dict[str, list[dict[str, object]]] = {}
        for row in table.to_pylist():
            rows.setdefault(row["commit"], []).append(row)
        for commit, actual in rows.items():
            counts = commit in committed and latest[commit] == file and actual[0]["file"] is not None
            expected = parts_of_commits.get(commit, [])
            # if a file is missing or a twin, the commit is read instead of these rows
            if counts and {row["file"] for row in actual} <= {part.file for part in expected}:
                yield from _compare(file, commit, actual, expected)


def _compare(file: str, commit: str, actual: list[dict[str, object]], parts: Sequence[PartInfo]) -> Iterator[Problem]:
    expected = make_table([(commit, part.summary) for part in parts]).to_pylist()
    if sorted(actual, key=lambda row: str(row["file"])) != sorted(expected, key=lambda row: str(row["file"])):
        yield Problem(file, f"its rows for {commit} differ from the records of its parts", REBUILD_HINT)


def rebuild_log(folder: Folder) -> None:
    """Empty the files of the log. The next end of a run reads the commits, and adds them to the log again.

    The oldest file is emptied first, because rows of an older file must never count again.
    """
    for name in commit_log.list_log_files(folder):
        folder.replace(f"{commit_log.FOLDER}/{name}", commit_log.encode_log(SCHEMA.empty_table()))
