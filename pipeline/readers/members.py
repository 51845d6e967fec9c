"""Members of a tar or a zip: their keys and extensions, and which of them are the image or a column of a sample."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from pipeline.errors import Rejected
from pipeline.limits import Limits
from pipeline.records import IMAGE_EXTENSIONS, TEXT_EXTENSIONS, image_rank
from pipeline.text import printable, to_valid_text

_SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir"})  # macOS's Archive Utility; Synology's thumbnails
_SYSTEM_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"})
# common documents and indexes beside samples: by the name up to the first dot, or by the last extension
_STRAY_NAMES = frozenset(
    {
        *("readme", "license", "licence", "copying", "notice", "authors", "citation", "changelog", "version"),
        *("manifest", "index", "metadata", "dataset_info", "checksum", "checksums", "md5sum", "md5sums", "sha1sums"),
        *("sha256sum", "sha256sums", "sha512sums", "_success"),
    }
)
_STRAY_EXTENSIONS = frozenset(
    {"md", "rst", "idx", "index", "tsv", "csv", "jsonl", "lst", "log", "md5", "sha1", "sha256", "sha512", "sfv"}
)
_SKIPPED_BY_WEBDATASET = re.compile(r"__[^/]*__(/|$)")
# extensions of images, and of images whose format is not named
_IMAGE_LIKE = IMAGE_EXTENSIONS | {"img", "image", "jpg_large"}
_BINARY = frozenset({"npy", "npz", "pt", "pth", "safetensors", "bin"})  # further members that are not text
_NAMED = 5  # extensions in a reject's detail
_NAMED_LENGTH = 20  # characters of each extension


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a tar or a zip.

    size: in bytes. data: its content; None if it is not needed, is above its limit, or cannot be read (`problem`).
    is_link: whether it is a link or a device, which has no content. start: of a tar, its first byte.
    """

    name: str
    size: int
    data: bytes | None
    is_link: bool = False
    problem: Rejected | None = None
    start: int = 0

    @property
    def base(self) -> str:
        """The name without its folders."""
        return self.name.rpartition("/")[2]

    @property
    def key(self) -> str:
        """The path up to the first dot of the base name."""
        folder, slash, base = self.name.rpartition("/")
        return folder + slash + base.split(".", 1)[0]

    @property
    def extension(self) -> str:
        """Everything after the first dot of the base name, in lower case."""
        return self.base.partition(".")[2].lower()

    @property
    def is_image(self) -> bool:
        """Whether it is an image, by its extension."""
        return self.extension in IMAGE_EXTENSIONS

    @property
    def is_hidden(self) -> bool:
        """Whether it belongs to an operating system: `._NAME` of macOS, `Thumbs.db`, a file in a hidden folder.

        An image whose whole name is its extension (`.jpg`) is not hidden: it is an image without a key.
        """
        folders = self.name.split("/")[:-1]
        if any(step in _SYSTEM_FOLDERS or (step.startswith(".") and step.strip(".")) for step in folders):
            return True
        return (self.base.startswith(".") and not self.is_image) or self.base.lower() in _SYSTEM_FILES


@dataclass(frozen=True, slots=True)
class Wanted:
    """The members that are read.

    image: the extension of the image of a sample, whatever its format; None: all extensions of images.
    texts: the extensions of the members that become columns. binary: those of them that are copied as bytes.
    encoding: of the others.
    """

    texts: tuple[str, ...] = TEXT_EXTENSIONS
    image: str | None = None
    binary: frozenset[str] = frozenset()
    encoding: str = "utf-8"

    def is_image(self, member: Member) -> bool:
        """Whether a member is the image of its sample."""
        return member.is_image if self.image is None else member.extension == self.image.lower()

    def get_rank(self, member: Member) -> int:
        """Return the rank of an image among images of one key: of several formats, the lowest one is used."""
        return image_rank(member.extension) if self.image is None else 0

    def select_images(self, members: Iterable[Member]) -> list[Member]:
        """Return the images of one key. Of several formats, those are left out that are harder to read."""
        images = [member for member in members if self.is_image(member)]
        best = min(map(self.get_rank, images), default=0)
        return [image for image in images if self.get_rank(image) == best]

    def limit_bytes(self, member: Member, limits: Limits) -> int:
        """Return the size in bytes up to which the content of a member is kept."""
        if member.is_hidden:
            return 0
        if self.is_image(member) or member.extension in self.binary:
            return limits.image_bytes
        return limits.text_bytes if member.extension in self.texts else 0


DEFAULT_WANTED: Final = Wanted()


def looks_like_image(member: Member) -> bool:
    """Whether the last part of a member's extension is that of an image: `.seg.png`, `.img`."""
    return member.extension.rpartition(".")[2] in _IMAGE_LIKE


def holds_bytes(extension: str) -> bool:
    """Whether the content of members with this extension is not text."""
    return extension.rpartition(".")[2] in _IMAGE_LIKE | _BINARY


def clean_name(name: bytes | str) -> str:
    """Return a member's name as text. The `\\` of Windows becomes `/`, and a leading `./` is removed."""
    text = name.decode(errors="surrogateescape") if isinstance(name, bytes) else name
    return to_valid_text(text).replace("\\", "/").removeprefix("./")


def is_stray(members: Sequence[Member], texts: Sequence[str]) -> bool:
    """Whether members of one key, none of them an image, are documents or indexes, and not an incomplete sample.

    texts: extensions of the members that are copied as columns.
    """
    return all(_is_stray(member, texts) for member in members)


def _is_stray(member: Member, texts: Sequence[str]) -> bool:
    """Whether one member is a document or an index."""
    if _SKIPPED_BY_WEBDATASET.match(member.name) or member.base.split(".", 1)[0].lower() in _STRAY_NAMES:
        return True
    return member.extension not in texts and member.extension.rpartition(".")[2] in _STRAY_EXTENSIONS


def fold_key(key: str) -> str:
    """Return a text that is equal for keys which differ only in the case of letters or in Unicode normalization."""
    return unicodedata.normalize("NFC", key).casefold()


def explain_no_image(members: Sequence[Member], wanted: Wanted, hint: str = "") -> Rejected:
    """Return the error for members of one key without an image. hint: appended to its detail."""
    more = f" and {count} more" if (count := len({member.extension for member in members}) - _NAMED) > 0 else ""
    missing = f", not in .{printable(wanted.image)}" if wanted.image else ""
    files = f": its files end in {', '.join(name_extensions(members))}{more}{missing}"
    files += " (a key ends at the first dot of a file's name)"
    if not hint and (others := name_extensions(filter(looks_like_image, members))):
        hint = f"; if {others[0]} is the image, encode with --image-column {others[0].removeprefix('.')}"
    return Rejected("read", "no_image", more=files + hint)


def name_extensions(members: Iterable[Member]) -> list[str]:
    """Return the first few extensions of members, shortened and printable."""
    ends = list(dict.fromkeys(member.extension for member in members))[:_NAMED]
    return ["." + printable(end[:_NAMED_LENGTH])[:_NAMED_LENGTH] if end else "nothing" for end in ends]
