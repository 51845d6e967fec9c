"""What is known of the node that a Ray worker runs on: its name, its cores, the worker's log, and why it was lost."""

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.ray_address import explain_lost_actor

LOG_LINES = 20  # shown of a lost worker's log


@dataclass(frozen=True, slots=True)
class WorkerLocation:
    """Where a worker runs.

    node: Ray's id of the node.
    log: the file that the worker's standard error goes to; empty if unknown.
    """

    node: str
    host: str
    log: str


def locate_this_worker() -> WorkerLocation:
    """Return the location of the worker in whose process this runs."""
    try:
        log = os.readlink("/proc/self/fd/2")
    except OSError:  # not Linux
        log = ""
    return WorkerLocation(ray.get_runtime_context().get_node_id(), os.uname().nodename, log)


def count_cores_of_this_worker() -> float:
    """Return the cores of its node that this worker may use: in proportion to its GPUs, otherwise those it reserves."""
    context = ray.get_runtime_context()
    node_id, own = context.get_node_id(), context.get_assigned_resources()  # type: ignore[no-untyped-call]
    node = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == node_id)  # type: ignore[no-untyped-call]
    return float(node.get("CPU", 1) * own["GPU"] / node["GPU"] if own.get("GPU") else own.get("CPU", 1))


def read_last_lines(location: WorkerLocation | None) -> Sequence[str]:
    """Return the last lines of a worker's standard error. They are read here, or by a task on the worker's node."""
    if location is None or not location.log:
        return []
    if location.node == ray.get_runtime_context().get_node_id():
        return read_log_tail(location.log)
    on_node = NodeAffinitySchedulingStrategy(location.node, soft=False)
    read = ray.remote(read_log_tail).options(num_cpus=0, scheduling_strategy=on_node)
    try:
        return ray.get(read.remote(location.log), timeout=5)
    except RayError:  # the node is lost, or too slow
        return []


def read_log_tail(path: str) -> list[str]:
    """Return the last lines of a log, without Ray's own lines. They are empty if the log cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = deque(file, 4 * LOG_LINES)
    except OSError:
        return []
    return [line.rstrip()[:300] for line in lines if line.strip() and not line.startswith(":")][-LOG_LINES:]


def died_with_its_node(error: RayError) -> bool:
    """Return whether an actor was lost because its node was lost, for example preempted."""
    return (
        bool(getattr(error, "preempted", False)) or "node has died" in str(error) or "node was terminated" in str(error)
    )


def describe_error(error: RayError) -> str:
    """Return Ray's description of an error in one line."""
    if isinstance(error, OutOfMemoryError):
        return "its machine ran out of memory, and Ray ended the process"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    reason = last if isinstance(error, RayTaskError) else f"{type(error).__name__}: {last}"
    return explain_lost_actor(reason[:300])
