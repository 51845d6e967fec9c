"""What the readers took for no part of a sample, in all units of a run: said once, at its end."""

from collections import Counter
from dataclasses import dataclass, field

from pipeline.records import UnitReport
from pipeline.tar_members import APART, HIDDEN, STRAY


@dataclass
class PassedOver:
    """Counts by kind."""

    counts: Counter[str] = field(default_factory=Counter)

    def add(self, done: UnitReport) -> None:
        self.counts.update(done.passed_over)

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
        return found
