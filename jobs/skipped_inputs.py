"""The inputs that the readers of a run skipped because they are not part of a sample. Logged once, at its end."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from pipeline.cache.part_info import UnitReport
from pipeline.readers.skipped import APART, HIDDEN, NO_IMAGES, NO_METADATA, NO_ROW, OTHER_IMAGES, STRAY, TABLES
from pipeline.text import printable

MAX_NAMES = 3  # of files in a message


@dataclass
class SkippedInputs:
    """Counts of skipped inputs by kind.

    files: the paths of the Parquet files, Arrow files and zips without images. with_tables: those of the tars and zips
    with tables of metadata inside.
    """

    counts: Counter[str] = field(default_factory=Counter)
    files: list[str] = field(default_factory=list)
    with_tables: set[str] = field(default_factory=set)

    def add(self, done: UnitReport, path: str) -> None:
        """Add the inputs that a unit skipped. path: of the unit's shard."""
        self.counts.update(done.skipped)
        if done.skipped.get(NO_IMAGES):
            self.files.append(path)
        if done.skipped.get(TABLES):
            self.with_tables.add(path)

    def find_unused_tables(self) -> list[str]:
        """Return a line about columns that a cache lacks, because their tables are inside tars or zips."""
        if not self.with_tables:
            return []
        return [
            f"tables of metadata inside tars or zips, whose columns and labels are not used: {self.counts[TABLES]:,} "
            f"({_name_files(self.with_tables)}): unpack these archives, or put a table with a column key beside them, "
            "and encode into another --to"
        ]

    def describe(self) -> list[str]:
        """Return a line for each kind that was skipped."""
        lines = []
        if self.counts[HIDDEN] or self.counts[STRAY]:
            lines.append(
                f"skipped members of tars or zips that are no part of a sample: {self.counts[HIDDEN]:,} hidden files "
                f"(._*, .DS_Store, Thumbs.db and the like), {self.counts[STRAY]:,} documents and indexes"
            )
        if self.counts[APART]:
            lines.append(
                f"{self.counts[APART]:,} images are not next to their texts in their tars, and are encoded without "
                "them: the files of a sample must be adjacent (create the tars with tar --sort=name)"
            )
        if self.counts[OTHER_IMAGES]:
            lines.append(
                f"{self.counts[OTHER_IMAGES]:,} further images of samples in tars or zips, such as .seg.png, are not "
                "used: --columns seg.png copies one, --image-column seg.png encodes one"
            )
        if self.counts[NO_METADATA]:
            lines.append(
                "tars without a metadata file (.parquet) beside them, although columns of the cache come from there: "
                f"{self.counts[NO_METADATA]:,}; their samples are encoded without these columns"
            )
        if self.counts[NO_ROW]:
            lines.append(
                f"samples of tars without a row in their metadata, whose columns are null: {self.counts[NO_ROW]:,}"
            )
        if self.files:
            lines.append(
                f"skipped {len(self.files):,} files without images, and their columns: {_name_files(self.files)}"
            )
        return lines


def _name_files(paths: Collection[str]) -> str:
    """Return the first few paths, and how many more there are."""
    more = f" and {len(paths) - MAX_NAMES} more" if len(paths) > MAX_NAMES else ""
    return ", ".join(map(printable, sorted(paths)[:MAX_NAMES])) + more
