"""The tars that groups leave out in a run, because they could not be read. They become units of their own."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jobs.messages import log_note
from pipeline.cache.left_out import plan_left_out
from pipeline.cache.part_info import UnitReport
from pipeline.records import Unit
from pipeline.sources.listing import abbreviate
from pipeline.sources.planned_files import without_etags
from pipeline.storage.folder import Folder


@dataclass(slots=True)
class LeftOutPlanner:
    """Plans the tars that groups leave out.

    units: all planned units. same_source: workers ignore ETags. paths: the tars that were left out since the last call
    of `plan`, by group.
    """

    cache: Folder
    units: Sequence[Unit]
    same_source: bool
    paths: dict[str, set[str]] = field(default_factory=dict)

    def add(self, done: UnitReport) -> None:
        """Add the tars that a unit left out."""
        if paths := {path for part in done.summaries for path in part.left_out}:
            self.paths[done.unit] = paths

    def plan(self) -> list[Unit]:
        """Plan these tars. Returns their units, as workers read them."""
        tars = plan_left_out(self.cache, self.units, self.paths)
        self.paths.clear()
        if tars:
            names = f"{len(tars):,} ({abbreviate([unit.path for unit in tars])})"
            log_note(f"small tars that could not be read, or have changed, and are read again one by one: {names}")
        return [without_etags(unit) for unit in tars] if self.same_source else tars
