"""The boundaries at which a large tar is divided, and its ranges, which have the samples of the whole tar."""

import gzip
import io
import itertools
import random
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from pipeline.errors import CacheError, DamagedError, ShardError
from pipeline.limits import Limits
from pipeline.readers import blocks, damage, tar_boundaries
from pipeline.readers.tar import read_tar
from pipeline.readers.tar_boundaries import Found, TarHeaders, choose_boundaries, pack_ranges, unpack_range
from pipeline.records import Reject, Sample, Unit
from tests.pipeline.readers.test_tar import tar

KEYS = 60


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let blocks and searches be as small in relation to these tars as they are to large ones."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr(tar_boundaries, "SEARCHED", (1 << 12, 1 << 13))
    monkeypatch.setattr(tar_boundaries, "CHAIN", 6)


def divide(data: bytes, count: int, requests: Counter[str] | None = None) -> list[int]:
    """Return the boundaries for `count` ranges. requests: receives the number of requests and of bytes."""

    def read_range(start: int, stop: int) -> bytes:
        assert 0 <= start < stop <= len(data)
        if requests is not None:
            requests.update(requests=1, bytes=stop - start)
        return data[start:stop]

    headers = TarHeaders(read_range, len(data), "s.tar", Limits())
    wanted = [len(data) * k // count for k in range(1, count)]
    found = [headers.search(byte) for byte in wanted] if headers.is_searchable() else [Found()] * len(wanted)
    return choose_boundaries(headers, wanted, found)


def read_range(data: bytes, start: int, stop: int | None) -> list[Sample | Reject]:
    stream = io.BytesIO(data)
    stream.seek(start)
    return list(read_tar(stream, "s.tar", byte_range=(start, stop)))


def read_ranges(data: bytes, boundaries: list[int]) -> Iterator[Sample | Reject]:
    for start, stop in itertools.pairwise([0, *boundaries, None]):
        assert start is not None
        yield from read_range(data, start, stop)


def without_positions(items: Iterator[Sample | Reject] | list[Sample | Reject]) -> list[Sample | Reject]:
    return [replace(item, position=0) for item in items]


def make_members(seed: int) -> dict[str, bytes]:
    """Return samples of one to four members, with hidden files and names of all lengths, and a few large images."""
    draw = random.Random(seed)
    members: dict[str, bytes] = {}
    for number in range(KEYS):
        folder = draw.choice(["", "a/", "long/" * 30, "ü" * 120 + "/"])
        key = f"{folder}{number:03}"
        size = draw.choice([0, 1, 511, 512, 513, 3000, 20_000])
        files = {"jpg": draw.randbytes(size), "txt": b"text", "json": b"{}", "cls": b"1"}
        for extension in draw.sample(sorted(files), draw.randint(1, 4)):
            if draw.random() < 0.2:
                members[f"{folder}._{number:03}.{extension}"] = b"hidden"
            members[f"{key}.{extension}"] = files[extension]
    return members


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("seed", range(8))
def test_ranges_have_the_samples_of_the_tar(form: int, seed: int) -> None:
    members = make_members(seed)
    if form == tarfile.USTAR_FORMAT:
        members = {name: data for name, data in members.items() if len(name.encode()) < 100}
    data = tar(members, form)
    whole = without_positions(read_range(data, 0, None))
    for count in (2, 3, 7, 20):
        boundaries = divide(data, count)
        assert boundaries == sorted(set(boundaries)) and len(boundaries) <= count - 1
        assert without_positions(read_ranges(data, boundaries)) == whole
        if count == 2:
            assert len(boundaries) == 1 and len(data) // 2 <= boundaries[0]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_byte_gives_a_boundary_between_two_keys(form: int) -> None:
    """The byte is in a header, an extended header, a long name, a body or the padding."""
    name = "x" * 99 + "/" + "y" * 96  # without an extended header, the number and the extension are missing
    name = name[:-4] if form == tarfile.USTAR_FORMAT else name
    data = tar({f"{name}{n:02}.{end}": b"b" * 700 for n in range(20) for end in ("jpg", "txt", "cls")}, form)
    headers = TarHeaders(lambda start, stop: data[start:stop], len(data), "s.tar", Limits())
    all_boundaries = list(headers.walk_boundaries(0))
    assert len(all_boundaries) == 19
    for byte in range(0, len(data) // 2, 128):
        found = headers.search(byte).boundary
        assert found in all_boundaries
        assert found in [boundary for boundary in all_boundaries if boundary >= byte][:2], (
            "one sample is passed at most"
        )


def test_extended_headers_stay_with_their_member() -> None:
    """A range begins at the header with the long name, not at the header that follows it."""
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        data = tar({f"{'n' * 200}{n:02}.jpg": bytes([n]) * 100 for n in range(30)}, form)
        boundaries = divide(data, 5)
        assert len(boundaries) == 4
        assert all(data[byte + 156 : byte + 157] in (b"L", b"x") for byte in boundaries)
        assert [item.key[-2:] for item in read_ranges(data, boundaries)] == [f"{n:02}" for n in range(30)]


def test_a_byte_in_a_large_member_gives_the_boundary_after_it() -> None:
    members = {f"{n}.jpg": b"i" * (200_000 if n == 5 else 100) for n in range(40)}
    data = tar(members)
    requests = Counter[str]()
    (boundary,) = divide(data, 2, requests)
    assert read_range(data, boundary, None)[0].key == "6"
    assert requests["requests"] < 12
    assert requests["bytes"] < 60_000, "the large member is not read"


def test_only_the_headers_near_the_wanted_bytes_are_read() -> None:
    data = tar({f"{n:05}.{end}": b"i" * 500 for n in range(2000) for end in ("jpg", "txt")})
    requests = Counter[str]()
    assert len(divide(data, 10, requests)) == 9
    assert requests["requests"] <= 3 * 9 + 3
    assert requests["bytes"] < len(data) // 10


def test_a_tar_in_a_tar_is_not_divided_inside() -> None:
    inner = tar({f"in{n}.jpg": b"i" * 300 for n in range(300)})
    for names in (["a.tar", "b.jpg"], ["a.jpg", "b.tar"], ["a.jpg", "b.tar", "b.jpg"]):
        for before in (0, 40):  # the tar is among the first members, or not
            members = {f"s{n:02}.jpg": b"1" for n in range(before)}
            members |= {name: inner if name.endswith("tar") else b"1" for name in names}
            members |= {f"t{n:02}.jpg": b"1" * 3000 for n in range(40)}
            data = tar(members)
            whole = without_positions(read_range(data, 0, None))
            for count in (2, 3, 9):
                boundaries = divide(data, count)
                if before:  # then it may be unnoticed, but never without an error
                    try:
                        assert without_positions(read_ranges(data, boundaries)) == whole
                    except ShardError as error:
                        assert "it may contain another tar" in str(error)
                else:
                    assert boundaries
                    assert without_positions(read_ranges(data, boundaries)) == whole


def test_tars_that_a_search_finds_count_for_all_searches() -> None:
    inner = tar({f"in{n}.jpg": b"i" * 300 for n in range(40)})
    members = {f"s{n:02}.jpg": b"1" for n in range(40)}
    for n in range(8):
        members |= {f"t{n}.tar": inner, **{f"t{n}.{end}": b"1" * 700 for end in ("jpg", "txt", "json", "cls")}}
    data = tar(members)
    boundaries = divide(data, 20)
    assert len(boundaries) > 5
    assert without_positions(read_ranges(data, boundaries)) == without_positions(read_range(data, 0, None))


def test_a_small_tar_in_a_tar_is_passed_over() -> None:
    """The chain of its members ends at its end mark, even if that is followed by a header of the outer tar."""
    inner = tar({f"in{n}.jpg": b"i" for n in range(4)}).rstrip(b"\0")
    inner += b"\0" * (-len(inner) % 512 + 1024)
    data = tar({f"{n}.bin" if n == 9 else f"{n}.jpg": inner if n == 9 else b"1" * 600 for n in range(30)})
    headers = TarHeaders(lambda start, stop: data[start:stop], len(data), "s.tar", Limits())
    at = data.index(inner)
    assert headers.search(at) == Found()
    assert choose_boundaries(headers, [at], [Found()]) == [at + len(inner)]


@pytest.mark.parametrize("names", [[".jpg"] * 40, ["a.jpg"] * 40, ["._a.jpg"] * 40, ["f/", "g/"] * 20])
def test_a_tar_without_another_key_stays_whole(names: list[str]) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name in names:
            header = tarfile.TarInfo(name)
            header.size = 0 if name.endswith("/") else 400
            header.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            archive.addfile(header, io.BytesIO(b"i" * header.size))
    requests = Counter[str]()
    assert divide(sink.getvalue(), 8, requests) == []
    assert requests["bytes"] < 30 * len(sink.getvalue())


def test_an_old_tar_without_the_magic_is_walked() -> None:
    data = tar({f"{n:02}.jpg": b"i" * 700 for n in range(50)})
    old = bytearray(data)
    at = old.find(b"ustar")
    while at >= 0:
        header = at - 257
        old[at : at + 8] = bytes(8)
        old[header + 148 : header + 156] = b" " * 8
        old[header + 148 : header + 156] = b"%06o\0 " % sum(old[header : header + 512])
        at = old.find(b"ustar")
    data = bytes(old)
    boundaries = divide(data, 5)
    assert len(boundaries) == 4
    assert without_positions(read_ranges(data, boundaries)) == without_positions(read_range(data, 0, None))


def test_appended_tars_are_divided() -> None:
    first = tar({f"a{n:02}.jpg": b"i" * 700 for n in range(30)})
    data = first + tar({f"b{n:02}.jpg": b"i" * 700 for n in range(30)})
    whole = without_positions(read_range(data, 0, None))
    for count in range(2, 30):
        boundaries = divide(data, count)
        assert boundaries
        assert without_positions(read_ranges(data, boundaries)) == whole
    assert without_positions(read_ranges(data, [len(first)])) == whole, "a range may begin after an end mark"


def test_after_a_damage_other_ranges_are_found() -> None:
    data = bytearray(tar({f"{n:02}.jpg": b"i" * 700 for n in range(100)}))
    damaged_at = 512 * 3 * 40
    data[damaged_at : damaged_at + 512] = b"x" * 512
    boundaries = divide(bytes(data), 10)
    assert 7 <= len(boundaries) <= 9
    items: list[Sample | Reject] = []
    for start, stop in itertools.pairwise([0, *boundaries, None]):
        stream = io.BytesIO(data)
        stream.seek(start or 0)
        try:
            items.extend(read_tar(stream, "s.tar", byte_range=(start or 0, stop)))
        except DamagedError as error:
            assert error.at == damaged_at
    assert 80 < len(items) < 100, "only one range is damaged"


@pytest.mark.parametrize("change", [-512, 512, 700, 1024, 3 * 512])
def test_a_range_that_ends_elsewhere_is_an_error(change: int) -> None:
    data = tar({f"{'n' * 150}{n:02}.jpg": b"i" * 700 for n in range(20)}, tarfile.GNU_FORMAT)
    (boundary,) = divide(data, 2)
    with pytest.raises(ShardError, match=r"s\.tar was divided at byte \d+, but no member begins there"):
        read_range(data, 0, boundary + change)
    with pytest.raises(ShardError, match="was divided"):
        read_range(data, 0, len(data) + 512)


def test_another_archive_is_not_divided() -> None:
    tars = tar({f"{n:02}.jpg": b"i" * 700 for n in range(100)})
    for data in (b"PK\3\4" + tars, gzip.compress(tars, 0), b"x" * 100_000):
        with pytest.raises((ShardError, DamagedError)):
            divide(data, 3)


def test_ranges_are_packed_in_units() -> None:
    assert pack_ranges([]) == [""]
    packed = pack_ranges([512, 2048])
    assert packed == ["[0,512]", "[512,2048]", "[2048,null]"]
    unit = Unit(name="u", kind="tar", path="s/s.tar")
    assert unpack_range(unit) == (0, None)
    assert [unpack_range(replace(unit, files=files)) for files in packed] == [(0, 512), (512, 2048), (2048, None)]
    for corrupt in ("x", "[1]", "{}", '["a",1]', "1"):
        with pytest.raises(CacheError, match="no valid range of bytes of the unit u"):
            unpack_range(replace(unit, files=corrupt))


def test_after_a_damage_the_rest_of_the_range_is_read_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(damage, "PIECE", 512)
    data = bytearray(tar({f"{n:02}.jpg": b"i" * 700 for n in range(100)}))
    data[512 * 3 * 10 : 512 * 3 * 11] = b"x" * 512 * 3
    stop = 512 * 3 * 50
    stream, pieces = io.BytesIO(data), list[int]()
    samples = read_tar(stream, "s.tar", byte_range=(0, stop))
    with pytest.raises(DamagedError, match="the header at byte 15360 is not a tar header"):
        list(damage.read_past_damage(samples, stream, lambda: pieces.append(stream.tell()), stop))
    assert pieces == list(range(512 * 3 * 10 + 512, stop + 512, 512))
