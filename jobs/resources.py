"""Where a job runs: in this process, on a local Ray or on a cluster, on which device, and with how many workers.

Ray takes seconds to start, so the connection is made only when it is needed.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch

from jobs.executor import Executor, WorkerSpec
from jobs.local_executor import LocalExecutor
from jobs.options import Common
from pipeline.encoder import ComputeConfig
from pipeline.errors import UsageError
from pipeline.images.remote_openers import RemoteOpeners
from pipeline.records import Form
from pipeline.tuning import BATCH_SIZES, Candidates
from pipeline.weights import Vae

CPU_BATCH, MPS_BATCH = 1, 8  # measured on CPUs only (docs/benchmarks.md); workers on CUDA choose (`pipeline.tuning`)
FORMS: tuple[Form, ...] = ("plain", "fused", "compiled")


class ResourcePlan:
    """Resolves the options about devices and workers against the devices of this machine or cluster."""

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
            self._device = self._choose_inline_device() if self.is_inline else self._choose_cluster_device()
        return self._device

    def compute(self, precision: str, batch_size: int = 0, form: Form | Literal["auto"] = "auto") -> ComputeConfig:
        """Return how workers compute here. They may still choose what `candidates` returns.

        batch_size: 0 stands for the default, on CUDA the largest that workers may choose. Raises UsageError for a form
        that this device does not support.
        """
        if form == "fused" and self.device != "cuda":
            raise UsageError(f"--encoder-form fused is for CUDA GPUs, and this job runs on {self.device}; use plain")
        return ComputeConfig(
            device=self.device,
            precision=precision,
            batch_size=batch_size or {"cpu": CPU_BATCH, "mps": MPS_BATCH, "cuda": max(BATCH_SIZES)}[self.device],
            threads=self.options.cpus_per_worker,
            form="plain" if form == "auto" else form,
        )

    def candidates(self, batch_size: int = 0, form: Form | Literal["auto"] = "auto") -> Candidates | None:
        """Return what workers may choose for their GPU; None if nothing is left to choose, and on other devices."""
        if self.device != "cuda" or (batch_size and form != "auto"):
            return None
        return Candidates(FORMS if form == "auto" else (form,), (batch_size,) if batch_size else BATCH_SIZES)

    def count_openers(self, open_workers: int) -> int:
        """Return the number of openers per worker. 0: workers on GPUs derive it from their node."""
        return open_workers or (0 if self.device == "cuda" else self.options.cpus_per_worker)

    def plan_remote_openers(self, count: int) -> RemoteOpeners | None:
        """Return the remote openers that each worker starts. Raises UsageError if there is no cluster."""
        if not count:
            return None
        if self.is_inline:
            raise UsageError("--remote-openers does not work with --workers 0; leave it out, or use --open-workers")
        from jobs.ray_openers import RayOpeners

        return RayOpeners(count)

    def start_executor(self, spec: WorkerSpec, vae: Vae, tasks: int, stop: threading.Event) -> Executor:
        """Start an executor with `--workers` workers; auto: as many as there is capacity and work for."""
        if self.is_inline:
            return self._close_later(LocalExecutor(spec, vae, stop))
        from jobs import ray_executor

        on_gpu = self.device == "cuda"
        per_worker = self.options.gpus_per_worker if on_gpu else self.options.cpus_per_worker
        capacity = int((ray_executor.count_gpus() if on_gpu else ray_executor.count_cpus()) / per_worker)
        workers = self.workers or max(1, min(capacity, tasks))
        gpus = self.options.gpus_per_worker if on_gpu else 0.0
        is_cluster = ray_executor.can_grow(self.options.address)
        grows = self.workers is None and is_cluster
        return self._close_later(
            ray_executor.RayExecutor(
                spec,
                vae,
                workers,
                gpus,
                self.options.cpus_per_worker,
                self.options.stall_timeout,
                grows,
                is_local=not is_cluster,
            )
        )

    def close(self) -> None:
        """Stop the executor and the local Ray that were started, so that other jobs can use the devices."""
        self._stack.close()

    def _close_later(self, executor: Executor) -> Executor:
        self._stack.callback(executor.close)
        return executor

    def _choose_inline_device(self) -> str:
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        if self.options.device == "auto":
            return next(device for device, is_available in available.items() if is_available)
        if not available[self.options.device]:
            raise UsageError(f"--device {self.options.device}: this machine has none")
        return self.options.device

    def _choose_cluster_device(self) -> str:
        from jobs import ray_executor

        self._stack.enter_context(ray_executor.connect_to_ray(self.options.address))
        device = self.options.device
        if device == "mps":
            raise UsageError("--device mps works with --workers 0 only")
        if device == "cuda" and not ray_executor.count_gpus() and not ray_executor.can_grow(self.options.address):
            raise UsageError("--device cuda: this machine has no GPUs")
        return device if device != "auto" else ("cuda" if ray_executor.count_gpus() else "cpu")


@contextmanager
def plan_resources(options: Common) -> Iterator[ResourcePlan]:
    """Return the resources for a job. An executor or a Ray that they started is stopped at the end of the block."""
    if options.cpus_per_worker < 1 or options.gpus_per_worker <= 0:
        raise UsageError("--cpus-per-worker must be at least 1, and --gpus-per-worker must be more than 0")
    with ExitStack() as stack:
        yield ResourcePlan(options, stack)


def parse_worker_count(text: str) -> int | None:
    """Parse `--workers`; None for auto."""
    if text == "auto":
        return None
    if not text.isdigit():
        raise UsageError(f"--workers must be 0 or more, or auto, not '{text}'")
    return int(text)
