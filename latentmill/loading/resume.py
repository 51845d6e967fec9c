"""Where a training stands in an epoch, as a small state, and how it goes on, also with other ranks or batches.

A session is what was done with one topology. What is left of an epoch after all sessions is planned anew. The state
counts batches, so it is the same on all ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from latentmill.errors import IdentityError, UsageError
from latentmill.loading.epoch_draws import LIMIT, check_epoch
from latentmill.loading.index import Index
from latentmill.loading.order import EpochOrder, OrderSettings, plan_epoch

VERSION = 1
_FIXED = ("seed", "shuffle", "ends")  # settings that a state must share


class Session(NamedTuple):
    """Steps that all ranks did with one topology: `OrderSettings` has the meaning of the fields."""

    world: int
    workers: int
    batch_size: int
    window: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EpochPlan:
    """An epoch: the sessions that are over, and the order of what they left.

    Steps are counted from the start of the epoch.
    """

    order: EpochOrder
    epoch: int
    sessions: tuple[Session, ...] = ()

    @property
    def first_step(self) -> int:
        """The first step of the order."""
        return sum(session.steps for session in self.sessions)

    @property
    def steps(self) -> int:
        """The number of steps of the epoch, those of the sessions included."""
        return self.first_step + self.order.steps

    def state_at(self, step: int) -> dict[str, Any]:
        """Return the state before a step, as plain JSON. After the last step, it is that of the next epoch."""
        settings, is_done = self.order.settings, step >= self.steps > 0
        sessions = [list(session) for session in self.sessions]
        if step > self.first_step:
            sessions.append([*_topology(settings), step - self.first_step])
        return {
            "version": VERSION,
            "epoch": self.epoch + is_done,
            **{name: getattr(settings, name) for name in _FIXED},
            "fingerprint": self.order.index.fingerprint,
            "sessions": [] if is_done else sessions,
        }


def _topology(settings: OrderSettings) -> tuple[int, int, int, int]:
    return settings.world, settings.workers, settings.batch_size, settings.window


def start_epoch(index: Index, settings: OrderSettings, epoch: int) -> EpochPlan:
    """Return the plan of a whole epoch. Raises UsageError if there is no epoch of that number."""
    check_epoch(epoch)
    return EpochPlan(order=plan_epoch(index, settings, epoch), epoch=epoch)


def plan_rest(index: Index, settings: OrderSettings, epoch: int, sessions: Sequence[Session]) -> EpochPlan:
    """Return the plan of an epoch after sessions. Raises UsageError if one has more steps than there were."""
    left = None
    for session in sessions:
        world, workers, batch_size, window, steps = session
        past = replace(settings, world=world, workers=workers, batch_size=batch_size, window=window)
        order = plan_epoch(index, past, epoch, left)
        if steps > order.steps:
            raise UsageError(f"the state has {steps} steps of a session that has {order.steps}: {session}")
        left = order.rows_after(steps)
    return EpochPlan(order=plan_epoch(index, settings, epoch, left), epoch=epoch, sessions=tuple(sessions))


def resume_epoch(index: Index, settings: OrderSettings, state: Mapping[str, Any]) -> tuple[EpochPlan, int]:
    """Return the plan that goes on after a state, and its next step.

    If nothing is left of the state's epoch, it is the next one. Raises IdentityError if the cache has other files than
    in the middle of the state's epoch, UsageError if the state is none, or has another seed, shuffle or ends.
    """
    epoch, sessions = _parse_state(state)
    for name in _FIXED:
        if state[name] != getattr(settings, name):
            raise UsageError(f"the state has {name}={state[name]!r}, but the loader has {getattr(settings, name)!r}")
    if sessions and state["fingerprint"] != index.fingerprint:
        raise IdentityError(
            f"the state was saved within epoch {epoch} of a cache with the fingerprint {state['fingerprint']}, but the "
            f"cache has {index.fingerprint}: files were added or removed. Go on with the files of that time (`files=`) "
            f"or with the next epoch, set_epoch({epoch + 1})"
        )
    is_same = bool(sessions) and sessions[-1][:4] == _topology(settings)
    plan = plan_rest(index, settings, epoch, sessions[:-1] if is_same else sessions)
    steps = sessions[-1].steps if is_same else 0
    if steps > plan.order.steps:
        raise UsageError(f"the state has {steps} steps of a session that has {plan.order.steps}: {sessions[-1]}")
    if sessions and steps == plan.order.steps:
        return start_epoch(index, settings, epoch + 1), 0
    return plan, plan.first_step + steps


def is_within_epoch(state: Mapping[str, Any], index: Index) -> bool:
    """Return whether a state is in the middle of an epoch of these files."""
    _, sessions = _parse_state(state)
    return bool(sessions) and state["fingerprint"] == index.fingerprint


def _parse_state(state: Mapping[str, Any]) -> tuple[int, list[Session]]:
    """Return the epoch and the sessions of a state."""
    known = {"version", "epoch", "sessions", "fingerprint", *_FIXED}
    if not isinstance(state, Mapping) or set(state) != known or state["version"] != VERSION:
        raise UsageError(f"this is not a state of version {VERSION} of a loader: {state!r}")
    try:
        sessions = [Session(*(int(value) for value in session)) for session in state["sessions"]]
        epoch = int(state["epoch"])
        if not 0 <= epoch < LIMIT:
            raise ValueError
        return epoch, [session for session in sessions if session.steps > 0]
    except (TypeError, ValueError) as error:
        raise UsageError(f"this is not a state of a loader: {state!r}") from error
