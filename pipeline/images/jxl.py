"""Read the size of a JPEG XL image from its header (ISO/IEC 18181-1, SizeHeader).

The plugin of Pillow decodes the whole image when it opens it, so its size must be known, and checked, before.
"""

from pipeline.images.boxes import read_boxes

CODESTREAM = b"\xff\x0a"
CONTAINER = b"\0\0\0\x0cJXL \r\n\x87\n"
_RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}  # width : height
_SIZE_BITS = (9, 13, 18, 30)


def read_jxl_size(data: bytes) -> tuple[int, int]:
    """Return the width and height of a JPEG XL image. Raises ValueError if it has no header."""
    stream = data if data.startswith(CODESTREAM) else _find_codestream(data)
    bits = _Bits(int.from_bytes(stream[2:14], "little"))
    is_small = bits.take(1)
    height = _take_side(bits, is_small)
    ratio = bits.take(3)
    if not ratio:
        return _take_side(bits, is_small), height
    numerator, denominator = _RATIOS[ratio]
    return height * numerator // denominator, height


class _Bits:
    """Bits, the lowest first."""

    def __init__(self, value: int) -> None:
        self.value = value

    def take(self, count: int) -> int:
        taken, self.value = self.value & ((1 << count) - 1), self.value >> count
        return taken


def _take_side(bits: _Bits, is_small: int) -> int:
    return 8 * (bits.take(5) + 1) if is_small else bits.take(_SIZE_BITS[bits.take(2)]) + 1


def _find_codestream(data: bytes) -> bytes:
    """Return the start of the codestream in a container."""
    for kind, start, _ in read_boxes(data):
        at = start + 4 * (kind == b"jxlp")  # after the number of a partial codestream
        if kind in (b"jxlc", b"jxlp") and data.startswith(CODESTREAM, at):
            return data[at : at + 32]
    raise ValueError("no codestream")
