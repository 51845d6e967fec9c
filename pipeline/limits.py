"""What an input may be at most. More is a reject or a failed unit, never a process without memory.

Each can be set by `--input-limit NAME=N`. No number is part of a cache's identity: what is kept out is recorded as
rejected, and `retry` takes it up under other limits.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import Rejected
from pipeline.values import iter_texts, size_in_bytes

# what steers a terminal or turns the letters of a line around: C0, C1, separators of lines, bidirectional overrides
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_HIDDEN = re.compile(r"__[^/]*__/")  # webdataset passes over a shard's folders of such names
_NOT_UTF8 = re.compile(r"[\udc80-\udcff]")  # what Python makes of a byte that is none
_INSTEAD = "\x1a"  # SUBSTITUTE: no key may have it


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The numbers; bytes unless said.

    image_bytes: of an encoded image. pixels, side: of an image once it is open; checked before it is.
    text_bytes: of a caption, or of any other text beside an image. key_bytes: of a key.
    columns_bytes: that the columns of a part's rows take until it is written; each row may take an equal share.
    members: files in a tar. header_bytes: of one extended header of a tar. footer_bytes: of a Parquet file's footer.
    seconds, memory: for one image, where it is opened by a process of its own because another one died.
    """

    image_bytes: int = 64 << 20
    pixels: int = 100_000_000
    side: int = 65_535
    text_bytes: int = 1 << 20
    columns_bytes: int = 1 << 30
    key_bytes: int = 512
    members: int = 1_000_000
    header_bytes: int = 1 << 20
    footer_bytes: int = 64 << 20
    seconds: int = 20
    memory: int = 2 << 30


DEFAULT_LIMITS = Limits()


def to_valid_text(name: str) -> str:
    """A name as valid text. One that is not UTF-8, its odd bytes lone surrogates, becomes one that no key may be."""
    return _NOT_UTF8.sub(lambda byte: f"{_INSTEAD}x{ord(byte[0]) - 0xDC00:02x}", name)


def check_key(key: str, limits: Limits) -> None:
    """Raise Rejected for a key that could lead a reader of the cache astray: it names members of tars, and files."""
    if (
        not key
        or len(key.encode(errors="replace")) > limits.key_bytes
        or _CONTROL.search(key)
        or key.startswith("/")
        or key.endswith("/")
        or {".", ".."} & set(key.split("/"))
        or _HIDDEN.match(key)
    ):
        raise Rejected("read", "bad_key", limits.key_bytes)


def printable_key(key: str, limits: Limits) -> str:
    """A key as a reject names it: as long as a key may be, its control characters and odd bytes as escapes."""
    return printable(key[: limits.key_bytes])[: limits.key_bytes]


def printable(text: str) -> str:
    """A text that a terminal can show, as `text_of` gave it."""
    return _CONTROL.sub(lambda one: one[0].encode("unicode_escape").decode(), text.replace(_INSTEAD, "\\"))


def check_columns(columns: Mapping[str, object], limits: Limits) -> None:
    """Raise Rejected where a text among the values, or inside one, is too long."""
    for name, value in columns.items():
        if any(len(text.encode()) > limits.text_bytes for text in iter_texts(value)):
            raise Rejected("read", "text_too_long", name, limits.text_bytes)


def check_share(columns: Mapping[str, object], rows: int, limits: Limits) -> None:
    """Raise Rejected where columns take more than a row's share of a part of so many rows.

    Of its own columns alone: what becomes of a sample must not depend on those beside it.
    """
    share = limits.columns_bytes // rows
    size = sum(size_in_bytes(value) for value in columns.values())
    if size > share:
        raise Rejected("read", "columns_too_large", size, share)


def check_text(data: bytes | None, name: str, limits: Limits) -> str | None:
    """The text in a file beside an image, without a byte-order mark; None of None.

    Raises Rejected where it is too long, or none.
    """
    if data is None:
        return None
    if len(data) > limits.text_bytes:
        raise Rejected("read", "text_too_long", name, limits.text_bytes)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Rejected("read", "bad_text", name) from None
