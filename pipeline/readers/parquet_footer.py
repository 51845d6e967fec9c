"""Where the row groups of a Parquet file lie, read off its footer by a process of its own.

pyarrow 26 ends its process where a footer's statistics are damaged (an exception of C++ that nobody catches, in
`RowGroupMetaData.column`): found by fuzzing. Nothing else of a footer is dangerous so, and the rest is read at home.
"""

import atexit
import io
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DamagedError
from pipeline.subprocess_server import Child, limit_itself, serve

SECONDS = 60
MAGIC = b"PAR1"

_reader = Child("pipeline.readers.parquet_footer")
atexit.register(_reader.end)


def row_group_middles(stream: BinaryIO, url: str) -> list[int]:
    """The middle byte of each row group. stream: the file, at any place. Raises DamagedError where none can be told."""
    stream.seek(-8, 2)
    size = int.from_bytes(stream.read(8)[:4], "little")
    end = stream.seek(0, 2)
    if size + 8 > end:
        raise DamagedError(f"{url} cannot be read as Parquet: its footer would be longer than the file", at=end - 8)
    start = stream.seek(-8 - size, 2)
    try:
        answer, _ = _reader.ask(stream.read(size + 8), SECONDS)
    except ChildProcessError as error:
        said = f"{url} cannot be read as Parquet: its footer ends the process that reads it"
        raise DamagedError(said, at=start) from error
    if "error" in answer:
        raise DamagedError(f"{url} cannot be read as Parquet: {answer['error']}", at=start)
    found = list(answer["middles"])
    if not all(0 <= middle < end for middle in found):  # it would belong to no range, and be lost
        raise DamagedError(f"{url} is damaged: by its footer it has rows outside of the file", at=start)
    return found


def main() -> None:
    """The process: answers a footer (and the end mark after it) with `middles`, or `error`."""
    limit_itself()

    def answer(footer: bytes) -> tuple[dict[str, Any], bytes]:
        try:
            metadata = pq.read_metadata(io.BytesIO(MAGIC + footer))
            found = []
            for group in range(metadata.num_row_groups):
                chunks = [metadata.row_group(group).column(number) for number in range(metadata.num_columns)]
                start = min(chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks)
                found.append(start + sum(chunk.total_compressed_size for chunk in chunks) // 2)
            return {"middles": found}, b""
        except (pa.ArrowException, OSError, ValueError) as error:
            return {"error": (str(error).splitlines() or [type(error).__name__])[0]}, b""

    serve(answer, SECONDS)


if __name__ == "__main__":
    main()
