"""Every interleaving of two and three writers of one unit, with crashes, lost acknowledgements and late duplicates.

In each state of two writers, every driver has added what its writer reported to the commit log, before it crashed.

The code under test is the real one (`UnitParts`, `write_commit`, the repair of commits), on a store that answers one
request at a time. A writer is run from its start with the answers that it got so far, until it makes one more request.
So a state is small, and every state is visited once.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest

from pipeline.cache import commits
from pipeline.cache import parts as parts_module
from pipeline.cache.commit_log import LogWriter
from pipeline.cache.commit_scan import CacheScan, Repair
from pipeline.cache.part_info import PartInfo
from pipeline.cache.parts import (
    EMPTY,
    UnitParts,
    find_twins,
    inspect_part,
    list_part_files,
    list_unit_files,
    publish_part,
    strip_extension,
)
from pipeline.errors import StorageError
from pipeline.formats.part_record import PartRecord
from pipeline.formats.schema import OutputSchema
from pipeline.records import Unit
from tests.conftest import slow_param

UNIT = Unit(name="u-0123456789abcdef", kind="tar", path="s/u.tar", bytes=3)
PARTS = 2
COMMIT = f"_commits/{UNIT.name}.json"
LOST = "lost"  # the answer never arrives: the writer gets an error

Store = tuple[tuple[str, bytes], ...]


class Request(BaseException):
    """A writer's next request to the store."""

    def __init__(self, verb: str, name: str, data: bytes = b"") -> None:
        self.verb, self.name, self.data = verb, name, data


@dataclass
class Replay:
    """A folder that replays the answers so far, then raises the first request without an answer."""

    answers: tuple[object, ...]
    replayed: int = 0
    twins: bool = False

    def url_of(self, name: str) -> str:
        return name

    def _next(self, request: Request) -> Any:
        if self.replayed == len(self.answers):
            raise request
        self.replayed += 1
        answer = self.answers[self.replayed - 1]
        if answer == LOST:
            raise StorageError("no answer")
        return answer

    def read_if_exists(self, name: str) -> bytes | None:
        # if no part has rows, no file is ever created in data/
        return self._next(Request("read", name)) if self.twins or name.endswith(".json") else None

    def read_slice(self, name: str, start: int, end: int | None = None) -> bytes | None:
        return self.read_if_exists(name)

    def list_files_of(self, below: str, prefix: str) -> list[str]:
        return list(self._next(Request("list", f"{below}/{prefix}"))) if self.twins or below == EMPTY else []

    def create(self, name: str, data: bytes | memoryview) -> bool:
        return bool(self._next(Request("create", name, bytes(data))))


@dataclass
class Disk:
    """A folder that answers every request."""

    store: dict[str, bytes]
    exclusive: bool = True

    def url_of(self, name: str) -> str:
        return name

    def list_files(self, below: str) -> list[str]:
        return sorted(name.partition("/")[2] for name in self.store if name.startswith(f"{below}/"))

    def list_files_of(self, below: str, prefix: str) -> list[str]:
        return [name for name in self.list_files(below) if name.startswith(prefix)]

    def read_if_exists(self, name: str) -> bytes | None:
        return self.store.get(name)

    def read_slice(self, name: str, start: int, end: int | None = None) -> bytes | None:
        return self.store.get(name)

    def iterate_names(self, below: str) -> Iterator[str]:
        return iter(self.list_files(below))

    def read(self, name: str) -> bytes:
        return self.store[name]

    def read_each(self, below: str, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        return ((name, self.store[f"{below}/{name}"]) for name in names)

    def create(self, name: str, data: bytes | memoryview) -> bool:
        content = bytes(data)
        return self.store.setdefault(name, content) is content

    def replace(self, name: str, data: bytes) -> None:
        self.store[name] = data


class JsonFormat:
    """A format whose files hold only the record."""

    SUFFIX = ".parquet"

    @staticmethod
    def serialize_part(rows: object, record: PartRecord, layout: OutputSchema) -> tuple[memoryview, tuple[()]]:
        return memoryview(record.to_json()), ()

    @staticmethod
    def read_groups(edge: bytes, file: object) -> tuple[()]:
        return ()


@pytest.fixture(autouse=True)
def parts_of_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "PART_FORMATS", {"parquet": JsonFormat})
    monkeypatch.setattr(parts_module, "read_record_json", lambda data, name: data)


def make_record(number: int, writer: int, rows: int = 0) -> PartRecord:
    """Return a part's record. writer: 0 if all writers make the same bytes, otherwise the writer's own number."""
    return PartRecord(
        format=1,
        identity="identity",
        unit=UNIT.name,
        part=number,
        last=number == PARTS - 1,
        source=UNIT.path,
        source_bytes=UNIT.bytes,
        range=None,
        first=number,
        samples=1,
        rows=rows,
        filtered={} if rows else {"min_size": 1},
        enlarged=writer,
        inputs="",
        rejects=(),
        tally={},
    )


def write(folder: Replay | Disk, writer: int, twins: bool = False, is_told: bool = False) -> list[tuple[str, str]]:
    """Make the requests of `flow.process_unit`. Returns the files and hashes of the parts with which the writer ends.

    twins: the first writer makes parts with rows, the others without.
    is_told: its driver listed the cache before any part existed. Otherwise the writer lists the files of the unit.
    """
    committed = commits.read_commit_if_exists(folder, UNIT.name)  # type: ignore[arg-type]
    if committed is not None:
        return [(entry["file"], entry["sha256"]) for entry in committed["parts"]]
    standing = () if is_told else list_unit_files(folder, UNIT.name)  # type: ignore[arg-type]
    unit_parts = UnitParts(folder, UNIT.name, "identity", OutputSchema(), standing)  # type: ignore[arg-type]
    parts: list[PartInfo] = []
    while not parts or not parts[-1].record.last:
        record = make_record(len(parts), writer, rows=int(twins and writer == 1))
        part = unit_parts.find(len(parts))
        parts.append(part or unit_parts.publish(record, [None] * record.rows))  # type: ignore[list-item]
    commits.write_commit(folder, parts)  # type: ignore[arg-type]
    return [(part.file, part.sha256) for part in parts]


@dataclass(frozen=True)
class Writer:
    """One writer. answers: those so far. restarts: how often it may still restart after an error. parts: its result.

    is_told: see `write`. A restarted writer is not told, because it has perhaps created parts before.
    """

    answers: tuple[object, ...] = ()
    restarts: int = 1
    is_told: bool = False
    ended: str = ""
    parts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class State:
    store: Store = ()
    writers: tuple[Writer, ...] = ()
    late: frozenset[tuple[str, bytes]] = field(default_factory=frozenset)


def put(store: Store, name: str, data: bytes, conditional: bool) -> tuple[Store, bool]:
    """Return the store after a create, and whether the create succeeded."""
    files = dict(store)
    if conditional and name in files:
        return store, False
    return tuple(sorted({**files, name: data}.items())), True


@cache
def step(
    answers: tuple[object, ...], writer: int, twins: bool, is_told: bool
) -> Request | str | tuple[tuple[str, str], ...]:
    """Return what a writer does after these answers: its next request, an error, or the parts with which it ends."""
    try:
        return tuple(write(Replay(answers, twins=twins), writer, twins, is_told))
    except Request as request:
        return request
    except StorageError as error:
        return str(error)


def followers(state: State, distinct: bool, twins: bool, conditional: bool) -> Iterator[State]:
    """Yield every state that can follow."""
    for name, data in state.late:
        store, _ = put(state.store, name, data, conditional)
        yield replace(state, store=store, late=state.late - {(name, data)})
    for index, writer in enumerate(state.writers):
        if writer.ended:
            continue

        def replace_writer(new: Writer, index: int = index, **changed: Any) -> State:
            return replace(state, writers=(*state.writers[:index], new, *state.writers[index + 1 :]), **changed)

        yield replace_writer(Writer(ended="crashed"))
        outcome = step(writer.answers, index + 1 if distinct else 0, twins, writer.is_told)
        if isinstance(outcome, str):
            yield replace_writer(Writer(restarts=writer.restarts - 1) if writer.restarts else Writer(ended="failed"))
        elif isinstance(outcome, tuple):
            yield replace_writer(Writer(ended="done", parts=outcome))
        elif outcome.verb == "list":
            below, _, prefix = outcome.name.partition("/")
            names = tuple(Disk(dict(state.store)).list_files_of(below, prefix))
            yield replace_writer(replace(writer, answers=(*writer.answers, names)))
        elif outcome.verb == "read":
            yield replace_writer(replace(writer, answers=(*writer.answers, dict(state.store).get(outcome.name))))
        else:
            store, is_created = put(state.store, outcome.name, outcome.data, conditional)
            answered = replace(writer, answers=(*writer.answers, is_created))
            lost = replace(writer, answers=(*writer.answers, LOST))
            yield replace_writer(answered, store=store)
            yield replace_writer(lost, store=store)
            if is_created:
                yield replace_writer(lost)
                if index == 0:  # only the first writer's requests arrive twice: more would add states, but no cases
                    yield replace_writer(answered, store=store, late=state.late | {(outcome.name, outcome.data)})


def check(before: State, after: State, twins: bool) -> None:
    """Check the invariants of one step. With twins, two writers can end with different parts, until a repair."""
    earlier, now = dict(before.store), dict(after.store)
    assert all(now.get(name) == data for name, data in earlier.items()), "an existing file never changes"
    results = {writer.parts for writer in after.writers if writer.ended == "done"}
    assert twins or len(results) <= 1, "all writers end with the same parts"
    assert is_consistent(after.store)
    if results:
        assert COMMIT in now
        assert len({strip_extension(name).partition("/")[2] for name in now if name != COMMIT}) == PARTS


@cache
def is_consistent(store: Store) -> bool:
    """Return whether the commit names existing parts with their hashes."""
    files = dict(store)
    parts = json.loads(files[COMMIT])["parts"] if COMMIT in files else []
    return all(part["sha256"] == hashlib.sha256(files[part["file"]]).hexdigest() for part in parts)


def check_completion(store: Store, reports: frozenset[tuple[tuple[str, str], ...]], with_log: bool) -> None:
    """Check that an undisturbed writer can finish, and that commit and scan then have each part that counts once.

    reports: the parts that writers have reported. Their drivers add them to the log. with_log: scan the cache as well;
    for three writers, that would take minutes.
    """
    disk = Disk(dict(store))
    for report in sorted(reports):
        log = LogWriter(disk)  # type: ignore[arg-type]
        parts = [inspect_part(disk, file, "identity") for file, _ in report]  # type: ignore[arg-type]
        log.add([part.summary for part in parts if part])
        assert log.write() is None
    write(disk, writer=9)
    repair = Repair(identity_sha256="identity", container="parquet")
    counted = set(list_part_files(disk)) - find_twins(list_part_files(disk))  # type: ignore[arg-type]
    assert len(counted) == PARTS
    for _ in range(2 * with_log):  # the second time, all is in the log
        assert scan(disk, repair) == {file: hashlib.sha256(disk.store[file]).hexdigest() for file in counted}
        assert {part["file"] for part in json.loads(disk.store[COMMIT])["parts"]} == counted
    if with_log:
        logs = [name for name in disk.store if name.startswith("_log/")]
        scan(disk, repair)
        assert [name for name in disk.store if name.startswith("_log/")] == logs, "nothing is added twice"
    assert {part["file"] for part in json.loads(disk.store[COMMIT])["parts"]} == counted
    assert is_consistent(tuple(disk.store.items()))


def scan(disk: Disk, repair: Repair) -> dict[str, str]:
    """Return the sha256 of each part that counts, from a scan."""
    found = CacheScan(disk, repair)  # type: ignore[arg-type]
    rows = [row for table in found.read_tables("identity") for row in table.rows.to_pylist()]
    assert len(rows) == len(found.files)
    return {row["file"]: row["sha256"].hex() for row in rows if row["file"] not in found.twins}


def explore(
    told: Sequence[bool],
    restarts: int,
    distinct: bool,
    twins: bool = False,
    conditional: bool = True,
    with_log: bool = True,
) -> int:
    """Visit all states, and return their number.

    told: for each writer, whether its driver listed the cache (`write`).
    restarts: how often a writer may restart after an error.
    """
    start = State(writers=tuple(Writer(restarts=restarts, is_told=is_told) for is_told in told))
    visited, pending, checked = {start}, [start], set[tuple[object, ...]]()
    while pending:
        state = pending.pop()
        reports = frozenset(writer.parts for writer in state.writers if writer.ended == "done" and with_log)
        if (state.store, reports) not in checked:
            checked.add((state.store, reports))
            check_completion(state.store, reports, with_log)
        for after in followers(state, distinct, twins, conditional):
            check(state, after, twins)
            if after not in visited:
                visited.add(after)
                pending.append(after)
    return len(visited)


TOLD, LISTS = True, False
ALL = pytest.mark.parametrize(
    "told", [(TOLD, LISTS), *map(slow_param, ((TOLD, TOLD), (LISTS, TOLD), (LISTS, LISTS)))], ids=str
)
DISTINCT = pytest.mark.parametrize("distinct", [slow_param(False), True], ids=["equal bytes", "different bytes"])


@ALL
@DISTINCT
def test_two_writers_keep_the_cache_consistent(told: Sequence[bool], distinct: bool) -> None:
    assert explore(told, restarts=1, distinct=distinct) > 30_000


@ALL
def test_two_writers_that_disagree_on_rows_keep_the_cache_consistent(told: Sequence[bool]) -> None:
    assert explore(told, restarts=0, distinct=True, twins=True) > 5_000


@pytest.mark.slow
@pytest.mark.timeout(400)
@DISTINCT
def test_three_writers_keep_the_cache_consistent(distinct: bool) -> None:
    assert explore((TOLD, TOLD, LISTS), restarts=0, distinct=distinct, with_log=False) > 100_000


def test_the_file_is_read_as_soon_as_an_answer_is_lost() -> None:
    own, other = make_record(0, writer=1), make_record(0, writer=2)
    for existing in (own, other):
        folder = Replay((LOST, existing.to_json()))
        assert publish_part(folder, own, (), OutputSchema()).record == existing  # type: ignore[arg-type]
    with pytest.raises(StorageError, match="no answer"):
        publish_part(Replay((LOST, None)), own, (), OutputSchema())  # type: ignore[arg-type]


def test_a_store_that_overwrites_makes_the_model_fail() -> None:
    """The model can fail: a plain PUT overwrites."""
    with pytest.raises(AssertionError):
        explore((TOLD, TOLD), restarts=0, distinct=True, conditional=False)
