"""Read the boxes of a file of ISO's formats: JPEG 2000 (ISO/IEC 15444-1, I.4) and JPEG XL (ISO/IEC 18181-2)."""

from collections.abc import Iterator

_PROFILE_METHODS = (b"\2", b"\3")  # METH of a `colr` box with a profile: a restricted one, or (in JPX files) any


def read_boxes(data: bytes, at: int = 0, end: int | None = None) -> Iterator[tuple[bytes, int, int]]:
    """Yield the type of each box of data[at:end], and the places at which its content starts and ends.

    They end at the first box that is damaged. A box that is longer than the data ends with it.
    """
    end = len(data) if end is None else min(end, len(data))
    while at + 8 <= end:
        size, kind, start = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8], at + 8
        if size == 1:  # the real size follows
            size, start = int.from_bytes(data[start : start + 8]), start + 8
        at = at + size if size else end  # a box without a size is the last one
        if at < start:
            return
        yield kind, start, min(at, end)


def read_jp2_profile(data: bytes) -> bytes | None:
    """Return the color profile of a JPEG 2000 file. None: it has none, or is a codestream without boxes.

    As in the standard and in OpenJPEG, only the first `colr` box counts.
    """
    for box, start, end in read_boxes(data):
        if box == b"jp2h":
            colors = (data[at:stop] for kind, at, stop in read_boxes(data, start, end) if kind == b"colr")
            color = next(colors, b"")
            return color[3:] if color[:1] in _PROFILE_METHODS else None  # METH, PREC and APPROX, a byte each
    return None
