"""Which texts belong to which images of a folder, and how a unit keeps what all of them were when it was planned.

A text has the name of its image, `a.txt` or `a.jpg.txt`; where there are both, the longer name counts. If no text has
exactly that name, one whose name differs in the case of letters or in its Unicode normalisation does, unless there are
several, or several images that it could belong to.
"""

import hashlib
import json
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.canonical_json import VERIFY_HINT, canonical_json
from pipeline.errors import CacheError
from pipeline.records import File, Shard, Unit, extension, is_image, stem
from pipeline.storage.etags import same_etag

SHARDS = frozenset({"tar", "parquet"})
UNKNOWN = -1  # bytes of a file that need not be what was planned


@dataclass(frozen=True, slots=True)
class SidecarIndex:
    """texts: those of each image that has any, by the image's path, one for each extension; unused: the others."""

    texts: Mapping[str, Sequence[Shard]]
    unused: Sequence[str]


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """An image and its texts, as they were planned."""

    image: File
    texts: tuple[File, ...]

    def unpinned(self) -> "ImageFiles":
        """The same files, whatever they are by now."""
        image, *texts = (File(file.path, UNKNOWN, "") for file in (self.image, *self.texts))
        return ImageFiles(image, tuple(texts))


def folder_of(path: str) -> str:
    """The folder of a file, with the `/` at its end."""
    return path[: path.rfind("/") + 1]


def fold_name(path: str) -> str:
    """A path that is equal for names which differ only in the case of letters or in their Unicode normalisation."""
    folder = folder_of(path)
    name = unicodedata.normalize("NFC", path[len(folder) :]).casefold()
    return folder + unicodedata.normalize("NFC", name)


def names_for(image: str) -> tuple[str, str]:
    """What the texts of an image are called but for their extension; the one that counts first."""
    return image, stem(image)


def possible_texts(names: Iterable[str]) -> dict[str, list[str]]:
    """Those of these names of files that could be of texts of images, by what they have in common with an image's."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if not is_image(name) and extension(name) not in SHARDS:
            found[fold_name(stem(name))].append(name)
    return found


def is_near(texts: Mapping[str, Iterable[str]], images: Iterable[str]) -> Iterator[str]:
    """Those of `possible_texts` that could be of one of the images."""
    called = {fold_name(name) for image in images for name in names_for(image)}
    return (text for name in called for text in texts.get(name, ()))


def match_sidecars(shards: Sequence[Shard], wanted: Collection[str]) -> SidecarIndex:
    """The texts beside all images among the shards. wanted: extensions of texts, in small letters."""
    images = [shard for shard in shards if is_image(shard.path)]
    left = {shard.path: shard for shard in shards if extension(shard.path) in wanted} if images else {}
    found: dict[str, list[Shard]] = {}
    for key in (_exact, _small_extension, fold_name):
        if not left:
            break
        pairs = list(_pairs(images, left.values(), wanted, key, found))
        for image, text in pairs if key is _exact else _with_one_owner(pairs):
            found.setdefault(image, []).append(text)
            left.pop(text.path, None)
    return SidecarIndex(found, _unused(left.values(), shards, images) if left else [])


def _exact(path: str) -> str:
    return path


def _small_extension(path: str) -> str:
    return f"{stem(path)}.{extension(path)}"


def _pairs(
    images: Iterable[Shard],
    texts: Iterable[Shard],
    wanted: Collection[str],
    key: Callable[[str], str],
    found: Mapping[str, Sequence[Shard]],
) -> Iterator[tuple[str, Shard]]:
    """The path of each image with a text that it lacks so far: the only one whose key is that of the text's name."""
    by_key: dict[str, list[Shard]] = defaultdict(list)
    for text in texts:
        by_key[key(text.path)].append(text)
    for image in images:
        had = {extension(text.path) for text in found.get(image.path, ())}
        for kind in wanted:
            if kind not in had:
                so_called = (by_key.get(key(f"{name}.{kind}")) for name in names_for(image.path))
                match next(filter(None, so_called), ()):
                    case [text]:
                        yield image.path, text


def _with_one_owner(pairs: Sequence[tuple[str, Shard]]) -> Iterator[tuple[str, Shard]]:
    """The pairs whose text belongs to one image only, or to several of one name."""
    stems: dict[str, set[str]] = defaultdict(set)
    for image, text in pairs:
        stems[text.path].add(stem(image))
    return ((image, text) for image, text in pairs if len(stems[text.path]) == 1)


def _unused(left: Iterable[Shard], shards: Sequence[Shard], images: Sequence[Shard]) -> list[str]:
    """The texts among those that are left which could have been meant for an image: not the metadata of shards."""
    roots = {image.root for image in images}
    of_shards = {folder_of(shard.path) for shard in shards if extension(shard.path) in SHARDS}
    of_shards -= {folder_of(image.path) for image in images}
    return sorted(text.path for text in left if text.root in roots and folder_of(text.path) not in of_shards)


def files_of(image: Shard, texts: Mapping[str, Sequence[Shard]]) -> ImageFiles:
    """An image and its texts as they were listed."""
    beside = sorted(texts.get(image.path, ()), key=lambda text: text.path)
    first, *others = (File(shard.path, shard.bytes, shard.etag) for shard in (image, *beside))
    return ImageFiles(first, tuple(others))


def pack_files(images: Iterable[ImageFiles]) -> str:
    """What images and their texts are, as canonical JSON: one text a unit, because there may be millions of them."""
    content = []
    for files in images:
        names = [[text.path[len(folder_of(text.path)) :], text.bytes, text.etag] for text in files.texts]
        content.append([files.image.bytes, files.image.etag, names])
    return canonical_json(content).decode()


def pin_files(images: Sequence[ImageFiles]) -> dict[str, Any]:
    """What a folder's unit says of the content of its files."""
    files = pack_files(images)
    size = sum(each.image.bytes for each in images)
    return {"bytes": size, "etag": hashlib.sha256(files.encode()).hexdigest(), "files": files}


def unpack_files(unit: Unit) -> list[ImageFiles]:
    """The files of a folder's unit, as they were planned."""
    try:
        return [
            ImageFiles(File(path, size, etag), tuple(File(folder_of(path) + name, *facts) for name, *facts in texts))
            for path, (size, etag, texts) in zip(unit.paths, json.loads(unit.files), strict=True)
        ]
    except (ValueError, TypeError) as error:
        raise CacheError(f"the plan does not say what the files of the unit {unit.name} are; {VERIFY_HINT}") from error


def find_differences(before: ImageFiles, now: ImageFiles, same_source: bool = False) -> Iterator[str]:
    """The paths of what is not as it was: edited, or only in one of the two. same_source: as for `same`."""
    earlier, later = ({file.path: file for file in (files.image, *files.texts)} for files in (before, now))
    for path in sorted(earlier.keys() | later.keys()):
        if path not in earlier or path not in later or not is_same_file(earlier[path], later[path], same_source):
            yield path


def is_same_file(before: File, now: File | Shard, same_source: bool = False) -> bool:
    """Whether a file is as it was, as far as its size and its ETag tell; one that is unknown tells nothing.

    same_source: the user says that a file of this path and size is the one that was planned.
    """
    return before.bytes == now.bytes and (same_source or same_etag(before.etag, now.etag))
