"""Rows on the local disk, sorted into buckets, so that a few buckets can be read without the others."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

BUCKETS = 4096
RUN_BYTES = 64 << 20  # of the rows that are sorted in memory at a time
GROUP_BYTES = 64 << 20  # of the buckets that are read at a time


class Spool:
    """Rows in up to `BUCKETS` buckets. Several threads may add rows at the same time.

    Rows are sorted by bucket in memory, up to RUN_BYTES at a time, and written as a run. A run is mapped into memory,
    so that only the rows of the buckets that are read take memory. folder: on the local disk; the caller removes it.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._pending: list[tuple[pa.Table, np.ndarray]] = []
        self._pending_bytes = 0
        self._runs: list[tuple[pa.RecordBatch, np.ndarray]] = []
        self._lock = threading.Lock()
        self.rows = self.bytes = 0

    def add(self, table: pa.Table, buckets: np.ndarray) -> None:
        """Add rows. buckets: that of each row."""
        with self._lock:
            self._pending.append((table, buckets.astype(np.int32)))
            self._pending_bytes += table.nbytes
            self.rows += len(table)
            self.bytes += table.nbytes
            if self._pending_bytes >= RUN_BYTES:
                self._write_run()

    def close(self) -> None:
        """Write what is in memory. Nothing may be added after that."""
        if self._pending:
            self._write_run()

    def read(self, start: int, stop: int) -> pa.Table | None:
        """Return the rows of the buckets [start, stop), with types that suit all runs; None if nothing was added.

        Runs may lack columns, which are then null.
        """
        slices = []
        for batch, offsets in self._runs:
            slices.append(pa.table(batch.slice(offsets[start], offsets[stop] - offsets[start])))
        return pa.concat_tables(slices, promote_options="permissive") if slices else None

    def count_rows(self) -> np.ndarray:
        """Return the number of rows in each bucket."""
        counts = np.zeros(BUCKETS, np.int64)
        for _, offsets in self._runs:
            counts += np.diff(offsets)
        return counts

    def _write_run(self) -> None:
        table = pa.concat_tables([table for table, _ in self._pending], promote_options="permissive")
        buckets = np.concatenate([buckets for _, buckets in self._pending])
        self._pending, self._pending_bytes = [], 0
        table = table.take(np.argsort(buckets, kind="stable"))
        path = self._folder / f"{self._name}-{len(self._runs)}.arrow"
        (batch,) = table.combine_chunks().to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        mapped = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        offsets = np.concatenate([[0], np.cumsum(np.bincount(buckets, minlength=BUCKETS))])
        self._runs.append((mapped, offsets))


def split_buckets(*spools: Spool) -> Iterator[tuple[int, int]]:
    """Yield ranges [start, stop) of buckets that hold about GROUP_BYTES in all spools together; at least one bucket."""
    sizes = np.zeros(BUCKETS)
    for spool in spools:
        sizes += spool.count_rows() * (spool.bytes / max(spool.rows, 1))
    start, size = 0, 0.0
    for bucket in range(BUCKETS):
        if size + sizes[bucket] > GROUP_BYTES and bucket > start:
            yield start, bucket
            start, size = bucket, 0.0
        size += sizes[bucket]
    yield start, BUCKETS
