"""Match the texts and images of a folder, and store their sizes and ETags in a unit when it is planned.

A text has the name of its image: `a.txt` or `a.jpg.txt`. If both exist, the longer name counts. If no text has exactly
that name, a text whose name differs in the case of letters or in Unicode normalization belongs to the image. It does
not if there are several such texts, or several images that the text could belong to.
"""

import hashlib
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.canonical_json import canonical_json
from pipeline.readers.image_files import ImageFiles, get_folder
from pipeline.readers.metadata import find_metadata
from pipeline.records import ListedFile, PlannedFile, extension, get_shard_kind, is_image, stem


@dataclass(frozen=True, slots=True)
class MetadataIndex:
    """The tables of metadata by path. for_images: those that name images. for_tars: those that have keys."""

    for_images: Mapping[str, ListedFile] = field(default_factory=dict)
    for_tars: Mapping[str, ListedFile] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, ListedFile]:
        """All tables by path."""
        return {**self.for_images, **self.for_tars}

    def pin(self, inputs: Iterable[str]) -> str:
        """Return the tables of these images, or of a tar, with their sizes and ETags; "" if there are none."""
        files: dict[str, ListedFile] = {}
        for path in inputs:
            tables = self.for_images if is_image(path) else self.for_tars
            if found := find_metadata(path, tables):
                files[found] = tables[found]
        return pack_metadata(files[path] for path in sorted(files))


NO_METADATA = MetadataIndex()


@dataclass(frozen=True, slots=True)
class SidecarIndex:
    """texts: by the path of an image, its texts, one per extension. unused: the paths of the other texts.

    metadata: the tables with further columns of images and tars.
    """

    texts: Mapping[str, Sequence[ListedFile]]
    unused: Sequence[str]
    metadata: MetadataIndex = NO_METADATA


def fold_name(path: str) -> str:
    """Return a path that is equal for names which differ only in the case of letters or in Unicode normalization."""
    folder = get_folder(path)
    name = unicodedata.normalize("NFC", path[len(folder) :]).casefold()
    return folder + unicodedata.normalize("NFC", name)


def list_text_names(image: str) -> tuple[str, str]:
    """Return the names that texts of an image may have, without extension. The first one takes precedence."""
    return image, stem(image)


def find_possible_texts(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the file names that may be texts of images, by the folded name that they share with an image."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if not is_image(name) and not get_shard_kind(name):
            found[fold_name(stem(name))].append(name)
    return found


def find_nearby_texts(texts: Mapping[str, Iterable[str]], images: Iterable[str]) -> Iterator[str]:
    """Return the texts that may belong to one of the images. texts: of `find_possible_texts`."""
    folded = {fold_name(name) for image in images for name in list_text_names(image)}
    return (text for name in folded for text in texts.get(name, ()))


def match_sidecars(files: Sequence[ListedFile], wanted: Collection[str]) -> SidecarIndex:
    """Match texts to the images among the files. wanted: extensions of texts, in lower case."""
    images = [file for file in files if is_image(file.path)]
    unmatched = {file.path: file for file in files if extension(file.path) in wanted} if images else {}
    found: dict[str, list[ListedFile]] = {}
    for key in (_keep_path, _lower_extension, fold_name):
        if not unmatched:
            break
        pairs = list(_match_pairs(images, unmatched.values(), wanted, key, found))
        for image, text in pairs if key is _keep_path else _select_unambiguous(pairs):
            found.setdefault(image, []).append(text)
            unmatched.pop(text.path, None)
    return SidecarIndex(found, _find_unused(unmatched.values(), files, images) if unmatched else [])


def _keep_path(path: str) -> str:
    return path


def _lower_extension(path: str) -> str:
    return f"{stem(path)}.{extension(path)}"


def _match_pairs(
    images: Iterable[ListedFile],
    texts: Iterable[ListedFile],
    wanted: Collection[str],
    key: Callable[[str], str],
    found: Mapping[str, Sequence[ListedFile]],
) -> Iterator[tuple[str, ListedFile]]:
    """Yield the path of an image with a text of an extension that it has no text of so far.

    The text must be the only one with the same key as the name that the image's text would have.
    """
    by_key: dict[str, list[ListedFile]] = defaultdict(list)
    for text in texts:
        by_key[key(text.path)].append(text)
    for image in images:
        matched = {extension(text.path) for text in found.get(image.path, ())}
        for kind in wanted:
            if kind not in matched:
                candidates = (by_key.get(key(f"{name}.{kind}")) for name in list_text_names(image.path))
                match next(filter(None, candidates), ()):
                    case [text]:
                        yield image.path, text


def _select_unambiguous(pairs: Sequence[tuple[str, ListedFile]]) -> Iterator[tuple[str, ListedFile]]:
    """Return the pairs whose text belongs to a single image, or to several images with one name."""
    stems: dict[str, set[str]] = defaultdict(set)
    for image, text in pairs:
        stems[text.path].add(stem(image))
    return ((image, text) for image, text in pairs if len(stems[text.path]) == 1)


def _find_unused(texts: Iterable[ListedFile], files: Sequence[ListedFile], images: Sequence[ListedFile]) -> list[str]:
    """Return the unmatched texts that may have been meant for an image, without the metadata of shards."""
    roots = {image.root for image in images}
    of_shards = {get_folder(file.path) for file in files if get_shard_kind(file.path)}
    of_shards -= {get_folder(image.path) for image in images}
    return sorted(text.path for text in texts if text.root in roots and get_folder(text.path) not in of_shards)


def collect_image_files(image: ListedFile, texts: Mapping[str, Sequence[ListedFile]]) -> ImageFiles:
    """Return an image and its texts as they were listed."""
    sidecars = sorted(texts.get(image.path, ()), key=lambda text: text.path)
    first, *others = (PlannedFile(file.path, file.bytes, file.etag) for file in (image, *sidecars))
    return ImageFiles(first, tuple(others))


def pack_files(images: Iterable[ImageFiles]) -> str:
    """Return the sizes and ETags of images and their texts as canonical JSON, one string per unit.

    There may be millions of files.
    """
    content = []
    for files in images:
        names = [[text.path[len(get_folder(text.path)) :], text.bytes, text.etag] for text in files.texts]
        content.append([files.image.bytes, files.image.etag, names])
    return canonical_json(content).decode()


def pack_metadata(tables: Iterable[ListedFile | PlannedFile]) -> str:
    """Return the paths, sizes and ETags of tables as canonical JSON; "" if there are none."""
    content = [[table.path, table.bytes, table.etag] for table in tables]
    return canonical_json(content).decode() if content else ""


def pin_files(images: Sequence[ImageFiles]) -> dict[str, Any]:
    """Return the fields of a folder's unit that pin the content of its files."""
    files = pack_files(images)
    size = sum(image_files.image.bytes for image_files in images)
    return {"bytes": size, "etag": hashlib.sha256(files.encode()).hexdigest(), "files": files}
