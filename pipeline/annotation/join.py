"""Join a table with the rows of a cache by key, in memory that depends neither on the table nor on the cache.

Both sides are divided by a hash of the key into buckets on the local disk. A few buckets at a time are joined, and the
result is divided by part. So each value is written to the disk twice, and the time is linear.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.annotation.part_rows import PartRows
from pipeline.annotation.spool import BUCKETS, Spool, split_buckets
from pipeline.errors import UsageError
from pipeline.text import printable

KEY, SHARD = "key", "shard"
_OLD = "old:"  # precedes the columns that have the current values


@dataclass(slots=True)
class JoinCounts:
    """What was joined.

    rows: of the cache. matched: those with a row in the table. unmatched: an example of the others: shard and key.
    table_rows, used: of the table, and those that a row of the cache has. unused: an example of the others: key and,
    if the table has it, shard. changed: by column, the matched rows whose value is new. changed_rows: rows with any.
    """

    rows: int = 0
    matched: int = 0
    unmatched: tuple[str, ...] = ()
    table_rows: int = 0
    used: int = 0
    unused: tuple[str, ...] = ()
    changed: Counter[str] = field(default_factory=Counter)
    changed_rows: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class PartColumns:
    """The new columns of a part. groups: the rows of each row group. table: `key`, `matched` and the columns."""

    file: str
    groups: tuple[int, ...]
    table: pa.Table


class ColumnJoin:
    """Joins the rows of a table, which are added first, with those of the parts of a cache.

    name: of the table, for errors. folder: for temporary files; the caller removes it. convert: gives rows of the table
    their final types, once all have been added. Nothing is published before `join` has found the table unambiguous.
    """

    def __init__(self, name: str, folder: Path, convert: Callable[[pa.Table], pa.Table] = lambda rows: rows) -> None:
        self.name, self._convert = name, convert
        self._table, self._cache, self._joined = (Spool(folder, name) for name in ("table", "cache", "joined"))
        self._parts: list[tuple[str, tuple[int, ...]]] = []  # file, groups
        self._has_shards: bool | None = None
        self.schema = pa.schema([])
        self.counts = JoinCounts()

    def add_table(self, rows: pa.Table) -> None:
        """Add rows of the table. Safe to call from several threads.

        Raises UsageError if they have no column `key`, if a key or shard is null, or if only some rows have a shard.
        """
        if KEY not in rows.schema.names:
            raise UsageError(
                f"{self.name} has no column '{KEY}' to join its rows by; it has {', '.join(rows.schema.names)}"
            )
        has_shards = SHARD in rows.schema.names
        if len(rows) and self._has_shards not in (None, has_shards):
            raise UsageError(f"only some rows of {self.name} have the column '{SHARD}'")
        if len(rows):
            self._has_shards = has_shards
        for name in (KEY, SHARD) if has_shards else (KEY,):
            if rows[name].null_count:
                raise UsageError(f"a row of {self.name} has no value in the column '{name}'")
            try:
                texts = rows[name].cast(pa.string())
            except pa.ArrowException as error:
                raise UsageError(f"the column '{name}' of {self.name} is {rows[name].type}, not text") from error
            rows = rows.set_column(rows.schema.get_field_index(name), name, texts)
        shards = rows[SHARD].to_pylist() if has_shards else None
        self._table.add(rows, _hash_keys(rows[KEY], shards))

    def close_table(self) -> None:
        """End the table. Its columns and their types are then known (`schema`). A column of nulls is text."""
        self._table.close()
        self.counts.table_rows = self._table.rows
        rows = self._read_table(0, 0)
        fields = [item for item in rows.schema if item.name not in (KEY, SHARD)] if rows is not None else []
        self.schema = pa.schema(fields)

    def add_part(self, part: PartRows) -> None:
        """Add the rows of a part, with the values that columns of the table have now. Call it in the order of parts."""
        count = len(part.rows)
        current = {_OLD + name: part.rows[name] for name in part.rows.schema.names if name not in (KEY, SHARD)}
        rows = pa.table(
            {
                KEY: part.rows[KEY],
                SHARD: part.rows[SHARD],
                "part": pa.array(np.full(count, len(self._parts), np.int32)),
                "row": pa.array(np.arange(count, dtype=np.int32)),
                **current,
            }
        )
        self._cache.add(rows, _hash_keys(rows[KEY], rows[SHARD].to_pylist() if self._has_shards else None))
        self._parts.append((part.file, part.groups))
        self.counts.rows += count

    def join(self) -> None:
        """Join all rows. Raises UsageError, which names an example, for a key twice, or a key of several shards."""
        self._cache.close()
        for start, stop in split_buckets(self._table, self._cache):
            left, right = self._cache.read(start, stop), self._read_table(start, stop)
            if left is None or right is None:
                raise UsageError(f"{self.name} has no rows" if right is None else "the cache has no rows")
            joined = self._join_rows(left, right)
            self._joined.add(joined, joined["part"].to_numpy() // self._parts_per_bucket)
        self._joined.close()

    def read_parts(self) -> Iterator[PartColumns]:
        """Yield the columns of each part, in order."""
        for start, stop in split_buckets(self._joined):
            rows = self._joined.read(start, stop)
            if rows is None or not len(rows):
                continue
            parts, numbers = rows["part"].to_numpy(), rows["row"].to_numpy()
            rows = rows.take(np.lexsort((numbers, parts))).drop_columns(["part", "row"])
            first = 0
            for part in np.unique(parts):
                file, groups = self._parts[part]
                yield PartColumns(file, groups, rows.slice(first, sum(groups)))
                first += sum(groups)

    @property
    def _parts_per_bucket(self) -> int:
        return max(1, -(-len(self._parts) // BUCKETS))

    def _read_table(self, start: int, stop: int) -> pa.Table | None:
        rows = self._table.read(start, stop)
        if rows is None:
            return None
        rows = self._convert(rows)
        kinds = [item.with_type(pa.string()) if pa.types.is_null(item.type) else item for item in rows.schema]
        return rows.cast(pa.schema(kinds))

    def _join_rows(self, left: pa.Table, right: pa.Table) -> pa.Table:
        """Return the rows of the cache with the columns of the table; null or the current value if there is no row."""
        shards = left[SHARD].combine_chunks()
        ids = (
            right[KEY].combine_chunks() if not self._has_shards else _combine(right[KEY], right[SHARD].combine_chunks())
        )
        self._check_duplicates(ids)
        wanted = left[KEY] if not self._has_shards else _combine(left[KEY], shards)
        found = pc.index_in(wanted, ids).fill_null(-1).to_numpy()
        if not self._has_shards:
            self._check_shards(left[KEY], shards, found)
        is_matched = found >= 0
        self._count(left, shards, right, found, is_matched)
        columns = {KEY: left[KEY], "part": left["part"], "row": left["row"], "matched": pa.array(is_matched)}
        is_changed = np.zeros(len(left), bool)
        for item in self.schema:
            new = right[item.name]
            if _OLD + item.name in left.schema.names:
                old = _cast(left[_OLD + item.name], item)
                both = pa.chunked_array([*new.chunks, *old.chunks], item.type)
                columns[item.name] = both.take(np.where(is_matched, found, len(new) + np.arange(len(left))))
                differs = _differ(columns[item.name], old)
                self.counts.changed[item.name] += int(differs.sum())
                is_changed |= differs
            else:
                columns[item.name] = new.take(pa.array(found, mask=~is_matched))
        self.counts.changed_rows += int(is_changed.sum())
        return pa.table(columns)

    def _count(self, left: pa.Table, shards: Any, right: pa.Table, found: np.ndarray, is_matched: np.ndarray) -> None:
        counts, is_used = self.counts, np.zeros(len(right), bool)
        is_used[found[is_matched]] = True
        counts.matched += int(is_matched.sum())
        counts.used += int(is_used.sum())
        if not counts.unmatched and not is_matched.all():
            index = int(np.argmin(is_matched))
            counts.unmatched = (shards[index].as_py(), left[KEY][index].as_py())
        if not counts.unused and not is_used.all():
            index = int(np.argmin(is_used))
            counts.unused = tuple(right[name][index].as_py() for name in (SHARD, KEY) if name in right.schema.names)

    def _check_duplicates(self, ids: pa.Array) -> None:
        if len(pc.unique(ids)) < len(ids):
            values, numbers = pc.value_counts(ids).flatten()
            name = _describe(values.filter(pc.greater(numbers, 1))[0].as_py())
            text = f"{self.name} has several rows of the key {name}: keep one of them"
            shards = f", or add a column '{SHARD}' if images of several shards have this key"
            raise UsageError(text if self._has_shards else text + shards)

    def _check_shards(self, keys: pa.ChunkedArray, shards: Any, found: np.ndarray) -> None:
        """Raise UsageError if one row of the table has the key of rows in several shards of the cache."""
        matched = np.flatnonzero(found >= 0)
        codes = shards.dictionary_encode().indices.to_numpy()[matched]
        order = np.argsort(found[matched], kind="stable")
        rows, codes = found[matched][order], codes[order]
        repeated = np.flatnonzero((rows[1:] == rows[:-1]) & (codes[1:] != codes[:-1]))
        if len(repeated):
            first, second = (matched[order[repeated[0] + more]] for more in (0, 1))
            name = printable(keys[int(first)].as_py())
            both = " and ".join(sorted(str(shards[int(index)]) for index in (first, second)))
            raise UsageError(
                f"{self.name} needs a column '{SHARD}', because keys repeat: {both} both have the key {name}"
            )


def _hash_keys(keys: pa.ChunkedArray, shards: Sequence[str] | None) -> np.ndarray:
    """Return the bucket of each key, or of each key and shard."""
    values = keys.to_pylist()
    if shards is None:
        hashes = (crc32(key.encode()) for key in values)
    else:
        seeds = {shard: crc32(shard.encode()) for shard in set(shards)}
        hashes = (crc32(key.encode(), seeds[shard]) for key, shard in zip(values, shards, strict=True))
    return np.fromiter(hashes, np.int64, len(values)) % BUCKETS


def _combine(keys: pa.ChunkedArray, shards: Any) -> pa.Array:
    """Return one text per key and shard."""
    return pc.binary_join_element_wise(shards, keys.combine_chunks(), "\0")


def _describe(text: str) -> str:
    shard, _, key = text.rpartition("\0")
    return printable(key) + (f" of the shard {printable(shard)}" if shard else "")


def _cast(column: pa.ChunkedArray, item: pa.Field) -> pa.ChunkedArray:
    try:
        return column.cast(item.type)
    except pa.ArrowException as error:
        text = f"the column {item.name} is {item.type} in it, and {column.type} in the cache"
        raise UsageError(f"{text}: convert it, or set --unmatched null") from error


def _differ(first: pa.ChunkedArray, second: pa.ChunkedArray) -> np.ndarray:
    """Return which values of two columns of one type differ. Two nulls are equal, and so are two NaNs."""
    if pa.types.is_nested(first.type) or pa.types.is_floating(first.type):
        pairs = zip(first, second, strict=True)
        return np.fromiter((not a.equals(b) and repr(a) != repr(b) for a, b in pairs), bool, len(first))
    is_equal = pc.fill_null(pc.equal(first, second), False).to_numpy()
    both_null = pc.and_(pc.is_null(first), pc.is_null(second)).to_numpy()
    differs: np.ndarray = ~(is_equal | both_null)
    return differs
