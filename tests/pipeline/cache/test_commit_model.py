"""Every interleaving of two and three writers of one unit, with crashes, lost acknowledgements and late duplicates.

The code under test is the real one (`commit.find`, `publish`, `finish`), on a store that answers a request at a time. A
writer is run again from its start with the answers it has had so far, until it asks for one more; so a state is small,
and all states are visited once.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest

from pipeline.cache import commits
from pipeline.cache import parts as parts_module
from pipeline.cache.commit_reader import CacheListing, Repair, pair_with_commits
from pipeline.cache.parts import find_empty_duplicates, find_part, list_part_files, publish_part, stem_of
from pipeline.errors import StorageError
from pipeline.formats.record import PartInfo, Record
from pipeline.formats.schema import OutputSchema
from pipeline.records import Unit

UNIT = Unit(name="u-0123456789abcdef", kind="tar", url="/s/u.tar", path="s/u.tar", bytes=3)
PARTS = 2
COMMIT = f"_commits/{UNIT.name}.json"
LOST = "lost"  # an answer that never came: the writer sees an error

Store = tuple[tuple[str, bytes], ...]


class Asks(BaseException):
    """A writer's next request."""

    def __init__(self, verb: str, name: str, data: bytes = b"") -> None:
        self.verb, self.name, self.data = verb, name, data


@dataclass
class Replay:
    """What a writer takes for a folder: it gives the answers of before, then raises the request that has none."""

    answers: tuple[object, ...]
    given: int = 0
    twins: bool = False

    def at(self, name: str) -> str:
        return name

    def _next(self, asks: Asks) -> Any:
        if self.given == len(self.answers):
            raise asks
        self.given += 1
        answer = self.answers[self.given - 1]
        if answer == LOST:
            raise StorageError("no answer")
        return answer

    def read_if_there(self, name: str) -> bytes | None:
        # where no part has rows, nothing is ever put into data/
        return self._next(Asks("read", name)) if self.twins or name.endswith(".json") else None

    def create(self, name: str, data: bytes) -> bool:
        return bool(self._next(Asks("create", name, data)))


@dataclass
class Disk:
    """A folder that answers at once."""

    store: dict[str, bytes]

    def at(self, name: str) -> str:
        return name

    def names(self, below: str) -> list[str]:
        return sorted(name.partition("/")[2] for name in self.store if name.startswith(f"{below}/"))

    def read_if_there(self, name: str) -> bytes | None:
        return self.store.get(name)

    def read_each(self, below: str, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        return ((name, self.store[f"{below}/{name}"]) for name in names)

    def create(self, name: str, data: bytes) -> bool:
        return self.store.setdefault(name, data) is data

    def replace(self, name: str, data: bytes) -> None:
        self.store[name] = data


class JsonWriter:
    """Parts with rows whose whole content is their record."""

    SUFFIX = ".parquet"

    @staticmethod
    def serialize_part(rows: object, record: Record, layout: OutputSchema) -> bytes:
        return record.to_json()


@pytest.fixture(autouse=True)
def parts_of_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "WRITERS", {"parquet": JsonWriter})
    monkeypatch.setattr(parts_module, "read_record_json", lambda data, name: data)


def record(number: int, writer: int, rows: int = 0) -> Record:
    """A part's record. writer: 0 where all writers make the same bytes, else what tells theirs apart."""
    return Record(
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
        filtered=1 - rows,
        enlarged=writer,
        inputs="",
        rejects=(),
        tally={},
    )


def write(folder: Replay | Disk, writer: int, twins: bool = False) -> list[PartInfo]:
    """What `flow.process` does with the store. twins: the first writer makes parts with rows, others without."""
    standing: list[PartInfo] = []
    while not standing or not standing[-1].record.last:
        number = len(standing)
        part = find_part(folder, UNIT.name, number, "identity")  # type: ignore[arg-type]
        made = record(number, writer, rows=int(twins and writer == 1))
        standing.append(part or publish_part(folder, made, [None] * made.rows, OutputSchema()))  # type: ignore[arg-type, list-item]
    commits.write_commit(folder, standing)  # type: ignore[arg-type]
    return standing


@dataclass(frozen=True)
class Writer:
    """answers: so far. again: how often it may still begin anew after an error. seen: what it ended with."""

    answers: tuple[object, ...] = ()
    again: int = 1
    ended: str = ""
    seen: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class State:
    store: Store = ()
    writers: tuple[Writer, ...] = ()
    late: frozenset[tuple[str, bytes]] = field(default_factory=frozenset)


def put(store: Store, name: str, data: bytes, conditional: bool) -> tuple[Store, bool]:
    """The store after a create, and whether it was granted."""
    there = dict(store)
    if conditional and name in there:
        return store, False
    return tuple(sorted({**there, name: data}.items())), True


@cache
def step(answers: tuple[object, ...], writer: int, twins: bool) -> Asks | str | tuple[tuple[str, str], ...]:
    """What a writer does after these answers: its next request, an error, or its end with these parts."""
    try:
        return tuple((part.file, part.sha256) for part in write(Replay(answers, twins=twins), writer, twins))
    except Asks as asks:
        return asks
    except StorageError as error:
        return str(error)


def followers(state: State, distinct: bool, twins: bool, conditional: bool) -> Iterator[State]:
    """All that can happen next."""
    for name, data in state.late:
        store, _ = put(state.store, name, data, conditional)
        yield replace(state, store=store, late=state.late - {(name, data)})
    for index, writer in enumerate(state.writers):
        if writer.ended:
            continue

        def becomes(new: Writer, index: int = index, **changed: Any) -> State:
            return replace(state, writers=(*state.writers[:index], new, *state.writers[index + 1 :]), **changed)

        yield becomes(Writer(ended="crashed"))
        asks = step(writer.answers, index + 1 if distinct else 0, twins)
        if isinstance(asks, str):
            yield becomes(Writer(again=writer.again - 1) if writer.again else Writer(ended="failed"))
        elif isinstance(asks, tuple):
            yield becomes(Writer(ended="done", seen=asks))
        elif asks.verb == "read":
            yield becomes(replace(writer, answers=(*writer.answers, dict(state.store).get(asks.name))))
        else:
            store, granted = put(state.store, asks.name, asks.data, conditional)
            answered = replace(writer, answers=(*writer.answers, granted))
            lost = replace(writer, answers=(*writer.answers, LOST))
            yield becomes(answered, store=store)
            yield becomes(lost, store=store)
            if granted:
                yield becomes(lost)
                if index == 0:  # one writer's requests come twice: more of them add states, not cases
                    yield becomes(answered, store=store, late=state.late | {(asks.name, asks.data)})


def check(before: State, after: State, twins: bool) -> None:
    """What must hold of every step. With twins two may have seen different parts: `mend` brings that in order."""
    then, now = dict(before.store), dict(after.store)
    assert all(now.get(name) == data for name, data in then.items()), "what stands is never changed"
    seen = {writer.seen for writer in after.writers if writer.ended == "done"}
    assert twins or len(seen) <= 1, "all who ended saw the same parts"
    assert is_consistent(after.store)
    if seen:
        assert COMMIT in now
        assert len({stem_of(name).partition("/")[2] for name in now if name != COMMIT}) == PARTS


@cache
def is_consistent(store: Store) -> bool:
    """Whether a commit names parts that stand, with their hashes."""
    there = dict(store)
    parts = json.loads(there[COMMIT])["parts"] if COMMIT in there else []
    return all(part["sha256"] == hashlib.sha256(there[part["file"]]).hexdigest() for part in parts)


def completes(store: Store) -> None:
    """From here a calm writer ends well, and then `_commits` names the files that count, each part once."""
    disk = Disk(dict(store))
    write(disk, writer=9)
    mending = Repair(identity="identity", container="parquet")
    assert list(pair_with_commits(disk, CacheListing.of(disk), lambda name, said: said, mending))  # type: ignore[arg-type]
    counted = set(list_part_files(disk)) - find_empty_duplicates(list_part_files(disk))  # type: ignore[arg-type]
    assert {part["file"] for part in json.loads(disk.store[COMMIT])["parts"]} == counted
    assert len(counted) == PARTS
    assert is_consistent(tuple(disk.store.items()))


def explore(writers: int, again: int, distinct: bool, twins: bool = False, conditional: bool = True) -> int:
    """Visit all states; how many there are. again: how often a writer may begin anew after an error."""
    start = State(writers=(Writer(again=again),) * writers)
    seen, left, stores = {start}, [start], set[Store]()
    while left:
        state = left.pop()
        if state.store not in stores:
            stores.add(state.store)
            completes(state.store)
        for after in followers(state, distinct, twins, conditional):
            check(state, after, twins)
            if after not in seen:
                seen.add(after)
                left.append(after)
    return len(seen)


@pytest.mark.parametrize("distinct", [False, True], ids=["equal bytes", "bytes of their own"])
def test_nothing_that_two_writers_meet_breaks_it(distinct: bool) -> None:
    assert explore(writers=2, again=1, distinct=distinct) > 10_000


def test_nothing_that_two_writers_meet_breaks_it_where_they_disagree_on_rows() -> None:
    assert explore(writers=2, again=0, distinct=True, twins=True) > 1_000


@pytest.mark.slow
@pytest.mark.parametrize("distinct", [False, True], ids=["equal bytes", "bytes of their own"])
def test_nothing_that_three_writers_meet_breaks_it(distinct: bool) -> None:
    assert explore(writers=3, again=0, distinct=distinct) > 100_000


def test_a_lost_answer_is_looked_up_at_once() -> None:
    mine, theirs = record(0, writer=1), record(0, writer=2)
    for standing in (mine, theirs):
        folder = Replay((LOST, standing.to_json()))
        assert publish_part(folder, mine, (), OutputSchema()).record == standing  # type: ignore[arg-type]
    with pytest.raises(StorageError, match="no answer"):
        publish_part(Replay((LOST, None)), mine, (), OutputSchema())  # type: ignore[arg-type]


def test_a_store_that_overwrites_breaks_it() -> None:
    """The model can fail: this is what a plain PUT would do."""
    with pytest.raises(AssertionError):
        explore(writers=2, again=0, distinct=True, conditional=False)
