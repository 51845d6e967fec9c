"""Find the samples in a range of a WebDataset part: where their arrays lie, and their other columns.

`tarfile` takes ten times as long for a member as reading its header does.
"""

import json
import math
import tarfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from latentmill.part_files import FLIPPED_MEMBERS, LATENT_MEMBERS, SAMPLE_JSON

_BLOCK = 512
_NPY = b"\x93NUMPY\x01\x00"  # the start of an npy file, of version 1.0


class TarError(ValueError):
    """A range is not one of samples. `str(error)` is the reason."""


@dataclass(slots=True)
class Sample:
    """A sample of a tar. arrays: where its arrays lie: [start, stop) of the npy file. values: its columns by name."""

    arrays: list[tuple[int, int]]
    values: dict[str, Any] = field(default_factory=dict)


def iterate_samples(data: memoryview, texts: Collection[str], binary: Collection[str]) -> Iterator[Sample]:
    """Yield the samples in the bytes of consecutive members, in order.

    texts: the members to read as columns. binary: those of them that are bytes. Raises TarError.
    """
    sample: Sample | None = None
    for name, start, stop in _iterate_members(data):
        if name.endswith(LATENT_MEMBERS):  # the first member of a sample
            if sample:
                yield sample
            sample = Sample([(start, stop)])
        elif sample is None:
            raise TarError(f"it begins with the member {name}")
        elif name.endswith(FLIPPED_MEMBERS):
            sample.arrays.append((start, stop))
        elif name.endswith(SAMPLE_JSON):
            sample.values = dict.fromkeys(texts) | _parse_json(data[start:stop], name)
        elif (text := name[len(sample.values.get("key", "")) + 1 :]) in texts:
            value = bytes(data[start:stop])
            sample.values[text] = value if text in binary else value.decode()
    if sample:
        yield sample


def _parse_json(data: memoryview, name: str) -> dict[str, Any]:
    try:
        return dict(json.loads(bytes(data)))
    except (ValueError, TypeError, RecursionError) as error:
        raise TarError(f"{name} is not a JSON object") from error


def _iterate_members(data: memoryview) -> Iterator[tuple[str, int, int]]:
    """Yield the name of each file in a tar, and where its content lies: [start, stop)."""
    position, path = 0, ""
    while position < len(data) and data[position]:  # a block of zeros is the end
        header = bytes(data[position : position + _BLOCK])
        size, kind = _parse_header(header)
        start = position + _BLOCK
        if start + size > len(data):
            raise TarError("a member is cut short")
        if kind == tarfile.XHDTYPE:
            path = _parse_path(bytes(data[start : start + size]))
        elif kind in (tarfile.REGTYPE, tarfile.AREGTYPE):
            yield path or header[:100].rstrip(b"\0").decode(), start, start + size
            path = ""
        elif kind != tarfile.XGLTYPE:
            raise TarError(f"a member is of kind {kind!r}")
        position = start + -(-size // _BLOCK) * _BLOCK


def _parse_header(header: bytes) -> tuple[int, bytes]:
    """Return the size and the kind of a member."""
    try:
        checksum = int(header[148:156].rstrip(b"\0 "), 8)
        size = int(header[124:136].rstrip(b"\0 "), 8)
    except ValueError as error:
        raise TarError("a header cannot be read") from error
    if len(header) < _BLOCK or checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise TarError("a header does not have its checksum")
    return size, header[156:157]


def _parse_path(records: bytes) -> str:
    """Return the path in the PAX header of a member; empty if it has none."""
    try:
        while records:
            length = int(records.partition(b" ")[0])
            name, _, value = records[:length].partition(b" ")[2].partition(b"=")
            if name == b"path":
                return value.removesuffix(b"\n").decode()
            if length <= 0:
                break
            records = records[length:]
    except ValueError as error:
        raise TarError("a PAX header cannot be read") from error
    return ""


def make_npy_finder(shape: tuple[int, ...], dtype: str) -> Callable[[memoryview], int]:
    """Return a function that returns where the values in an npy file begin, of this shape and dtype, in C order.

    It raises TarError for any other content. numpy always writes the same header, so none has to be parsed.
    """
    kind = np.dtype(dtype).newbyteorder("<").str
    expected = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    size = math.prod(shape) * np.dtype(dtype).itemsize

    def find(file: memoryview) -> int:
        start = len(_NPY) + 2 + int.from_bytes(file[len(_NPY) : len(_NPY) + 2], "little")
        header = bytes(file[len(_NPY) + 2 : start]).rstrip()
        if file[: len(_NPY)] != _NPY or header != expected:
            raise TarError(f"an array has the header {header!r:.120}, not {expected.decode()}")
        if len(file) != start + size:
            raise TarError(f"an array has {len(file) - start} bytes, not {size}")
        return start

    return find
