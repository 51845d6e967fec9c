"""Pictures into batches of one size, so that each can be encoded at one static shape."""

from collections.abc import Iterable, Iterator

from pipeline.records import Picture


def batches(pictures: Iterable[Picture], size: int) -> Iterator[list[Picture]]:
    """Lists of up to `size` pictures of one bucket: full ones as soon as they are, the rest at the end."""
    waiting: dict[tuple[int, int], list[Picture]] = {}
    for picture in pictures:
        batch = waiting.setdefault(picture.bucket, [])
        batch.append(picture)
        if len(batch) == size:
            yield waiting.pop(picture.bucket)
    yield from waiting.values()
