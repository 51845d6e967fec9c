"""Color profiles (ICC.1:2022, version 2) made from numbers, and the colors that they stand for."""

import struct
from collections.abc import Mapping, Sequence

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
P3_TO_XYZ = np.array([[0.51512, 0.29198, 0.1571], [0.2412, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
XYZ_TO_SRGB = np.array([[3.13414, -1.61739, -0.49063], [-0.97880, 1.91610, 0.03345], [0.07194, -0.22897, 1.40526]])
CYAN, BLACK, PAPER = (55.0, -37.0, -50.0), (0.0, 0.0, 0.0), (100.0, 0.0, 0.0)  # Lab


def make_p3(gamma: float = 2.2) -> bytes:
    """Return a profile with the primaries of Display P3 and a plain gamma."""
    columns = {name: _xyz(P3_TO_XYZ[:, index]) for index, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    return _make_profile(b"mntr", b"RGB ", b"XYZ ", columns | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(gamma)))


def embed_in_jp2(data: bytes, profile: bytes, method: int = 2, color: bytes = b"") -> bytes:
    """Return a JPEG 2000 file with a profile instead of the `colr` box that Pillow wrote. color: a further such box."""
    header, old = data.index(b"jp2h") - 4, data.index(b"colr") - 4
    size, old_end = int.from_bytes(data[header : header + 4]), old + int.from_bytes(data[old : old + 4])
    boxes = make_box(b"colr", bytes([method, 0, 0]) + profile) + color
    content = data[header + 8 : old] + boxes + data[old_end : header + size]
    return data[:header] + make_box(b"jp2h", content) + data[header + size :]


def make_box(kind: bytes, content: bytes, is_long: bool = False) -> bytes:
    """Return a box of an ISO format. is_long: with a size of 64 bits."""
    if is_long:
        return struct.pack(">I4sQ", 1, kind, 16 + len(content)) + content
    return struct.pack(">I4s", 8 + len(content), kind) + content


def make_gray(gamma: float) -> bytes:
    return _make_profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": _curve(gamma)})


def make_cmyk() -> bytes:
    """Return a profile in which black ink, and any two inks, give black; cyan gives CYAN; no ink gives PAPER."""
    colors = []
    for inks in range(16):  # the last ink, black, varies fastest
        ink_count = bin(inks).count("1")
        colors.append(PAPER if not ink_count else CYAN if inks == 0b1000 else BLACK)
    grid = bytes(round(value) for light, a, b in colors for value in (light * 2.55, a + 128, b + 128))
    unity = b"".join(_s15(float(row == column)) for row in range(3) for column in range(3))
    ramp = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + unity + ramp * 4 + grid + ramp * 3
    return _make_profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table, b"A2B1": table})


def convert_p3_to_srgb(pixels: np.ndarray, gamma: float = 2.2) -> np.ndarray:
    """Return P3 RGB as sRGB, both uint8, clipped to the gamut of sRGB."""
    linear = (pixels / 255.0) ** gamma @ P3_TO_XYZ.T @ XYZ_TO_SRGB.T
    return encode_srgb(linear)


def encode_srgb(linear: np.ndarray) -> np.ndarray:
    """Return linear values as sRGB, uint8."""
    linear = linear.clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(encoded * 255).astype(np.uint8)


def convert_lab_to_srgb(lab: Sequence[float]) -> np.ndarray:
    light, a, b = lab
    y = (light + 16) / 116
    bent = np.array([y + a / 500, y, y - b / 200])
    straight = np.where(bent > 6 / 29, bent**3, 3 * (6 / 29) ** 2 * (bent - 4 / 29))
    return encode_srgb(XYZ_TO_SRGB @ (straight * D50))


def _s15(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(values: Sequence[float] | np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(_s15(float(value)) for value in values)


def _curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def _make_profile(kind: bytes, space: bytes, connection: bytes, tags: Mapping[bytes, bytes]) -> bytes:
    description = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(79)
    tags = {b"desc": description, b"cprt": b"text\0\0\0\0none\0", b"wtpt": _xyz(D50), **tags}
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"test", 0x02100000, kind, space, connection)
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + b"".join(map(_s15, D50))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body
