"""One scan of a cache: each part file, in the order of the names, together with the entry of its commit.

Each commit is read once, and few are held at a time. A commit that does not name the parts that exist can be repaired
during the scan.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pipeline.cache import parts as part_files
from pipeline.cache.commits import COMMITS, list_commits, read_commits, repair_commit, write_commit
from pipeline.cache.part_info import PartSummary
from pipeline.cache.parts import DATA, find_empty_duplicates, inspect_part, is_retry_part, strip_extension
from pipeline.canonical_json import VERIFY_HINT
from pipeline.errors import CacheError
from pipeline.records import Container
from pipeline.storage.folder import Folder

CommitEntry = Mapping[str, Any]
T = TypeVar("T")
NOT_COUNTED: dict[str, Any] = {
    "rows": 0,
    "filtered": {},
    "enlarged": 0,
    "reject_counts": {},
    "rest_positions": (),
    "supersedes": (),
    "tally": {},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """How commits are repaired. rehash: files may have been overwritten, so each one is read and hashed."""

    identity_sha256: str
    container: Container
    rehash: bool = False


@dataclass(frozen=True, slots=True)
class CacheListing:
    """The names of a cache's commits and part files.

    The commits are listed before the files. So every file that a listed commit names is in `files`, unless it is lost.
    """

    commits: frozenset[str]
    files: tuple[str, ...]

    @classmethod
    def read(cls, cache: Folder) -> "CacheListing":
        """Return the listing of a cache."""
        commits = frozenset(list_commits(cache))
        return cls(commits, tuple(part_files.list_part_files(cache)))


def strip_folder(file: str) -> str:
    """Return a file's name without its folder. Parts are ordered by it."""
    return file.rpartition("/")[2]


def parse_commit_name(file: str) -> str:
    """Return the name of the commit to which a part's file belongs."""
    stem = strip_folder(strip_extension(file))
    return stem if is_retry_part(stem) else stem.rpartition("-")[0]


def pair_with_commits(
    cache: Folder,
    listing: CacheListing,
    parse_entry: Callable[[str, CommitEntry], T],
    repair: Repair | None = None,
    after: str = "",
) -> Iterator[tuple[str, T | None]]:
    """Yield the files in the order of their names, each with its parsed commit entry; None if no commit names it.

    Each commit is read once, shortly before its first file, and held until its last file.
    parse_entry: called with the commit's name and a part's entry; its result is yielded.
    repair: rewrite commits that do not name the parts that exist; default: leave them alone.
    after: skip the files whose names are not greater than this one, and the commits that have only such files.
    Raises CacheError if a file that a commit names does not exist.
    """
    data_stems = {strip_extension(file) for file in listing.files if file.startswith(f"{DATA}/")}
    listed = set(listing.files)
    files = sorted((file for file in listing.files if strip_folder(file) > after), key=strip_folder)
    files_left = Counter(name for name in map(parse_commit_name, files) if name in listing.commits)
    without_files = listing.commits - set(map(parse_commit_name, listing.files))
    commits = read_commits(cache, [*files_left, *sorted(without_files)])

    def parse_commit(name: str, content: dict[str, Any]) -> dict[str, T]:
        if repair is not None:
            content = repair_commit(
                cache, name, content, data_stems, repair.identity_sha256, repair.container, repair.rehash
            )
        entries = {entry["file"]: parse_entry(name, entry) for entry in content["parts"]}
        check_files_exist(cache, entries.keys() - listed)
        return entries

    held: dict[str, dict[str, T]] = {}
    for file in files:
        name = parse_commit_name(file)
        if name not in files_left:
            yield file, None
            continue
        if name not in held:
            held[name] = parse_commit(*next(commits))
        yield file, held[name].get(file)
        files_left[name] -= 1
        if not files_left[name]:
            del held[name]
    for name, content in commits:
        parse_commit(name, content)


def check_files_exist(cache: Folder, files: Collection[str]) -> None:
    """Raise CacheError if one of these committed files, which were not listed, does not exist now either."""
    for file in sorted(files):
        if cache.read_if_exists(file) is None:
            raise CacheError(f"{cache.url_of(file)} was committed, but is missing: the cache is damaged; {VERIFY_HINT}")


def read_summaries(
    cache: Folder,
    identity_sha256: str,
    listing: CacheListing | None = None,
    repair: Repair | None = None,
    after: str = "",
) -> Iterator[PartSummary]:
    """Yield a summary of each part of a cache, in the order of the file names (`pair_with_commits`).

    A summary is read from the commit of its part, or from the part's file if no commit names it. A part without rows
    counts nothing if the same part exists with rows.
    Raises CacheError if a file that a commit names does not exist.
    """
    listing = listing or CacheListing.read(cache)
    duplicates = find_empty_duplicates(listing.files)

    def parse_entry(name: str, entry: CommitEntry) -> PartSummary:
        return _parse_summary(cache, name, entry)

    for file, committed in pair_with_commits(cache, listing, parse_entry, repair, after):
        is_to_commit = repair is not None and file not in duplicates
        part = committed or _read_uncommitted(cache, file, identity_sha256, is_to_commit)
        yield replace(part, **NOT_COUNTED) if file in duplicates else part


def read_committed_summaries(cache: Folder, names: Iterable[str]) -> Iterator[PartSummary]:
    """Yield a summary of each part of these commits, from the commits alone."""
    for name, content in read_commits(cache, names):
        for entry in content["parts"]:
            yield _parse_summary(cache, name, entry)


def _parse_summary(cache: Folder, name: str, entry: CommitEntry) -> PartSummary:
    try:
        return PartSummary.from_commit(entry)
    except (KeyError, TypeError, AttributeError) as error:
        file = cache.url_of(f"{COMMITS}/{name}.json")
        raise CacheError(f"{file} is corrupt: it does not describe its parts; {VERIFY_HINT}") from error


def _read_uncommitted(cache: Folder, file: str, identity_sha256: str, is_to_commit: bool) -> PartSummary:
    """Read a part from its own file.

    is_to_commit: write the commit of a retry part, because the retry ended before it did.
    """
    part = inspect_part(cache, file, identity_sha256)
    if part is None:
        raise CacheError(f"{cache.url_of(file)} was listed, and was removed since; try again")
    if is_to_commit and part.record.round:
        write_commit(cache, [part])
    return part.summary
