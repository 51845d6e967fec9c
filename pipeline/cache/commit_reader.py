"""`_commits`, read once: what it says of each part, in the order of the parts' names, a few commits at a time.

Where it does not say what stands, it is mended on the way.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.cache import parts as part_files
from pipeline.cache.commits import commit_names, read_commits, repair_commit
from pipeline.cache.parts import DATA, is_retry_part, stem_of
from pipeline.canonical_json import VERIFY_HINT
from pipeline.errors import CacheError
from pipeline.records import Container
from pipeline.storage.folder import Folder

PartFacts = Mapping[str, Any]
Out = TypeVar("Out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """How commits are mended. again: files may have been overwritten, so that each is read."""

    identity: str
    container: Container
    again: bool = False


@dataclass(frozen=True, slots=True)
class CacheListing:
    """The names of a cache's commits and files. Commits were listed first: all that they name is in `files`."""

    commits: frozenset[str]
    files: tuple[str, ...]

    @classmethod
    def of(cls, cache: Folder) -> "CacheListing":
        commits = frozenset(commit_names(cache))
        return cls(commits, tuple(part_files.list_part_files(cache)))


def file_name(file: str) -> str:
    """A file's name without its folder: what parts are ordered by."""
    return file.rpartition("/")[2]


def commit_name(file: str) -> str:
    """The name of the commit that has a file's part."""
    stem = file_name(stem_of(file))
    return stem if is_retry_part(stem) else stem.rpartition("-")[0]


def pair_with_commits(
    cache: Folder,
    listing: CacheListing,
    understand: Callable[[str, PartFacts], Out],
    mending: Repair | None = None,
    after: str = "",
) -> Iterator[tuple[str, Out | None]]:
    """The files in the order of their own names, each with what its commit says of it; None where no commit does.

    Each commit is read once, shortly before its first file, and held until its last.
    understand: makes of a commit's name and what it says of a part what is handed out.
    after: leave out the files whose names are not greater, and the commits that have only such.
    Raises CacheError for a file that a commit names and that is not there.
    """
    full = {stem_of(file) for file in listing.files if file.startswith(f"{DATA}/")}
    standing = set(listing.files)
    files = sorted((file for file in listing.files if file_name(file) > after), key=file_name)
    left = Counter(name for name in map(commit_name, files) if name in listing.commits)
    without_files = listing.commits - set(map(commit_name, listing.files))
    reading = read_commits(cache, [*left, *sorted(without_files)])

    def parts_of(name: str, content: dict[str, Any]) -> dict[str, Out]:
        if mending is not None:
            content = repair_commit(cache, name, content, full, mending.identity, mending.container, mending.again)
        parts = {said["file"]: understand(name, said) for said in content["parts"]}
        check_files_exist(cache, parts.keys() - standing)
        return parts

    held: dict[str, dict[str, Out]] = {}
    for file in files:
        name = commit_name(file)
        if name not in left:
            yield file, None
            continue
        if name not in held:
            held[name] = parts_of(*next(reading))
        yield file, held[name].get(file)
        left[name] -= 1
        if not left[name]:
            del held[name]
    for name, content in reading:
        parts_of(name, content)


def check_files_exist(cache: Folder, files: Collection[str]) -> None:
    """Raise CacheError for a committed file that was not listed, unless it came after the listing."""
    for file in sorted(files):
        if cache.read_if_there(file) is None:
            raise CacheError(f"{cache.at(file)} is gone, but was committed: the cache is damaged; {VERIFY_HINT}")
