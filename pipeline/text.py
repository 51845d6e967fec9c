"""Names and keys as valid text, and as text that is safe to print. Bytes of text files as text."""

import codecs
import hashlib
import re

# characters that control a terminal or reorder a line: C0, C1, line separators, bidirectional overrides
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_NOT_UTF8 = re.compile(r"[\udc80-\udcff]")  # the surrogates in which Python keeps bytes that are not UTF-8
_USER = re.compile(r"(?<=://)[^\s/?#'\"@]*@")  # of a URL
_QUERY = re.compile(r"(://[^\s?#'\"]*)[?#][^\s'\")]*")
_SUBSTITUTE = "\x1a"  # the control character SUBSTITUTE, which no key may contain

_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
BYTE_ORDER_MARKS = (codecs.BOM_UTF8, *_UTF16_MARKS)


def hash_text(text: str) -> int:
    """Return a 64-bit hash of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def to_valid_text(name: str) -> str:
    """Return a name as valid text. Bytes that are not UTF-8 (surrogates) become escapes that no key may contain."""
    if name.isascii():
        return name
    return _NOT_UTF8.sub(lambda byte: f"{_SUBSTITUTE}x{ord(byte[0]) - 0xDC00:02x}", name)


def decode_text(data: bytes, encoding: str = "utf-8") -> str:
    """Return the text of a file, without its byte-order mark. A mark takes precedence over the encoding.

    Raises UnicodeDecodeError if the bytes are not text in this encoding.
    """
    if data.startswith(codecs.BOM_UTF8):
        return data.decode("utf-8-sig")
    if data.startswith(_UTF16_MARKS):
        return data.decode("utf-16")
    return data.decode(encoding)


def join_tags(text: str) -> str:
    """Return the tags of a file on one line: lines are separated by `, `, and empty lines are left out."""
    return ", ".join(line for line in map(str.strip, text.splitlines()) if line)


def printable(text: str) -> str:
    """Return a text of `to_valid_text` with escapes for control characters, safe to print on a terminal."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text.replace(_SUBSTITUTE, "\\"))


def printable_lines(text: str) -> str:
    """Return a text of several lines with escapes for all control characters but the ends of lines."""
    return "\n".join(map(printable, text.split("\n")))


def escape_key(key: str) -> str:
    """Return a key that webdataset can split: with `%` as %25 and `.` as %2E."""
    return key.replace("%", "%25").replace(".", "%2E")


def unescape_key(key: str) -> str:
    """Return a key as it was before `escape_key`."""
    return key.replace("%2E", ".").replace("%25", "%")


def printable_key(key: str, key_bytes: int) -> str:
    """Return a key for a reject: its first `key_bytes`, with escapes for control characters and bytes not in UTF-8."""
    return printable(key[:key_bytes])[:key_bytes]


def hide_credentials(text: str) -> str:
    """Return a text in which URLs have no user and no query, because these may be passwords or signatures."""
    return _QUERY.sub(r"\1?...", _USER.sub("", text))
