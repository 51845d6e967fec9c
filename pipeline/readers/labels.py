"""The labels of images: the number and the name of the class whose folder they are in."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import pyarrow as pa

from pipeline.records import Reject, Sample

LABEL_COLUMNS = pa.schema([("label", pa.int64()), ("label_name", pa.string())])


def find_class(path: str) -> str | None:
    """Return the name of the folder directly below the root that an image is in; None if it is in the root itself."""
    steps = path.split("/")
    return steps[1] if len(steps) > 2 else None


class Labels:
    """Adds labels to the images of a folder. classes: sorted. wanted: the columns to add."""

    def __init__(self, classes: Sequence[str] | None, wanted: Collection[str]) -> None:
        self.numbers = {name: number for number, name in enumerate(classes or ())}
        self.wanted = wanted

    def add_to(self, sample: Sample | Reject, path: str) -> Sample | Reject:
        """Return a sample with its label. path: of the image. A sample in no folder of a class has none."""
        name = find_class(path)
        if isinstance(sample, Reject) or name not in self.numbers:
            return sample
        label = {"label": self.numbers[name], "label_name": name}
        columns = {column: value for column, value in label.items() if column in self.wanted}
        return replace(sample, columns={**sample.columns, **columns})
