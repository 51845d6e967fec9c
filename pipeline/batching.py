"""Images into batches of one size, so that each can be encoded at one static shape."""

from collections.abc import Iterable, Iterator

from pipeline.records import PreparedImage


def make_batches(images: Iterable[PreparedImage], size: int) -> Iterator[list[PreparedImage]]:
    """Lists of up to `size` images of one bucket: full ones as soon as they are, the rest at the end."""
    waiting: dict[tuple[int, int], list[PreparedImage]] = {}
    for image in images:
        batch = waiting.setdefault(image.bucket, [])
        batch.append(image)
        if len(batch) == size:
            yield waiting.pop(image.bucket)
    yield from waiting.values()
