"""Group images into batches of one bucket, so that each batch can be encoded at one static shape."""

from collections.abc import Iterable, Iterator

from pipeline.records import PreparedImage


def make_batches(images: Iterable[PreparedImage], size: int) -> Iterator[list[PreparedImage]]:
    """Yield lists of up to `size` images of one bucket: a full list at once, the others at the end."""
    waiting: dict[tuple[int, int], list[PreparedImage]] = {}
    for image in images:
        batch = waiting.setdefault(image.bucket, [])
        batch.append(image)
        if len(batch) == size:
            yield waiting.pop(image.bucket)
    yield from waiting.values()
