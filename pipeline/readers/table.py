"""Tables of metadata and of image paths: JSONL, CSV, TSV, JSON and Parquet files.

A process keeps the tables that it has read, up to `Limits.table_bytes` in total. So a table is read once for all units,
and its memory does not depend on the number of units.
"""

import csv
import io
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Flag, auto
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from latentmill.byte_stream import name_url_in_errors
from latentmill.error_text import first_line
from pipeline.errors import DamagedError, ShardError
from pipeline.formats.schema import to_cache_name
from pipeline.limits import Limits
from pipeline.readers.csv_quotes import open_quoted
from pipeline.readers.image_column import is_text
from pipeline.readers.large_numbers import Path, find_large_numbers, write_numbers_as_text
from pipeline.readers.parquet import KEY, open_parquet
from pipeline.records import PlannedFile, extension
from pipeline.storage.connection import get_filesystem
from pipeline.storage.etags import fetch_version, same_version
from pipeline.storage.reading import open_stream
from pipeline.text import BYTE_ORDER_MARKS, decode_text

DELIMITERS = {"csv": ",", "tsv": "\t"}
TEXT_TABLES = frozenset({"jsonl", "json", *DELIMITERS})
BLOCK_BYTES = 16 << 20  # the longest row of a text table
BATCH_ROWS = 4096
HEADER_BYTES = 1 << 20  # among which the names of a CSV's columns are
MAX_DEPTH = 100  # levels of lists and objects in JSON
LARGE_NUMBER = re.compile(rb"[0-9]{19}")  # which may not fit 64 bits
LABELS = "labels"  # the key of EDM2's dataset.json
PATH_COLUMNS = ("file_name", "image_file_name", "image_path", "file_path", "filepath", "path", "filename")
URL_COLUMNS = ("url", "image_url", "img_url", "urls")


@dataclass(frozen=True, slots=True)
class NameRule:
    """How the rows of a table are named. text: equal for equal rules.

    find_column: returns the column that names the rows; None if the table has none. convert: its values to names.
    """

    text: str
    find_column: Callable[[pa.Schema], str | None]
    convert: Callable[[pa.ChunkedArray], pa.ChunkedArray]


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of a table, and the name of each row, by which it is found. A row without a name is never found.

    column: the column that names the rows; "" if there is none. order: the numbers of the rows that have a name, sorted
    by name and then by number.
    """

    rows: pa.Table
    column: str
    names: pa.Array
    order: pa.Array

    @classmethod
    def make(cls, rows: pa.Table, rule: NameRule) -> "Table":
        """Return the table with its rows sorted by name."""
        column, chunks = rule.find_column(rows.schema), [pa.array([], pa.large_string())]
        if column is not None:
            texts = rows[column].cast(pa.large_string())
            texts.validate(full=True)  # Arrow does not check whether texts are UTF-8
            chunks += rule.convert(texts).chunks
        names = pa.concat_arrays(chunks)
        return cls(rows, column or "", names, pc.sort_indices(names)[: len(names) - names.null_count])

    def find(self, name: str) -> int | None:
        """Return the number of the first row with this name."""
        low, high = 0, len(self.order)
        while low < high:
            middle = (low + high) // 2
            if self.names[self.order[middle].as_py()].as_py() < name:
                low = middle + 1
            else:
                high = middle
        if low == len(self.order):
            return None
        row: int = self.order[low].as_py()
        return row if self.names[row].as_py() == name else None

    def find_repeated_names(self) -> list[str]:
        """Return the names that several rows have, sorted."""
        ordered = self.names.take(self.order)
        if len(ordered) < 2:
            return []
        repeated = ordered[1:].filter(pc.equal(ordered[1:], ordered[:-1]))
        return sorted(set(repeated.to_pylist()))

    @property
    def nbytes(self) -> int:
        """The bytes of memory that the table takes."""
        return int(self.rows.nbytes + self.names.nbytes + self.order.nbytes)


_tables: OrderedDict[tuple[object, ...], Table] = OrderedDict()
_lock = threading.Lock()


def load_table(
    url: str,
    options: Mapping[str, Any],
    planned: PlannedFile | None,
    rule: NameRule,
    limits: Limits,
    encoding: str = "utf-8",
) -> Table:
    """Return the table at a URL, from the memory of this process if it has been read before.

    planned: raise ChangedError if the file differs. rule: gives each row its name. encoding: of CSV and TSV files.
    Raises ShardError if the file cannot be read as a table, or has more than `table_bytes`.
    """
    with name_url_in_errors(url, "read"):
        version = fetch_version(*get_filesystem(url, options))
    key = (url, *version, rule.text, encoding)
    with _lock:
        is_planned = planned is None or same_version((planned.bytes, planned.etag), version)
        if key not in _tables or not is_planned:
            with open_stream(url, options, planned or PlannedFile(url, *version), seeking=True) as stream:
                rows = read_rows(stream, url, limits, encoding, rule)
            with name_format(url, extension(url)):
                _tables[key] = Table.make(rows, rule)
        _tables.move_to_end(key)
        while len(_tables) > 1 and sum(table.nbytes for table in _tables.values()) > limits.table_bytes:
            _tables.popitem(last=False)
        return _tables[key]


def read_rows(
    stream: BinaryIO, url: str, limits: Limits, encoding: str = "utf-8", rule: NameRule | None = None
) -> pa.Table:
    """Return the rows of a table. The extension of the URL decides its format. Raises ShardError.

    rule: gives the rows their names later; the column that it chooses is text in CSV and TSV.
    """
    kind = extension(url)
    if kind == "parquet":
        try:
            return _read_parquet(stream, url, limits)
        except DamagedError as error:
            raise ShardError(f"{error}; repair or remove this file") from error
    data = stream.read(limits.table_bytes + 1)
    _check_size(len(data), url, limits)
    with name_format(url, kind):
        if kind in DELIMITERS:
            return _read_csv(decode_text(data, encoding), DELIMITERS[kind], rule)
        if data.startswith(BYTE_ORDER_MARKS):
            data = decode_text(data).encode()  # otherwise JSON is UTF-8
        if kind == "jsonl":
            return _read_jsonl(data)
        return _read_json(data.decode())


@contextmanager
def name_format(url: str, kind: str) -> Iterator[None]:
    """Turn the errors of a parser into a ShardError that names the URL."""
    try:
        yield
    except (pa.ArrowException, csv.Error, ValueError, RecursionError, OverflowError) as error:
        reason = first_line(error) or type(error).__name__
        hint = "; --text-encoding sets its encoding" if isinstance(error, UnicodeDecodeError) else ""
        raise ShardError(f"{url} cannot be read as {kind.upper()}: {reason:.300}{hint}") from error


def _check_size(size: int, url: str, limits: Limits) -> None:
    if size > limits.table_bytes:
        raise ShardError(
            f"{url} is a table with more than {limits.table_bytes} bytes, which each worker keeps in memory; divide "
            "it, or allow more with --input-limit table_bytes=N"
        )


def _read_parquet(stream: BinaryIO, url: str, limits: Limits) -> pa.Table:
    """Return all rows of a Parquet file, with the values of dictionaries."""
    with open_parquet(stream, url, limits) as file:
        batches, size = [], 0
        for batch in file.iter_batches(BATCH_ROWS, use_threads=False):
            batches.append(batch)
            size += batch.nbytes
            _check_size(size, url, limits)
        table = pa.Table.from_batches(batches, file.schema_arrow)
    plain = [field.with_type(get_value_type(field.type)) for field in table.schema]
    return table.cast(pa.schema(plain))


def get_value_type(kind: Any) -> Any:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _read_jsonl(data: bytes) -> pa.Table:
    """Return one row per line. Raises ValueError as `parse_jsonl` does."""
    large: set[Path] = set()
    if LARGE_NUMBER.search(data):  # a column has one type, so they are found before the first rows become a table
        for _, row in _parse_lines(io.BytesIO(data)):
            large.update(find_large_numbers(row))
    return pa.concat_tables(parse_jsonl(io.BytesIO(data), large), promote_options="permissive")


def parse_jsonl(lines: Iterable[bytes], large: Container[Path] = ()) -> Iterator[pa.Table]:
    """Yield tables of some rows each, one row per line. Raises ValueError, which names the line.

    large: where numbers become texts. Python parses the lines, because Arrow crashes on deep nesting and changes times.
    """
    rows: dict[int, Mapping[str, Any]] = {}
    for number, row in _parse_lines(lines):
        rows[number] = write_numbers_as_text(row, large) if large else row
        if len(rows) == BATCH_ROWS:
            yield _make_table(rows, "line")
            rows = {}
    yield _make_table(rows, "line")


def _parse_lines(lines: Iterable[bytes]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the number and the object of each line that is not empty. Raises ValueError, which names the line."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _parse_json(line.decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not an object")
        yield number, row


def _parse_json(text: str) -> Any:
    """Return a JSON value. Raises ValueError if it is nested too deeply for the libraries that process it later."""
    if text.count("[") + text.count("{") > MAX_DEPTH:
        depth = 0
        for bracket in re.sub(r"[^][{}]+", "", re.sub(r'"(?:[^"\\]|\\.)*"', "", text)):
            depth += 1 if bracket in "[{" else -1
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    return json.loads(text)


def _make_table(rows: Mapping[int, Mapping[str, Any]], place: str) -> pa.Table:
    """Return rows as a table. The first rows decide the order of the columns. Raises ValueError for mixed types.

    rows: by the numbers of their places. place: what they are in the file: "line" or "row".
    """
    columns: dict[str, pa.Array] = {}
    for name in dict.fromkeys(name for row in rows.values() for name in row):
        try:
            columns[name] = pa.array([row.get(name) for row in rows.values()])
        except UnicodeEncodeError as error:
            number, half = _find_surrogate({number: row.get(name) for number, row in rows.items()})
            raise ValueError(
                f"{place} {number}: the column {name} has {half}, half of a pair of surrogates, which is no character; "
                "remove it"
            ) from error
        except OverflowError as error:
            raise ValueError(f"the column {name} has a whole number beyond 64 bits; write it as a text") from error
        except (pa.ArrowException, ValueError) as error:
            raise ValueError(f"the column {name} has values of different types: {error}") from error
    return pa.table(columns)


def _find_surrogate(values: Mapping[int, Any]) -> tuple[int, str]:
    """Return the number of the first value with a surrogate that has no other half, and its escape."""
    for number, value in values.items():
        if found := re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False)):
            return number, ascii(found[0])[1:-1]
    raise ValueError("no value has a surrogate")


def _read_csv(text: str, delimiter: str, rule: NameRule | None) -> pa.Table:
    """Return one row per record. The first record names the columns. Columns of numbers get their type.

    Those that may name rows stay texts: `1.50` and `1.5` are two names.
    """
    data = text.encode()
    names = read_header(io.BytesIO(data), delimiter)
    if not names:
        return pa.table({})
    texts = {KEY, *(name for name in names if name.lower() in (*PATH_COLUMNS, *URL_COLUMNS))}
    if rule is not None:
        texts.add(rule.find_column(pa.schema(dict.fromkeys(names, pa.string()))) or "")
    table = pa.csv.read_csv(open_quoted(io.BytesIO(data), delimiter), **make_csv_options(names, delimiter))
    written = {name: Written.OTHER if name in texts else find_written(table[name]) for name in names}
    return pa.table({name: convert_numbers(table[name], choose_type(written[name])) for name in names})


def read_header(stream: BinaryIO, delimiter: str) -> list[str]:
    """Return the names of a CSV's columns: its first record. Raises ValueError if two are equal."""
    text = open_quoted(stream, delimiter).read(HEADER_BYTES).decode(errors="ignore")
    names = next(csv.reader(io.StringIO(text), delimiter=delimiter), [])
    if len(set(names)) < len(names):
        raise ValueError(f"two columns have one name: {', '.join(names)}")
    return names


def make_csv_options(names: Sequence[str], delimiter: str) -> dict[str, Any]:
    """Return the options of Arrow's readers of CSV by which all columns are texts."""
    return {
        "read_options": pa.csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
        "parse_options": pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        "convert_options": pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
    }


class Written(Flag):
    """How the values of a column of texts are written.

    LONG: whole numbers of 64 bits that a double may not hold. MINOR: what is a number beside fractions only: `nan`,
    `inf`, `-0`, `+5`. FRACTION: with a point or an exponent. OTHER: not as a number.
    """

    WHOLE, LONG, MINOR, FRACTION, OTHER = auto(), auto(), auto(), auto(), auto()


def find_written(texts: pa.ChunkedArray) -> Written:
    """Return the ways in which the values of a column of texts are written; none if all are empty.

    Whole numbers must be written as Arrow writes them: `007` is not a number.
    """
    given = texts.filter(pc.not_equal(texts, ""))
    if pc.any(pc.match_substring_regex(given, r"^[+-]?0[0-9]")).as_py():
        return Written.OTHER
    is_whole = pc.match_substring_regex(given, r"^(0|-?[1-9][0-9]*)$")
    whole, others = given.filter(is_whole), given.filter(pc.invert(is_whole))
    try:
        whole.cast(pa.int64())
        others.cast(pa.float64())
    except pa.ArrowInvalid:
        return Written.OTHER
    is_long = pc.match_substring_regex(whole, "[0-9]{16}")
    is_fraction = pc.match_substring_regex(others, "[.eE]")
    found = Written(0)
    for kind, values, wanted in (
        (Written.LONG, is_long, True),
        (Written.WHOLE, is_long, False),
        (Written.FRACTION, is_fraction, True),
        (Written.MINOR, is_fraction, False),
    ):
        if pc.any(pc.equal(values, wanted)).as_py():
            found |= kind
    return found


def choose_type(written: Written) -> pa.DataType:
    """Return the type of a column of texts: int64 or float64 if nothing is lost; null if all are empty; or string."""
    if not written:
        return pa.null()
    if Written.OTHER in written:
        return pa.string()
    if Written.FRACTION in written:
        return pa.string() if Written.LONG in written else pa.float64()
    return pa.string() if Written.MINOR in written else pa.int64()


def convert_numbers(texts: pa.ChunkedArray, kind: Any) -> pa.ChunkedArray:
    """Return a column of texts as numbers. kind: of `choose_type`. Among numbers, an empty value is null."""
    if not (pa.types.is_int64(kind) or pa.types.is_float64(kind)):
        return texts
    return pc.if_else(pc.not_equal(texts, ""), texts, pa.scalar(None, pa.string())).cast(kind)


def _read_json(text: str) -> pa.Table:
    """Return the rows of a JSON file: a list of objects, sd-scripts' object by path, or EDM2's `labels`."""
    content = _parse_json(text)
    if isinstance(content, dict) and isinstance(content.get(LABELS), list):
        if not all(isinstance(entry, list) and len(entry) == 2 for entry in content[LABELS]):
            raise ValueError("its `labels` are not pairs of a path and a label")
        content = [{"file_name": path, "label": label} for path, label in content[LABELS]]
    elif isinstance(content, dict):
        content = [{"image_path": path, **values} for path, values in content.items() if isinstance(values, dict)]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError("it is neither a list of objects, nor an object of objects, nor has it `labels`")
    large = {path for row in content for path in find_large_numbers(row)}
    rows = [write_numbers_as_text(row, large) for row in content] if large else content
    return _make_table(dict(enumerate(rows, 1)), "row")


def find_path_column(schema: pa.Schema, wanted: str | None, others: Sequence[str] = ()) -> str | None:
    """Return the column with the paths of images: `wanted` if it exists, or the first with a known name.

    others: further known names. A name that is the only one to end with `_file_name` is known, too.
    """
    texts = [str(field.name) for field in schema if is_text(field.type)]
    if wanted is not None and wanted in texts:
        return wanted
    folded: dict[str, str] = {name.lower(): name for name in reversed(texts)}
    for name in (*PATH_COLUMNS, *others):
        if name in folded:
            return folded[name]
    ends = [name for name in texts if name.endswith("_file_name")]
    return ends[0] if len(ends) == 1 else None


def select_columns(schema: pa.Schema, without: str = "") -> pa.Schema:
    """Return the columns that can be copied, by their names in the cache. without: a column that is left out."""
    return pa.schema([(to_cache_name(field.name), field.type) for field in schema if field.name != without])


def normalize_paths(paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return relative paths with `/` between the steps, and without a leading `./`."""
    return pc.replace_substring_regex(pc.replace_substring(paths, "\\", "/"), r"^(\./+)+", "")
