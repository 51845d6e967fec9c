"""Remote openers on Ray: actors that decode and transform images on nodes without GPUs, for a worker on another node.

An actor belongs to the worker that started it, and ends with it. Ray starts it again, perhaps on another node, if it or
its node was lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from pipeline.images.prepare import OpenedImage, make_opener
from pipeline.images.remote_openers import ImageFile, Result
from pipeline.images.transform import Transform
from pipeline.limits import Limits

SPARE_SECONDS = 60.0  # in addition to the time limits of a block's images


@dataclass(frozen=True, slots=True)
class RayOpeners:
    """The number of actors per worker. Each reserves one CPU, and waits until Ray finds one."""

    count: int

    def start(self, transform: Transform, limits: Limits) -> Sequence["RayOpener"]:
        """Start the actors, on nodes without GPUs. Called in the worker."""
        with_gpus = [node["NodeID"] for node in ray.nodes() if node["Resources"].get("GPU")]  # type: ignore[no-untyped-call]
        labels = {"ray.io/node-id": f"!in({','.join(sorted(with_gpus))})"} if with_gpus else {}
        return [
            RayOpener(OpenerActor.options(label_selector=labels).remote(transform, limits), limits)  # type: ignore[attr-defined]
            for _ in range(self.count)
        ]


@ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=0)
class OpenerActor:
    """A process that opens images."""

    def __init__(self, transform: Transform, limits: Limits) -> None:
        torch.set_num_threads(1)
        self.opener = make_opener(transform, limits)

    def is_ready(self) -> bool:
        """Return as soon as the process runs."""
        return True

    def open_images(self, block: Sequence[ImageFile]) -> list[Any]:
        """Open images. The pixels are returned as an array, which Ray moves without pickling it."""
        return [self._open(*file) for file in block]

    def _open(self, data: bytes, shard: str, key: str) -> Any:
        try:
            opened = self.opener(data, shard, key)
        except Exception as error:  # a Rejected, a FilteredOut, or an error that the worker raises
            return error
        return opened.pixels.numpy(), opened.original_height, opened.original_width, opened.fit, opened.truncated


@dataclass(frozen=True, slots=True)
class RayOpener:
    """The worker's side of an actor. See `remote_openers.RemoteOpener`."""

    actor: Any
    limits: Limits

    def wait_until_ready(self) -> None:
        """Wait until the actor runs. Raises ConnectionError if it was lost meanwhile."""
        try:
            ray.get(self.actor.is_ready.remote())
        except RayError as error:
            raise ConnectionError(str(error)) from error

    def open_images(self, block: Sequence[ImageFile]) -> Sequence[Result]:
        """Open a block of images. Raises ConnectionError if the actor was lost, or takes too long."""
        try:
            answers = ray.get(
                self.actor.open_images.remote(block), timeout=len(block) * self.limits.seconds + SPARE_SECONDS
            )
        except GetTimeoutError as error:
            ray.kill(self.actor, no_restart=False)
            raise ConnectionError(str(error)) from error
        except RayTaskError:  # a fault of this program
            raise
        except RayError as error:
            raise ConnectionError(str(error)) from error
        return [_make_result(answer) for answer in answers]


def _make_result(answer: Any) -> Result:
    """Return the result of an image, with pixels of its own, so that Ray can free the block."""
    if isinstance(answer, Exception):
        return answer
    pixels, *facts = answer
    return OpenedImage(torch.from_numpy(pixels.copy()), *facts)
