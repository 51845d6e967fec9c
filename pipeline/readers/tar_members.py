"""Members of a tar: their keys and extensions, and which of them are no part of any sample."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import Rejected
from pipeline.limits import printable
from pipeline.records import IMAGE_EXTENSIONS

# what a unit's report counts of what it passed over
HIDDEN = "hidden"
STRAY = "stray"
APART = "apart"

_SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir"})  # macOS's Archive Utility; Synology's thumbnails
_SYSTEM_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"})
# documents and indexes as people put them beside samples: by name up to the first dot, or by last extension
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
_PASSED_OVER_BY_WEBDATASET = re.compile(r"__[^/]*__(/|$)")
_NAMED = 5  # extensions in a reject's detail
_NAMED_LETTERS = 20  # of each


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar: its name, size and content; None of one that is too large for what it is.

    is_link: or a device; it has no content of its own.
    """

    name: str
    size: int
    data: bytes | None
    is_link: bool = False

    @property
    def base(self) -> str:
        return self.name.rpartition("/")[2]

    @property
    def key(self) -> str:
        folder, slash, base = self.name.rpartition("/")
        return folder + slash + base.split(".", 1)[0]

    @property
    def extension(self) -> str:
        return self.base.partition(".")[2].lower()

    @property
    def is_image(self) -> bool:
        return self.extension in IMAGE_EXTENSIONS

    @property
    def is_hidden(self) -> bool:
        """Whether it is an operating system's: `._NAME` of macOS, `Thumbs.db`, what is in a hidden folder.

        An image whose whole name is its extension (`.jpg`) is none: it is an image without a key.
        """
        folders = self.name.split("/")[:-1]
        if any(step in _SYSTEM_FOLDERS or (step.startswith(".") and step.strip(".")) for step in folders):
            return True
        return (self.base.startswith(".") and not self.is_image) or self.base.lower() in _SYSTEM_FILES


def is_stray(members: Sequence[Member], texts: Sequence[str]) -> bool:
    """Whether members of one key, none of them an image, are documents or indexes and not what is left of a sample.

    texts: extensions of the members that come along as columns.
    """
    return all(_is_stray(member, texts) for member in members)


def _is_stray(member: Member, texts: Sequence[str]) -> bool:
    if _PASSED_OVER_BY_WEBDATASET.match(member.name) or member.base.split(".", 1)[0].lower() in _STRAY_NAMES:
        return True
    return member.extension not in texts and member.extension.rpartition(".")[2] in _STRAY_EXTENSIONS


def fold_key(key: str) -> str:
    """What keys have in common that differ in the case of letters or in Unicode normalization only."""
    return unicodedata.normalize("NFC", key).casefold()


def explain_no_image(members: Sequence[Member], why: str = "") -> Rejected:
    """The reject of members of one key without an image. why: what is known of the image."""
    ends = list(dict.fromkeys(member.extension for member in members))
    named = ["." + printable(end[:_NAMED_LETTERS])[:_NAMED_LETTERS] if end else "nothing" for end in ends[:_NAMED]]
    more = f" and {len(ends) - _NAMED} more" if len(ends) > _NAMED else ""
    what = f": its files end in {', '.join(named)}{more} (a key ends at the first dot of a file's name)"
    return Rejected("read", "no_image", more=what + why)
