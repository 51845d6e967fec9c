"""Members of a tar: their keys and extensions, and which of them are not part of a sample."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import Rejected
from pipeline.records import IMAGE_EXTENSIONS, image_rank
from pipeline.text import printable

# kinds of skipped members that a unit's report counts
HIDDEN = "hidden"
STRAY = "stray"
APART = "apart"

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
_NAMED = 5  # extensions in a reject's detail
_NAMED_LENGTH = 20  # characters of each extension


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a tar.

    size: in bytes. data: its content; None if it is not needed or above its limit.
    is_link: whether it is a link or a device, which has no content.
    """

    name: str
    size: int
    data: bytes | None
    is_link: bool = False

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


def select_images(members: Sequence[Member]) -> list[Member]:
    """Return the images of one key. If they are in several formats, those are left out that are harder to read."""
    images = [member for member in members if member.is_image]
    best = min((image_rank(image.extension) for image in images), default=0)
    return [image for image in images if image_rank(image.extension) == best]


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


def explain_no_image(members: Sequence[Member], hint: str = "") -> Rejected:
    """Return the error for members of one key without an image. hint: appended to its detail."""
    ends = list(dict.fromkeys(member.extension for member in members))
    named = ["." + printable(end[:_NAMED_LENGTH])[:_NAMED_LENGTH] if end else "nothing" for end in ends[:_NAMED]]
    more = f" and {len(ends) - _NAMED} more" if len(ends) > _NAMED else ""
    files = f": its files end in {', '.join(named)}{more} (a key ends at the first dot of a file's name)"
    return Rejected("read", "no_image", more=files + hint)
