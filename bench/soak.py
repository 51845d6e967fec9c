"""A soak test of the encode job: random kills and faulty workers must not change the result.

    python -m bench.soak --kills 200 --faults 100 --seed 1

It takes about 40 minutes on two cores. Jobs run on a local Ray with two workers. Each worker records its current phase
in a file, so that the phase of every kill is known. A worker that is made faulty keeps running, but fails in all of its
work: its model raises a device error or an unknown error, its reads end early, or it cannot write. After the intended
number of faults, the job runs to its end. `bench.check_cache` then checks its cache: every sample is there exactly
once, and the digest is that of an undisturbed run.

The output has a line per job, and at the end the number of kills per phase and of workers per fault. Each failure is
a line that starts with FAIL and names the seed. The exit code is 1 if a cache was wrong, or if a phase or a fault
occurred fewer than ten times.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from fsspec.implementations.local import LocalFileOpener

from bench import check_cache
from bench.make_shards import make_shards
from bench.vae import MICRO
from pipeline import part_writer
from pipeline.cache import commits
from pipeline.encoder import LatentEncoder
from pipeline.errors import StorageError
from pipeline.flow import EncodeSpec, UnitWorker
from pipeline.timing import StageTimer
from pipeline.weights import Vae
from vae import AutoencoderKL

PHASES = ("idle", "reading", "opening", "encoding", "publishing", "recording")
BOARD = "LATENTMILL_SOAK_BOARD"  # environment variable: the folder in which workers record their phase
FAULTS = ("device", "unknown", "reader", "writer")
MIN_HITS = 10  # of each phase, and of each fault
KILLS_PER_JOB, FAULTS_PER_JOB = 10, 5
AVOID = 5.0  # seconds instead of minutes, because every worker of a job may be made faulty
SHARDS, SAMPLES = 24, 960


class Board:
    """The phases of a worker's threads. The latest phase in the order of PHASES is written to a file."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / str(os.getpid())
        self.lock = threading.Lock()
        self.phases: dict[int, str] = {}
        self.write()

    @property
    def fault(self) -> str:
        """The fault of this worker, or an empty string if it is healthy."""
        with suppress(FileNotFoundError):
            return self.path.with_suffix(".fault").read_text()
        return ""

    def write(self) -> None:
        self.path.write_text(max(self.phases.values(), key=PHASES.index, default="idle"))

    @contextmanager
    def enter_phase(self, phase: str) -> Iterator[None]:
        thread = threading.get_ident()
        with self.lock:
            previous = self.phases.get(thread)
            self.phases[thread] = phase
            self.write()
        try:
            yield
        finally:
            with self.lock:
                self.phases.pop(thread)
                if previous:
                    self.phases[thread] = previous
                self.write()


class SoakJob(EncodeSpec):
    """An encode job whose workers record their phases, and fail if they are faulty."""

    __slots__ = ()

    def build(self, vae: Vae, stop: threading.Event) -> UnitWorker:
        board = Board(Path(os.environ[BOARD]))
        stage, prepare_sample, write_commit, read = (
            StageTimer.stage,
            part_writer.prepare_sample,
            commits.write_commit,
            LocalFileOpener.read,
        )
        launch, names = LatentEncoder.launch, {"read": "reading", "write": "publishing"}

        @contextmanager
        def record_stage(clock: StageTimer, name: str) -> Iterator[None]:
            with board.enter_phase(names[name]) if name in names else nullcontext(), stage(clock, name):
                if name == "write" and board.fault == "writer":
                    raise StorageError("cannot write anything", may_pass=True)
                yield

        def record_encode(*arguments: object) -> object:
            with board.enter_phase("encoding"):
                if board.fault == "device":
                    raise RuntimeError("CUDA error: unspecified launch failure")
                if board.fault == "unknown":
                    raise ValueError("an unknown error")
                return launch(*arguments)  # type: ignore[arg-type]

        def read_half(file: LocalFileOpener, size: int = -1) -> bytes:
            is_truncated = board.fault == "reader" and file.name.endswith(".tar") and file.tell() >= file.size // 2
            return b"" if is_truncated else bytes(read(file, size))

        def record_open(*arguments: object) -> object:
            with board.enter_phase("opening"):
                return prepare_sample(*arguments)  # type: ignore[arg-type]

        def record_commit(*arguments: object) -> None:
            with board.enter_phase("recording"):
                write_commit(*arguments)  # type: ignore[arg-type]

        LocalFileOpener.read = read_half
        StageTimer.stage = record_stage  # type: ignore[method-assign, assignment]
        LatentEncoder.launch = record_encode  # type: ignore[method-assign, assignment]
        part_writer.prepare_sample = record_open  # type: ignore[attr-defined, assignment]
        commits.write_commit = record_commit  # type: ignore[assignment]
        return EncodeSpec.build(self, vae, stop)


def run_job(argv: list[str]) -> int:
    """Run the encode job with workers that record their phases. A child process of the soak test calls this."""
    from jobs import encode, encode_spec, slots

    slots.AVOID_SECONDS = AVOID
    encode_spec.EncodeSpec = SoakJob  # type: ignore[misc]
    return encode.main(argv)


def list_healthy_workers(board: Path) -> dict[int, str]:
    """Return the phases of the running workers that are not faulty, by their process id."""
    phases = {}
    for path in board.iterdir():
        if path.suffix or path.with_suffix(".fault").exists():
            continue
        if Path(f"/proc/{path.name}/cmdline").exists():
            phases[int(path.name)] = path.read_text() or "idle"
    return phases


def disturb_job(
    argv: list[str], board: Path, hits: Counter[str], fault_counts: Counter[str], rng: random.Random
) -> int:
    """Run a job, kill some of its workers and make others faulty. Returns its exit code.

    Kills are random, but more frequent in phases that were rarely hit. No two workers are made faulty at the same time,
    because the job recognizes a faulty worker by comparison with the others.
    """
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, BOARD: str(board), "PYTHONPATH": root}
    script = f"import sys; from bench.soak import run_job; sys.exit(run_job({argv!r}))"
    with open(f"{board}.log", "wb") as log:
        job = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.DEVNULL, stderr=log)
    kills_left, faults_left, pause_ends = KILLS_PER_JOB, FAULTS_PER_JOB, 0.0
    while job.poll() is None:
        time.sleep(rng.uniform(0.0, 0.02))
        healthy = list_healthy_workers(board)
        if not healthy:
            continue
        pid, phase = rng.choice(sorted(healthy.items()))
        may_be_faulty = len(healthy) > 1 and time.monotonic() > pause_ends
        if faults_left and may_be_faulty and phase != "idle" and rng.random() < 0.05:
            fault = min(FAULTS, key=lambda name: (fault_counts[name], rng.random()))
            (board / f"{pid}.fault").write_text(fault)
            fault_counts[fault] += 1
            faults_left -= 1
            pause_ends = time.monotonic() + rng.uniform(2.0, 6.0)
            continue
        if not kills_left:
            continue
        fewest_hits = min(hits[name] for name in PHASES)
        if rng.random() < (0.5 if hits[phase] == fewest_hits else 0.002):
            os.kill(pid, signal.SIGKILL)
            (board / str(pid)).unlink(missing_ok=True)
            hits[phase] += 1
            kills_left -= 1
            time.sleep(rng.uniform(0.5, 3.0))  # until the next worker has started
    return job.wait()


def read_digest(cache: Path) -> str:
    return str(json.loads((cache / "stats.json").read_text())["digest"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="minimum number of kills (default: 200)")
    parser.add_argument("--faults", type=int, default=100, help="minimum number of faulty workers (default: 100)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30), help="default: random")
    options = parser.parse_args()
    rng, hits, fault_counts, failures = random.Random(options.seed), Counter[str](), Counter[str](), []
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        root = Path(folder)
        make_shards(root / "shards", SHARDS, SAMPLES)
        for path in list((root / "shards").glob("*.tar"))[::6]:
            corrupt_image(path)
        AutoencoderKL(**MICRO).save_pretrained(root / "vae")
        argv = [str(root / "shards"), "--vae", str(root / "vae"), "--resolution", "128", "--rows-per-part", "8"]
        argv += ["--max-reject-rate", "1", "--to"]
        assert run_undisturbed([*argv, str(root / "undisturbed"), "--workers", "0"]) == 0
        jobs, samples = 0, check_cache.count_samples(root / "shards")
        while sum(hits.values()) < options.kills or sum(fault_counts.values()) < options.faults:
            jobs += 1
            board = root / f"board{jobs}"
            board.mkdir()
            cache = root / f"c{jobs}"
            code = disturb_job([*argv, str(cache), "--workers", "2"], board, hits, fault_counts, rng)
            problems = (
                [f"exit code {code}"]
                if code
                else list(check_cache.find_problems(check_cache.read_files(cache), samples))
            )
            if not problems and read_digest(cache) != read_digest(root / "undisturbed"):
                problems = ["the digest differs from that of the undisturbed run"]
            if code:
                print(Path(f"{board}.log").read_text())
            failures += [f"seed {options.seed}, job {jobs}: {problem}" for problem in problems]
            totals = f"{sum(hits.values())} kills, {sum(fault_counts.values())} faults so far"
            print(f"job {jobs}: {'; '.join(problems) or 'same digest as the undisturbed run'}; {totals}", flush=True)
            shutil.rmtree(cache)
    print(f"seed {options.seed}: {sum(hits.values())} kills and {sum(fault_counts.values())} faults in {jobs} jobs")
    for name in (*PHASES, *FAULTS):
        times = hits[name] if name in PHASES else fault_counts[name]
        print(f"  {name:<12}{times:>5}  {'#' * times}")
    for name in (*PHASES, *FAULTS):
        count = hits[name] if name in PHASES else fault_counts[name]
        if count < MIN_HITS:
            failures.append(f"{name} occurred {count} times, but {MIN_HITS} are needed; run with more kills")
    for line in failures:
        print(f"FAIL: {line}")
    return 1 if failures else 0


def run_undisturbed(argv: list[str]) -> int:
    return subprocess.run([sys.executable, "-m", "jobs.encode", *argv], stdout=subprocess.DEVNULL).returncode


def corrupt_image(tar: Path) -> None:
    """Replace the JPEG header of a tar's first image by other bytes, without changing any size."""
    data = bytearray(tar.read_bytes())
    start = data.index(b"\xff\xd8\xff")
    data[start : start + 3] = b"no!"
    tar.write_bytes(data)


if __name__ == "__main__":
    sys.exit(main())
