"""Inspect a few tars and zips before a cache is created: their extensions, and whether they have images."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import BinaryIO, TypeVar

import pyarrow as pa

from pipeline.errors import DamagedError, NoImagesError, ShardError, StorageError
from pipeline.limits import Limits
from pipeline.readers.members import DEFAULT_WANTED, Member, Wanted, holds_bytes, looks_like_image, name_extensions
from pipeline.readers.tar import read_members
from pipeline.readers.zip import list_members
from pipeline.records import ListedFile, get_shard_kind
from pipeline.storage import reading

T = TypeVar("T")
FILES = 16  # of each kind that are inspected
MEMBERS = 64  # of a tar that are inspected


def pick_spread(files: Sequence[T]) -> list[T]:
    """Return up to FILES of the files, spread evenly."""
    count = min(FILES, len(files))
    return [files[number * len(files) // count] for number in range(count)]


def check_archives(
    archives: Sequence[ListedFile],
    options: Mapping[str, str],
    image: str | None,
    limits: Limits,
    only_zips: bool,
) -> None:
    """Raise ShardError if one of a few archives is of another kind, or if none of them has images.

    Then `--image-column` may help: the first members look like images, or none has the extension that it gives.
    Any other problem of an archive fails only its own unit. image: the extension of the images, if it is given.
    only_zips: whether the sources have nothing but zips.
    """
    wanted = Wanted(image=image)

    def find_others(archive: ListedFile) -> list[Member] | None:
        """Return a member of each extension among the first ones; None if one is an image, or if it is unknown."""
        url = archive.url
        others: dict[str, Member] = {}
        with contextlib.suppress(DamagedError, StorageError), reading.open_stream(url, options, seeking=True) as stream:
            for member in _list_first_members(stream, url, wanted, limits):
                if wanted.is_image(member):
                    return None
                others.setdefault(member.extension, replace(member, data=None))
            return list(others.values())
        return None

    with ThreadPoolExecutor(FILES) as pool:
        found = list(pool.map(find_others, pick_spread(archives)))
        if not any(found) and None not in found and only_zips:
            found = list(pool.map(find_others, archives))
            if not any(found) and None not in found:
                raise NoImagesError(f"{archives[0].url} has no images, nor has any other of the zips")
    members = [member for others in found for member in others or ()]
    candidates = members if image else [member for member in members if looks_like_image(member)]
    if candidates and None not in found:
        ends = ", ".join(name_extensions(candidates))
        missing = f"has the extension .{image}" if image else "is an image by its extension (.jpg, .png and the like)"
        others = " and other archives" if len(archives) > 1 else ""
        raise ShardError(
            f"none of the first members of {archives[0].url}{others} {missing}; they end in {ends}. A key ends at the "
            "first dot of a file's name, and the extension follows. Name the images' extension with --image-column"
        )


def _list_first_members(stream: BinaryIO, url: str, wanted: Wanted, limits: Limits) -> Iterable[Member]:
    """Return the first members of a tar, or all members of a zip; none of a zip without images."""
    if get_shard_kind(url) == "tar":
        return islice(read_members(stream, url, wanted, limits), MEMBERS)
    try:
        return list_members(stream, url, wanted, limits)
    except NoImagesError:
        return ()


def get_member_type(name: str) -> pa.DataType:
    """Return the type of a column from members, by their extension."""
    return pa.binary() if holds_bytes(name) else pa.string()


def find_member_extensions(archives: Sequence[ListedFile], options: Mapping[str, str], limits: Limits) -> set[str]:
    """Return the extensions of the first members of the first undamaged archive, and of damaged ones before it."""
    found: set[str] = set()
    for archive in pick_spread(archives):
        url = archive.url
        try:
            with reading.open_stream(url, options, seeking=get_shard_kind(url) == "zip") as stream:
                found |= {member.extension for member in _list_first_members(stream, url, DEFAULT_WANTED, limits)}
            if found:
                break
        except DamagedError:
            continue
    return found
