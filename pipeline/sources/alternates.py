"""Find images that exist twice: `a.cr2` beside `a.jpg`, `a.heic` beside `a.png`.

Of images with one name, those in a format that is read without a plugin are used. So the result does not depend on
which plugins are installed. If no image of a name has such a format, one that a plugin reads is used, and otherwise
all others, which are rejected.
"""

from collections.abc import Iterable

from pipeline.records import extension, image_rank, is_image, stem


def find_alternates(paths: Iterable[str]) -> set[str]:
    """Return the images that are left out because another image with the same name is used."""
    ranks = {path: image_rank(extension(path)) for path in paths if is_image(path)}
    best: dict[str, int] = {}
    for path, rank in ranks.items():
        best[stem(path)] = min(rank, best.get(stem(path), rank))
    return {path for path, rank in ranks.items() if rank > best[stem(path)]}
