"""Where a job runs: this process, a local Ray, or a cluster; on which devices, and with how many replicas.

Ray takes seconds to start, so nothing is connected before it is needed.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from jobs.engine import Executor, WorkerSpec
from jobs.local_executor import LocalExecutor
from jobs.options import Common
from pipeline.encoder import ComputeConfig
from pipeline.errors import UsageError
from pipeline.weights import Vae

GPU_SLICE, CPU_SLICE = 8, 1  # measured on CPUs (docs/benchmarks.md); on GPUs to be measured


class ResourcePlan:
    """What the options say of where to run, worked out against what is there."""

    def __init__(self, options: Common, stack: ExitStack) -> None:
        self.options = options
        self.workers = parse_worker_count(options.workers)
        self._stack = stack
        self._device: str | None = None

    @property
    def is_inline(self) -> bool:
        return self.workers == 0

    @property
    def device(self) -> str:
        """`cuda`, `mps` or `cpu`. Connects to Ray on first use."""
        if self._device is None:
            self._device = self._inline_device() if self.is_inline else self._cluster_device()
        return self._device

    def compute(
        self, precision: str, slice_size: int = 0, batch_size: int = 0, compiled: bool = False
    ) -> ComputeConfig:
        """How replicas run here; 0 stands for the default."""
        slices = slice_size or (CPU_SLICE if self.device == "cpu" else GPU_SLICE)
        if batch_size % slices:
            raise UsageError(f"--batch-size {batch_size} is not a multiple of --slice-size {slices}")
        return ComputeConfig(
            device=self.device,
            precision=precision,
            slice_size=slices,
            batch_size=batch_size or slices,
            threads=self.options.cpus_per_worker,
            compile=compiled,
        )

    def start(self, job: WorkerSpec, vae: Vae, tasks: int, stop: threading.Event) -> Executor:
        """An engine with as many replicas as were asked for, or as there is room and work for."""
        if self.is_inline:
            return self._closing(LocalExecutor(job, vae, stop))
        from jobs import ray_executor

        on_gpu = self.device == "cuda"
        per_worker = self.options.gpus_per_worker if on_gpu else self.options.cpus_per_worker
        room = int((ray_executor.gpus() if on_gpu else ray_executor.cpus()) / per_worker)
        workers = self.workers or max(1, min(room, tasks))
        gpus = self.options.gpus_per_worker if on_gpu else 0.0
        grows = self.workers is None and ray_executor.can_grow(self.options.address)
        return self._closing(
            ray_executor.RayExecutor(
                job, vae, workers, gpus, self.options.cpus_per_worker, self.options.stall_timeout, grows
            )
        )

    def close(self) -> None:
        """End what was started: the engine, and a Ray of our own. Then others can have the devices."""
        self._stack.close()

    def _closing(self, engine: Executor) -> Executor:
        self._stack.callback(engine.close)
        return engine

    def _inline_device(self) -> str:
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        if self.options.device == "auto":
            return next(device for device, is_there in there.items() if is_there)
        if not there[self.options.device]:
            raise UsageError(f"--device {self.options.device}: this machine has none")
        return self.options.device

    def _cluster_device(self) -> str:
        from jobs import ray_executor

        self._stack.enter_context(ray_executor.connect(self.options.address))
        device = self.options.device
        if device == "mps":
            raise UsageError("--device mps works with --workers 0 only")
        if device == "cuda" and not ray_executor.gpus() and not ray_executor.can_grow(self.options.address):
            raise UsageError("--device cuda: this machine has no GPUs")
        return device if device != "auto" else ("cuda" if ray_executor.gpus() else "cpu")


@contextmanager
def plan_resources(options: Common) -> Iterator[ResourcePlan]:
    """The place for a job; what was started is ended with the block."""
    if options.cpus_per_worker < 1 or options.gpus_per_worker <= 0:
        raise UsageError("--cpus-per-worker must be at least 1, --gpus-per-worker more than 0")
    with ExitStack() as stack:
        yield ResourcePlan(options, stack)


def parse_worker_count(text: str) -> int | None:
    """`--workers`: None for auto."""
    if text == "auto":
        return None
    if not text.isdigit():
        raise UsageError(f"--workers must be a number or 'auto', not '{text}'")
    return int(text)
