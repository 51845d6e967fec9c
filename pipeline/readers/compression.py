"""Detect archives by their bytes or names. Those that are not supported are named: only gzip is decompressed."""

from collections.abc import Sequence

from pipeline.records import ListedFile
from pipeline.text import printable

ADVICE = "compress it with gzip instead, decompress it (unzstd, unxz, bunzip2), or unpack it into a folder"
_FIRST_BYTES = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "rar",
}
_ENDINGS = (
    *(f".tar.{name}" for name in ("zst", "xz", "bz2", "lz4", "z")),
    *(".tzst", ".txz", ".tbz", ".tbz2", ".7z", ".rar"),
)
_NAMED = 3


def detect_archive(start: bytes) -> str | None:
    """Return the kind of archive that begins with these bytes, or None if it is not a known one."""
    return next((kind for first, kind in _FIRST_BYTES.items() if start.startswith(first)), None)


def find_archives(files: Sequence[ListedFile]) -> str:
    """Return a message that names the unsupported archives among the files, and a remedy; "" if there are none."""
    urls = [file.url for file in files if file.path.lower().endswith(_ENDINGS)]
    if not urls:
        return ""
    more = f" and {len(urls) - _NAMED} more" if len(urls) > _NAMED else ""
    return f"archives of this kind are not supported: {', '.join(map(printable, urls[:_NAMED]))}{more}; {ADVICE}"
