"""Values that Arrow can represent, but Python or JSON may not."""

import sys
import uuid
from decimal import Decimal
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest

from latentmill.arrow_values import has_times, to_python
from pipeline.errors import Rejected
from pipeline.values import size_in_bytes, to_json_value

US = pa.timestamp("us")
FAR = pa.array([2**62]).cast(US)  # the year 148,108
FAR_TEXT = f"<value out of range: {2**62}>"
NESTED = [
    (pa.ListArray.from_arrays([0, 1], FAR), [FAR_TEXT]),
    (pa.LargeListArray.from_arrays([0, 1], FAR), [FAR_TEXT]),
    (pa.FixedSizeListArray.from_arrays(FAR, 1), [FAR_TEXT]),
    (pa.MapArray.from_arrays([0, 1], pa.array(["a"]), FAR), [["a", FAR_TEXT]]),
    (pa.StructArray.from_arrays([FAR, pa.array(["a"]), pa.nulls(1, US)], ["x", "y", "z"]), None),
    (pa.DictionaryArray.from_arrays(pa.array([0], pa.int8()), FAR), FAR_TEXT),
]


@pytest.mark.parametrize(
    ("number", "kind", "text"),
    [
        (1, US, "1970-01-01 00:00:00.000001"),
        (1, pa.timestamp("ns"), "1970-01-01 00:00:00.000000001"),
        (1, pa.timestamp("us", "Europe/Berlin"), "1970-01-01 00:00:00.000001Z"),
        (1, pa.timestamp("us", "Mars/Phobos"), "1970-01-01 00:00:00.000001Z"),
        (2**62, US, FAR_TEXT),
        (3, pa.date32(), "1970-01-04"),
        (2**30, pa.date32(), f"<value out of range: {2**30}>"),
        (3, pa.time64("ns"), "00:00:00.000000003"),
        (5, pa.duration("ms"), "5 ms"),
        (2**62, pa.duration("s"), f"{2**62} s"),
    ],
)
def test_every_time_has_a_text(number: int, kind: Any, text: str) -> None:
    array = pa.array([number, None], pa.int32() if kind == pa.date32() else pa.int64()).cast(kind)
    assert has_times(kind)
    assert [to_json_value(value) for value in array] == [text, None]
    if kind != pa.time64("ns"):  # Python's times of day have no nanoseconds
        assert pa.array(to_python(array), kind).equals(array)


def test_a_zone_that_pytz_does_not_have_stays_arrows_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """pandas before 3 installs pytz. Arrow then uses it, and an unknown zone is another error than without it."""

    def timezone(name: str) -> None:
        raise KeyError(name)

    array = pa.array([1]).cast(pa.timestamp("us", "Mars/Phobos"))
    pytz = ModuleType("pytz")
    monkeypatch.setattr(pytz, "timezone", timezone, raising=False)
    monkeypatch.setattr(pytz, "utc", None, raising=False)
    monkeypatch.setitem(sys.modules, "pytz", pytz)
    with pytest.raises(KeyError):
        array[0].as_py()
    assert to_python(array) == [array[0]]


@pytest.mark.parametrize(("array", "expected"), NESTED, ids=lambda value: str(getattr(value, "type", ""))[:10])
def test_times_are_found_inside_nested_values(array: pa.Array, expected: object) -> None:
    assert has_times(array.type)
    assert to_json_value(array[0]) == (expected or {"x": FAR_TEXT, "y": "a", "z": None})
    assert len(to_python(array)) == 1


def test_other_values_are_converted_to_json() -> None:
    assert to_json_value([1, True, None, "a", 0.5, float("nan"), float("inf")]) == [1, True, None, "a", 0.5, None, None]
    assert to_json_value({"n": (Decimal("1.20"), b"\xff\0"), "u": uuid.UUID(int=1)}) == {
        "n": ["1.20", "/wA="],
        "u": "00000000-0000-0000-0000-000000000001",
    }
    assert not has_times(pa.struct([("a", pa.list_(pa.string()))]))


@pytest.mark.parametrize("value", [Rejected("read", "bad_text", "txt"), object(), {"a": [{1}]}])
def test_a_value_without_a_json_form_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="cannot be converted to JSON"):
        to_json_value(value)


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (None, 0),
        (7, 0),
        ("\u00e9", 2),
        (b"abc", 3),
        ([1.0] * 1000, 32_000),
        ([[1, 2], [3]], 2 * 32 + 3 * 32),
        (["ab", "c"], 2 * 32 + 3),
        ({"name": "ab", "tags": ["c"]}, 4 + 32 + 2 + 4 + 32 + 32 + 1),
        (pa.scalar([1] * 100, pa.list_(US)), 804),
    ],
)
def test_the_size_of_values_in_bytes(value: Any, size: int) -> None:
    assert size_in_bytes(value) == size
