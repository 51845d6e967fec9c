"""What the readers took for no part of a sample, in all units of a run: said once, at its end."""

from collections import Counter
from dataclasses import dataclass, field

from pipeline.limits import printable
from pipeline.readers.metadata import NO_METADATA
from pipeline.readers.parquet import NO_IMAGES
from pipeline.readers.tar_members import APART, HIDDEN, STRAY
from pipeline.records import UnitReport

NAMED = 3  # files


@dataclass
class SkippedInputs:
    """Counts by kind. files: those without images."""

    counts: Counter[str] = field(default_factory=Counter)
    files: list[str] = field(default_factory=list)

    def add(self, done: UnitReport, path: str) -> None:
        """Count what a unit passed over. path: of its input."""
        self.counts.update(done.passed_over)
        if done.passed_over.get(NO_IMAGES):
            self.files.append(path)

    def lines(self) -> list[str]:
        """A line for each kind that there was."""
        found = []
        if self.counts[HIDDEN] or self.counts[STRAY]:
            found.append(
                f"passed over members of tars that are no part of a sample: {self.counts[HIDDEN]:,} hidden files "
                f"(._*, .DS_Store, Thumbs.db and the like), {self.counts[STRAY]:,} documents and indexes"
            )
        if self.counts[APART]:
            found.append(
                f"{self.counts[APART]:,} images do not stand next to their texts in their tars, and are encoded "
                "without them: the files of a sample must follow each other (tar --sort=name)"
            )
        if self.counts[NO_METADATA]:
            found.append(
                f"tars that have no metadata (.parquet) beside them, although columns of the cache come from there: "
                f"{self.counts[NO_METADATA]:,}; their samples are encoded without these columns"
            )
        if self.files:
            more = f" and {len(self.files) - NAMED} more" if len(self.files) > NAMED else ""
            names = ", ".join(map(printable, sorted(self.files)[:NAMED]))
            found.append(
                f"passed over {len(self.files):,} Parquet files without images, their columns with them: {names}{more}"
            )
        return found
