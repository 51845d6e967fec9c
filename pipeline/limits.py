"""Limits of the inputs. An input above a limit is a reject or a failed unit. It never exhausts a process's memory.

Each limit can be set by `--input-limit NAME=N`. No limit is part of a cache's identity: samples above a limit are
recorded as rejected, and `retry` encodes them under other limits.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import Rejected
from pipeline.text import CONTROL, decode_text, join_tags
from pipeline.values import iter_texts, size_in_bytes

TAGS = "tags"  # the text whose lines are single tags
_HIDDEN = re.compile(r"__[^/]*__/")  # webdataset skips folders of a shard that have such names


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits.

    image_bytes: bytes of an encoded image. pixels, side: pixels of a decoded image, in total and of its longer side;
    checked before it is decoded. text_bytes: bytes of a caption, or of any other text beside an image.
    key_bytes: bytes of a key. columns_bytes: bytes of memory for the columns of a part's rows until the part is
    written; each row may take an equal share. members: files in a tar or a zip. table_bytes: bytes of memory for the
    tables of metadata and paths that a process keeps. header_bytes: bytes of one extended header of a tar.
    footer_bytes: bytes of a Parquet file's footer, or of a zip's directory. batch_bytes: bytes of a record batch of an
    Arrow file. expansion: how many times larger than its file the content of a gzip file may be, beyond its first GiB.
    seconds, memory: seconds and bytes of memory for one image, if it is decoded in a separate process because a worker
    died.
    """

    image_bytes: int = 64 << 20
    pixels: int = 100_000_000
    side: int = 65_535
    text_bytes: int = 1 << 20
    columns_bytes: int = 1 << 30
    key_bytes: int = 512
    members: int = 1_000_000
    table_bytes: int = 1 << 30
    header_bytes: int = 1 << 20
    footer_bytes: int = 64 << 20
    batch_bytes: int = 512 << 20
    expansion: int = 100
    seconds: int = 20
    memory: int = 2 << 30


DEFAULT_LIMITS = Limits()


def check_key(key: str, limits: Limits) -> None:
    """Raise Rejected for a key that is unsafe: readers of the cache use it as the name of tar members and files."""
    if (
        not key
        or len(key.encode(errors="replace")) > limits.key_bytes
        or CONTROL.search(key)
        or key.startswith("/")
        or key.endswith("/")
        or {".", ".."} & set(key.split("/"))
        or _HIDDEN.match(key)
    ):
        raise Rejected("read", "bad_key", limits.key_bytes)


def check_columns(columns: Mapping[str, object], limits: Limits) -> None:
    """Raise Rejected if a text among the values, or inside a value, is too long."""
    for name, value in columns.items():
        if any(len(text.encode()) > limits.text_bytes for text in iter_texts(value)):
            raise Rejected("read", "text_too_long", name, limits.text_bytes)


def check_share(columns: Mapping[str, object], rows: int, limits: Limits) -> None:
    """Raise Rejected if the columns of a row take more than its share of a part with `rows` rows.

    Only the row's own columns count, because the result of a sample must not depend on other samples.
    """
    share = limits.columns_bytes // rows
    size = sum(size_in_bytes(value) for value in columns.values())
    if size > share:
        raise Rejected("read", "columns_too_large", size, share)


def check_text(data: bytes | None, name: str, limits: Limits, encoding: str = "utf-8") -> str | None:
    """Return the text in a file beside an image (`decode_text`), and tags on one line. Return None if `data` is None.

    name: the extension of the file. Raises Rejected if the text is too long, or is not in the encoding.
    """
    if data is None:
        return None
    if len(data) > limits.text_bytes:
        raise Rejected("read", "text_too_long", name, limits.text_bytes)
    try:
        text = decode_text(data, encoding)
        return join_tags(text) if name == TAGS else text
    except UnicodeDecodeError:
        raise Rejected("read", "bad_text", name) from None
