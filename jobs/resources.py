"""Where a job runs: in this process, on a local Ray or on a cluster, on which device, and with how many workers.

Ray takes seconds to start, so the connection is made only when it is needed.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch

from jobs.common_options import Common
from jobs.cores import count_cores
from jobs.executor import Executor, WorkerSpec
from jobs.local_executor import LocalExecutor
from jobs.metrics import Metrics, NoMetrics
from pipeline import jax_model
from pipeline.encoder import ComputeConfig
from pipeline.errors import UsageError
from pipeline.images.remote_openers import RemoteOpeners
from pipeline.records import Backend, Form
from pipeline.tuning import BATCH_SIZES, Candidates
from pipeline.weights import Vae

# Measured on CPUs only (docs/benchmarks.md). Workers on CUDA choose (`pipeline.tuning`).
CPU_BATCH, UNMEASURED_BATCH = 1, 8
FORMS: tuple[Form, ...] = ("plain", "fused", "compiled")


class ResourcePlan:
    """Resolves the options about devices and workers against the devices of this machine or cluster."""

    def __init__(self, options: Common, backend: Backend, stack: ExitStack) -> None:
        self.options, self.backend = options, backend
        self.workers = parse_worker_count(options.workers)
        self._stack = stack
        self._device: str | None = None

    @property
    def is_inline(self) -> bool:
        return self.workers == 0

    @property
    def device(self) -> str:
        """`cuda`, `mps`, `tpu` or `cpu`. Connects to Ray on first use."""
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
            batch_size=batch_size or self._default_batch,
            threads=self.options.cpus_per_worker,
            form="plain" if form == "auto" else form,
            backend=self.backend,
        )

    def candidates(self, batch_size: int = 0, form: Form | Literal["auto"] = "auto") -> Candidates | None:
        """Return what workers may choose for their GPU; None if nothing is left to choose, and on other devices."""
        if (self.backend, self.device) != ("torch", "cuda") or (batch_size and form != "auto"):
            return None
        return Candidates(FORMS if form == "auto" else (form,), (batch_size,) if batch_size else BATCH_SIZES)

    @property
    def _default_batch(self) -> int:
        if self.device == "cpu":
            return CPU_BATCH
        return max(BATCH_SIZES) if (self.backend, self.device) == ("torch", "cuda") else UNMEASURED_BATCH

    def count_openers(self, open_workers: int) -> int:
        """Return the number of openers per worker. 0: workers on GPUs derive it from their node."""
        return open_workers or (0 if self.device in ("cuda", "tpu") else self.options.cpus_per_worker)

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
            worker = spec.for_node(count_cores()).build(vae, stop)
            return self._close_later(LocalExecutor(worker, spec.tasks_per_worker, stop))
        from jobs import ray_executor

        workers = self.workers or min(
            count_auto_workers(self.options, self.device, ray_executor.count_resource), max(1, tasks)
        )
        is_cluster = ray_executor.can_grow(self.options.address)
        grows = self.workers is None and is_cluster
        return self._close_later(
            ray_executor.RayExecutor(
                spec,
                vae,
                workers,
                reserve_resources(self.options, self.device),
                self.options.stall_timeout,
                grows,
                is_local=not is_cluster,
            )
        )

    def start_metrics(self, verb: str, cache: str, units_done: int = 0) -> Metrics:
        """Return where a run publishes its progress: as metrics of Ray, or nowhere if it runs in this process.

        cache: its URL. units_done: how many of the planned units were done before this run.
        """
        if self.is_inline:
            return NoMetrics()
        from jobs.ray_metrics import RayMetrics

        return RayMetrics(verb, cache, units_done)

    def close(self) -> None:
        """Stop the executor and the local Ray that were started, so that other jobs can use the devices."""
        self._stack.close()

    def _close_later(self, executor: Executor) -> Executor:
        self._stack.callback(executor.close)
        return executor

    def _choose_inline_device(self) -> str:
        if self.backend == "jax":
            jax_model.configure(self.options.cpus_per_worker)
            available = {name: jax_model.has_device(name) for name in ("tpu", "cuda", "cpu")}
        else:
            available = find_torch_devices()
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
        kinds = {"tpu": "TPU", "cuda": "GPU"} if self.backend == "jax" else {"cuda": "GPU"}
        if device == "auto":
            return next((device for device, name in kinds.items() if ray_executor.count_resource(name)), "cpu")
        is_missing = device in kinds and not ray_executor.count_resource(kinds[device])
        if is_missing and not ray_executor.can_grow(self.options.address):
            raise UsageError(f"--device {device}: this machine has no {kinds[device]}s")
        return device


@contextmanager
def plan_resources(options: Common, recorded_backend: Backend = "torch") -> Iterator[ResourcePlan]:
    """Return the resources for a job. An executor or a Ray that they started is stopped at the end of the block.

    recorded_backend: that of the cache, which `--backend auto` stands for.
    """
    backend = recorded_backend if options.backend == "auto" else options.backend
    if options.device == "tpu" and backend != "jax":
        raise UsageError("--device tpu needs --backend jax: torch does not run on TPUs here")
    if options.device == "mps" and backend == "jax":
        raise UsageError("--device mps needs --backend torch: JAX does not run on it here")
    if options.cpus_per_worker < 1 or options.gpus_per_worker <= 0:
        raise UsageError("--cpus-per-worker must be at least 1, and --gpus-per-worker must be more than 0")
    if options.stall_timeout <= 0:
        raise UsageError("--stall-timeout must be more than 0 seconds")
    with ExitStack() as stack:
        yield ResourcePlan(options, backend, stack)


def check_jax_settings(precision: str, form: str = "auto", tile_above: int | None = None) -> None:
    """Raise UsageError for settings that `--backend jax` does not have."""
    if tile_above:
        raise UsageError("--tile-above is for --backend torch: JAX encodes whole images; leave one of them out")
    if precision not in jax_model.PRECISIONS:
        names = " and ".join(jax_model.PRECISIONS)
        raise UsageError(f"--backend jax computes in {names}, not in {precision}; use one of them, or --backend torch")
    if form not in ("auto", "plain"):
        raise UsageError(f"--encoder-form {form} is for --backend torch: JAX always compiles the model; leave it out")


def parse_worker_count(text: str) -> int | None:
    """Parse `--workers`; None for auto."""
    if text == "auto":
        return None
    if not text.isdigit():
        raise UsageError(f"--workers must be 0 or more, or auto, not '{text}'")
    return int(text)


def find_torch_devices() -> dict[str, bool]:
    """Return whether this machine has each kind of device, the preferred one first."""
    return {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}


def choose_device() -> str:
    """Return the device for torch in this process: `cuda`, `mps` or `cpu`."""
    return next(device for device, is_available in find_torch_devices().items() if is_available)


def reserve_resources(options: Common, device: str) -> dict[str, float]:
    """Return what Ray reserves for a worker. The last resource limits the number of workers."""
    reserved: dict[str, float] = {"CPU": options.cpus_per_worker}
    if device == "cuda":
        reserved["GPU"] = options.gpus_per_worker
    if device == "tpu":
        reserved["TPU"] = 1  # one chip, which is the only one that Ray shows to the worker
    return reserved


def count_auto_workers(options: Common, device: str, count_resource: Callable[[str], float]) -> int:
    """Return how many workers `--workers auto` stands for, at least 1.

    count_resource: returns how much there is of a resource of Ray.
    """
    name, share = list(reserve_resources(options, device).items())[-1]
    return max(1, int(count_resource(name) / share))


def count_local_resource(name: str) -> float:
    """Return how much of a resource of Ray this machine has."""
    return {"CPU": count_cores(), "GPU": torch.cuda.device_count()}.get(name, 1)
