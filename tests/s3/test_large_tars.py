"""Large tars on S3: the number of requests for their boundaries, and of their ranges."""

import io
import tarfile

import fsspec
import pytest

from pipeline.readers.tar import read_tar
from pipeline.readers.tar_boundaries import unpack_range
from pipeline.sources import large_tars
from pipeline.sources.large_tars import divide_large_tars
from pipeline.sources.units import make_units
from pipeline.storage.reading import open_stream
from tests.listed_files import list_source_files
from tests.proxy import Proxy

SAMPLE_BYTES = 100_000
MB = 1 << 20


@pytest.mark.slow
def test_a_boundary_costs_one_request(bucket: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first members cost two more. The store is asked for neither the size nor the whole tar."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for number in range(420):
            for extension, size in (("jpg", SAMPLE_BYTES), ("txt", 80)):
                header = tarfile.TarInfo(f"{number:05d}.{extension}")
                header.size = size
                tar.addfile(header, io.BytesIO(b"i" * size))
    fsspec.filesystem("s3").pipe_file(f"{bucket}/s/0.tar", sink.getvalue())
    monkeypatch.setattr(large_tars, "LARGE_TAR_BYTES", 16 * MB)
    monkeypatch.setattr(large_tars, "TAR_RANGE_BYTES", 8 * MB)
    files = list_source_files((f"{bucket}/s",), {}, "nowhere")
    proxy.seen.clear()
    (boundaries,) = divide_large_tars(files, {}).values()
    assert len(boundaries) == 5
    assert [request.method for request in proxy.seen] == ["GET"] * 7
    keys = []
    for unit in make_units(files, boundaries={"s/0.tar": boundaries}):
        start, stop = unpack_range(unit)
        with open_stream(unit.url, {}, unit) as stream:
            stream.seek(start)
            keys += [item.key for item in read_tar(stream, unit.url, byte_range=(start, stop))]
    assert keys == [f"{number:05d}" for number in range(420)]
    proxy.seen.clear()
    monkeypatch.setattr(large_tars, "LARGE_TAR_BYTES", 64 * MB)
    assert divide_large_tars(files, {}) == {}
    assert proxy.seen == []
