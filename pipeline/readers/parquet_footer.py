"""Read the positions of a Parquet file's row groups from its footer, in a separate process.

pyarrow 26 ends its process if a footer's statistics are damaged: `RowGroupMetaData.column` raises a C++ exception that
is not caught. Fuzzing found this. It is the only call known to abort, so the rest of the footer is read in-process.
"""

import atexit
import io
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from latentmill.error_text import first_line
from pipeline.errors import DamagedError
from pipeline.subprocess_server import Child, limit_itself, serve

SECONDS = 60
MAGIC = b"PAR1"

_reader = Child("pipeline.readers.parquet_footer")
atexit.register(_reader.end)


def find_row_group_middles(stream: BinaryIO, url: str) -> list[int]:
    """Return the middle byte of each row group. stream: the file, at any offset.

    Raises DamagedError if the footer is damaged.
    """
    stream.seek(-8, 2)
    size = int.from_bytes(stream.read(8)[:4], "little")
    end = stream.seek(0, 2)
    if size + 8 > end:
        raise DamagedError(f"{url} cannot be read as Parquet: its footer claims to be longer than the file", at=end - 8)
    start = stream.seek(-8 - size, 2)
    try:
        answer, _ = _reader.ask(stream.read(size + 8), SECONDS)
    except ChildProcessError as error:
        message = f"{url} cannot be read as Parquet: its footer ends the process that reads it"
        raise DamagedError(message, at=start) from error
    if "error" in answer:
        raise DamagedError(f"{url} cannot be read as Parquet: {answer['error']}", at=start)
    middles = list(answer["middles"])
    if not all(0 <= middle < end for middle in middles):  # the row group would belong to no range, and be lost
        raise DamagedError(f"{url} is damaged: its footer places rows outside of the file", at=start)
    return middles


def main() -> None:
    """Run the separate process. It answers a footer, with the end mark after it, with `middles` or `error`."""
    limit_itself()

    def answer(footer: bytes) -> tuple[dict[str, Any], bytes]:
        try:
            metadata = pq.read_metadata(io.BytesIO(MAGIC + footer))
            middles = []
            for group in range(metadata.num_row_groups):
                chunks = [metadata.row_group(group).column(number) for number in range(metadata.num_columns)]
                start = min(chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks)
                middles.append(start + sum(chunk.total_compressed_size for chunk in chunks) // 2)
            return {"middles": middles}, b""
        except (pa.ArrowException, OSError, ValueError) as error:
            return {"error": first_line(error) or type(error).__name__}, b""

    serve(answer, SECONDS)


if __name__ == "__main__":
    main()
