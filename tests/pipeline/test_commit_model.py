"""Every interleaving of two and three writers of one unit, with crashes, lost acknowledgements and late duplicates.

The code under test is the real one (`commit.find`, `publish`, `finish`), on a store that answers a request at a time. A
writer is run again from its start with the answers it has had so far, until it asks for one more; so a state is small,
and all states are visited once.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest

from pipeline import commit
from pipeline.errors import StorageError
from pipeline.layout import Layout
from pipeline.records import Record, Standing, Unit

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
        # the parts of this model have no rows, so nothing is ever put into data/
        return self._next(Asks("read", name)) if name.endswith(".json") else None

    def create(self, name: str, data: bytes) -> bool:
        return bool(self._next(Asks("create", name, data)))


def record(number: int, writer: int) -> Record:
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
        rows=0,
        filtered=1,
        enlarged=writer,
        rejects=(),
        tally={},
    )


def write(folder: Replay, writer: int) -> list[Standing]:
    """What `flow.process` does with the store."""
    standing: list[Standing] = []
    while not standing or not standing[-1].record.last:
        number = len(standing)
        part = commit.find(folder, UNIT.name, number, "identity")  # type: ignore[arg-type]
        standing.append(part or commit.publish(folder, record(number, writer), (), Layout()))  # type: ignore[arg-type]
    commit.finish(folder, standing)  # type: ignore[arg-type]
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
def step(answers: tuple[object, ...], writer: int) -> Asks | str | tuple[tuple[str, str], ...]:
    """What a writer does after these answers: its next request, an error, or its end with these parts."""
    try:
        return tuple((part.file, part.sha256) for part in write(Replay(answers), writer))
    except Asks as asks:
        return asks
    except StorageError as error:
        return str(error)


def followers(state: State, distinct: bool, conditional: bool) -> Iterator[State]:
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
        asks = step(writer.answers, index + 1 if distinct else 0)
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


def check(before: State, after: State) -> None:
    """What must hold of every step."""
    then, now = dict(before.store), dict(after.store)
    assert all(now.get(name) == data for name, data in then.items()), "what stands is never changed"
    seen = {writer.seen for writer in after.writers if writer.ended == "done"}
    assert len(seen) <= 1, "all who ended saw the same parts"
    assert is_consistent(after.store)
    if seen:
        assert COMMIT in now
        assert sum(name.startswith("_empty/") for name in now) == PARTS


@cache
def is_consistent(store: Store) -> bool:
    """Whether a commit names parts that stand, with their hashes."""
    there = dict(store)
    parts = json.loads(there[COMMIT])["parts"] if COMMIT in there else []
    return all(part["sha256"] == hashlib.sha256(there[part["file"]]).hexdigest() for part in parts)


def completes(store: Store) -> None:
    """From here a calm writer ends well."""
    writer = Writer()
    while not writer.ended:
        try:
            write(Replay(writer.answers), writer=9)
        except Asks as asks:
            answer: object = dict(store).get(asks.name)
            if asks.verb == "create":
                store, answer = put(store, asks.name, asks.data, conditional=True)
            writer = replace(writer, answers=(*writer.answers, answer))
        else:
            writer = Writer(ended="done")
    assert {COMMIT} <= dict(store).keys()


def explore(writers: int, again: int, distinct: bool, conditional: bool = True) -> int:
    """Visit all states; how many there are. again: how often a writer may begin anew after an error."""
    start = State(writers=(Writer(again=again),) * writers)
    seen, left, stores = {start}, [start], set[Store]()
    while left:
        state = left.pop()
        if state.store not in stores:
            stores.add(state.store)
            completes(state.store)
        for after in followers(state, distinct, conditional):
            check(state, after)
            if after not in seen:
                seen.add(after)
                left.append(after)
    return len(seen)


@pytest.mark.parametrize("distinct", [False, True], ids=["equal bytes", "bytes of their own"])
def test_nothing_that_two_writers_meet_breaks_it(distinct: bool) -> None:
    assert explore(writers=2, again=1, distinct=distinct) > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("distinct", [False, True], ids=["equal bytes", "bytes of their own"])
def test_nothing_that_three_writers_meet_breaks_it(distinct: bool) -> None:
    assert explore(writers=3, again=0, distinct=distinct) > 100_000


def test_a_lost_answer_is_looked_up_at_once() -> None:
    mine, theirs = record(0, writer=1), record(0, writer=2)
    for standing in (mine, theirs):
        folder = Replay((LOST, standing.to_json()))
        assert commit.publish(folder, mine, (), Layout()).record == standing  # type: ignore[arg-type]
    with pytest.raises(StorageError, match="no answer"):
        commit.publish(Replay((LOST, None)), mine, (), Layout())  # type: ignore[arg-type]


def test_a_store_that_overwrites_breaks_it() -> None:
    """The model can fail: this is what a plain PUT would do."""
    with pytest.raises(AssertionError):
        explore(writers=2, again=0, distinct=True, conditional=False)
