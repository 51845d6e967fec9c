"""Labels from folders: the sorted names of the folders directly below the roots are the classes.

torchvision's ImageFolder, and so DiT and SiT, number classes in this way. EDM2 does the same if it has no dataset.json.
"""

from collections.abc import Sequence
from itertools import chain

import pyarrow as pa

from pipeline.errors import SourceError, UsageError
from pipeline.readers.labels import LABEL_COLUMNS, find_class
from pipeline.records import ListedFile
from pipeline.sources.listing import abbreviate
from pipeline.sources.metadata import Metadata
from pipeline.sources.units import group_inputs


def find_classes(
    files: Sequence[ListedFile], recorded: Sequence[str] | None, metadata: Metadata
) -> tuple[tuple[str, ...], list[str]]:
    """Return the classes of the images, and lines about images without a class.

    recorded: the classes of the existing cache; they stay as they are.
    Raises SourceError for a folder that would be a further class, and if metadata have labels, too. Raises UsageError
    if no image is in a folder, also if all images are in tars, tables and the like: their folders are no classes.
    """
    inputs = group_inputs(files)
    images = [file.path for file in inputs.pop("folder", ())]
    others = [file.path for file in chain(*inputs.values())]
    found = {name for path in images if (name := find_class(path)) is not None}
    if recorded is not None:
        if new := found.difference(recorded):
            raise SourceError(
                f"--label-from-folder: the cache has {len(recorded):,} classes, and these folders are not among them: "
                f"{abbreviate(new)}. They would change the labels of others: move them away, or use another --to"
            )
    elif not found:
        problem = "no image is in a folder directly below the root of its source"
        if others and not images:
            problem = (
                f"the images of the sources are not files in folders, but in {abbreviate(others)}, and only folders of "
                "image files give classes; unpack archives, or give the labels as metadata or as a column"
            )
        raise UsageError(f"--label-from-folder: {problem}")
    if both := [name for schema in metadata.schemas for name in schema.names if name in LABEL_COLUMNS.names]:
        tables = abbreviate(metadata.index.files)
        raise SourceError(f"--label-from-folder makes the column {both[0]}, but {tables} has it, too; use only one")
    without = [path for path in images if find_class(path) is None]
    notes = []
    if without:
        notes.append(f"images in no folder of a class, without a label: {len(without):,} ({abbreviate(without)})")
    if others:
        text = "files whose images get no label, because only folders of image files give classes"
        notes.append(f"{text}: {len(others):,} ({abbreviate(others)})")
    return tuple(recorded if recorded is not None else sorted(found)), notes


def make_label_schemas(classes: Sequence[str] | None) -> list[pa.Schema]:
    """Return the schema of the columns of labels; none without classes."""
    return [] if classes is None else [LABEL_COLUMNS]
