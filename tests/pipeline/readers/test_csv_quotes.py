"""A quote in a CSV or a TSV that is not closed swallows no row."""

import csv
import io
import random
import tracemalloc

import pytest

from pipeline.readers import csv_quotes
from pipeline.readers.csv_quotes import open_quoted

CORRECT = ['x,"a ""b"", c\nd"\r\n"","e""",f\n', '"a",b', 'a,b "c" d\n', "", '""', '\ufeff"a",1\n', ',""\n,,\n']
CAPTIONS = ["plain", '"Stop" sign', '"', '""', '"open', 'closed"', 'a "b" c', '"all of it"', '"""', '"a""b"', '"a" ""']


def check(text: str, delimiter: str) -> str:
    return open_quoted(io.BytesIO(text.encode()), delimiter).read().decode()


@pytest.fixture(params=[3, 4, 7, 1 << 20])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_quotes, "_BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("text", CORRECT)
def test_correct_quotes_stay_as_they_are(text: str) -> None:
    assert check(text, ",") == text.removeprefix("\ufeff")


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("rows", [['a,"b', "c,d"], ['a,"b', 'c,"d"'], ['a,"b" c'], ['"a""b', "c"], ['a,"b"" ', "c,d"]])
def test_the_line_of_a_quote_that_is_not_closed_is_named(rows: list[str]) -> None:
    for first in ("", "a,b\n", 'a,"b\n"\n'):
        with pytest.raises(ValueError, match=f"^line {1 + first.count(chr(10))}: its opening quote is "):
            check(first + "\n".join(rows) + "\n", ",")


@pytest.mark.usefixtures("_blocks")
def test_captions_of_a_tsv_may_begin_with_a_quote() -> None:
    choice = random.Random(1)
    for _ in range(50):
        rows = [["a.jpg", choice.choice(CAPTIONS)] for _ in range(20)]
        text = "\n".join(map("\t".join, rows)) + "\n"
        plain = {'""': "", '"all of it"': "all of it", '"a""b"': 'a"b'}  # values in quotes
        read = list(csv.reader(io.StringIO(check(text, "\t")), delimiter="\t"))
        assert read == [[plain.get(value, value) for value in row] for row in rows]
    quoted = 'a\t"one\ntwo ""x"""\n"b\tc"\td\n'
    assert check(quoted, "\t") == quoted


def test_a_long_file_needs_little_memory_and_a_long_value_ends() -> None:
    data = b'a,"b, ""c"""\n' * (1 << 16) + b"x" * (40 << 20)
    tracemalloc.start()
    reader = open_quoted(io.BytesIO(data), ",")
    size = sum(map(len, iter(lambda: reader.read(1 << 20), b"")))
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == len(data)
    assert memory < 12 << 20
    for delimiter in (",", "\t"):
        with pytest.raises(ValueError, match="line 2: its opening quote is not closed"):
            check('a\n"' + "x" * (40 << 20) + '"', delimiter)
