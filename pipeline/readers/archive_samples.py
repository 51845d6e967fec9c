"""Turn the members of a tar or a zip into samples: an image, and the columns that other members of its key hold."""

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Set
from dataclasses import replace
from typing import Any

from pipeline.errors import Rejected
from pipeline.limits import Limits, check_key, check_text
from pipeline.readers.members import Member, Wanted, explain_no_image, fold_key, is_stray, looks_like_image
from pipeline.readers.metadata import LABEL_TABLE, METADATA_NAMES
from pipeline.readers.skipped import APART, OTHER_IMAGES, STRAY, TABLES
from pipeline.records import Reject, Sample
from pipeline.text import printable_key

NO_IMAGE = Member("", 0, b"")
APART_FROM_IMAGE = "; its image is elsewhere in the tar: the files of a sample must be adjacent"
OTHER_SPELLING = (
    "; the key of an image differs only in the case of letters or in Unicode normalization: rename one of them"
)


def make_samples(
    members: Iterator[Member], wanted: Wanted, limits: Limits, skipped: Counter[str]
) -> Iterator[Sample | Reject]:
    """Yield the samples that adjacent members of one key form, in the order of the members.

    skipped: receives the number of members that are not part of a sample as STRAY, or as TABLES. As OTHER_IMAGES, it
    receives the images beside the image of a sample that are not wanted. As APART, it receives how many images and
    texts of one key are not adjacent.
    Rejects (stage "read"): `no_image`, `image_not_embedded`, `duplicate_key`, `bad_key`, `too_many_bytes`, `bad_text`,
    `text_too_long`, and the problems of members.
    """
    position = 0
    keys: set[str] = set()  # of images so far
    folded: set[str] = set()  # the same by `fold_key`, if that changes them
    keys_without_image: set[str] = set()
    for key, group in _group_by_key(members, wanted):
        images = wanted.select_images(group)
        tables = 0 if images else sum(map(_is_table, group))
        if not images and (tables == len(group) or is_stray(group, wanted.texts)):
            skipped[TABLES] += tables
            skipped[STRAY] += len(group) - tables
            continue
        other, same = (keys_without_image, keys) if images else (keys, keys_without_image)
        skipped[APART] += key in other and key not in same
        if images and (others := _count_other_images(group, images, wanted)):
            skipped[OTHER_IMAGES] += others
        for image in images or [NO_IMAGE]:
            try:
                if image is NO_IMAGE:
                    keys_without_image.add(key)
                    raise explain_no_image(group, wanted, _explain_missing_image(key, keys, folded))
                if image.is_link:
                    raise Rejected("read", "image_not_embedded")
                check_key(key, limits)
                if key in keys:
                    raise Rejected("read", "duplicate_key")
                keys.add(key)
                if fold_key(key) != key:
                    folded.add(fold_key(key))
                yield Sample(position, key, _get_bytes(image, limits), _collect_columns(group, wanted, limits))
            except Rejected as error:
                yield Reject.from_error(position, printable_key(key, limits.key_bytes), error)
            position += 1


def _is_table(member: Member) -> bool:
    """Whether a member has the name of a table of metadata. EDM2's is in the root of its zip."""
    return member.base in METADATA_NAMES and (member.base != LABEL_TABLE or member.name == LABEL_TABLE)


def _count_other_images(group: Iterable[Member], images: Container[Member], wanted: Wanted) -> int:
    """Return how many members of a key look like images, but are neither its image nor a column."""
    others = (member for member in group if member not in images and member.extension not in wanted.texts)
    return sum(map(looks_like_image, others))


def _get_bytes(image: Member, limits: Limits) -> bytes:
    """Return the bytes of an image. Raises Rejected if they cannot be read, or are too many."""
    if image.problem is not None:
        raise image.problem
    if image.data is None:
        raise Rejected("read", "too_many_bytes", image.size, limits.image_bytes)
    return image.data


def _explain_missing_image(key: str, keys: Set[str], folded: Set[str]) -> str:
    """Return a hint about the image of a sample without one. keys: of images so far. folded: the same by `fold_key`."""
    if key in keys:
        return APART_FROM_IMAGE
    return OTHER_SPELLING if fold_key(key) in keys or fold_key(key) in folded else ""


def _group_by_key(members: Iterator[Member], wanted: Wanted) -> Iterator[tuple[str, list[Member]]]:
    """Yield groups of adjacent members with one key.

    Only the first image of each rank, and the first other member of each extension, keep their bytes. No other member
    is used, and there may be any number of them.
    """
    group: list[Member] = []
    held: set[str] = set()
    for member in members:
        if group and member.key != group[0].key:
            yield group[0].key, group
            group, held = [], set()
        kind = f"image {wanted.get_rank(member)}" if wanted.is_image(member) else f".{member.extension}"
        group.append(replace(member, data=None) if kind in held else member)
        if not member.is_link:
            held.add(kind)
    if group:
        yield group[0].key, group


def _collect_columns(group: list[Member], wanted: Wanted, limits: Limits) -> dict[str, Any]:
    """Return the columns of a sample, by extension. Raises Rejected if one of them cannot be used."""
    columns: dict[str, Any] = {}
    for member in group:
        name = member.extension
        if name in wanted.texts:
            if member.is_link:
                raise Rejected("read", "image_not_embedded")
            if name in columns:  # it is unknown which of them is the image's
                raise Rejected("read", "bad_text", name)
            if member.problem is not None:
                raise member.problem
            if member.data is None:
                raise Rejected("read", "text_too_long", name, wanted.limit_bytes(member, limits))
            value = member.data if name in wanted.binary else check_text(member.data, name, limits, wanted.encoding)
            if value is not None:
                columns[name] = value
    return columns
