"""Kills workers at random moments, and makes others sick: every sample must be there once, with a calm run's digest.

    python -m bench.soak --kills 200 --sicknesses 100 --seed 1

Jobs on a local Ray with two workers; each worker writes down what it is doing (a file in shared memory), so that every
kill is known by the phase that it hit. A worker that is made sick lives on and fails in all it does: its model with an
error of its device or an unknown one, its reads end early, or it cannot write. When enough was done to one job it goes
on to its end; then its cache is read by pyarrow and json alone. Prints the histograms; every failure names the seed.

Exit code 1 if a cache was wrong, or a phase or a sickness came up fewer than ten times.
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

from bench import account
from bench.make_shards import MICRO, make_shards
from pipeline import flow
from pipeline.cache import commits
from pipeline.encoder import LatentEncoder
from pipeline.errors import StorageError
from pipeline.flow import EncodeSpec, UnitWorker
from pipeline.timing import StageTimer
from pipeline.weights import Vae
from vae import AutoencoderKL

PHASES = ("idle", "reading", "opening", "encoding", "publishing", "recording")
BOARD = "LATENTMILL_SOAK_BOARD"  # where workers write down their phase
SICKNESSES = ("device", "unknown", "reader", "writer")
LEAST = 10  # hits of each phase, and of each sickness
KILLS_A_JOB, SICKNESSES_A_JOB = 10, 5
AVOID = 5.0  # seconds; in place of minutes, as all workers are made sick here
SHARDS, SAMPLES = 24, 960


class Board:
    """The phases of a worker's threads, the busiest of which is written down."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / str(os.getpid())
        self.lock = threading.Lock()
        self.phases: dict[int, str] = {}
        self.write()

    @property
    def sickness(self) -> str:
        """What this worker has; empty as long as it is well."""
        with suppress(FileNotFoundError):
            return self.path.with_suffix(".sick").read_text()
        return ""

    def write(self) -> None:
        self.path.write_text(max(self.phases.values(), key=PHASES.index, default="idle"))

    @contextmanager
    def doing(self, phase: str) -> Iterator[None]:
        thread = threading.get_ident()
        with self.lock:
            before = self.phases.get(thread)
            self.phases[thread] = phase
            self.write()
        try:
            yield
        finally:
            with self.lock:
                self.phases.pop(thread)
                if before:
                    self.phases[thread] = before
                self.write()


class SoakJob(EncodeSpec):
    """An encode job whose worker tells its phases."""

    __slots__ = ()

    def build(self, vae: Vae, stop: threading.Event) -> UnitWorker:
        board = Board(Path(os.environ[BOARD]))
        stage, open_sample, finish, read = (
            StageTimer.stage,
            flow.open_sample,
            commits.write_commit,
            LocalFileOpener.read,
        )
        encode, names = LatentEncoder.encode, {"read": "reading", "write": "publishing"}

        @contextmanager
        def staged(clock: StageTimer, name: str) -> Iterator[None]:
            with board.doing(names[name]) if name in names else nullcontext(), stage(clock, name):
                if name == "write" and board.sickness == "writer":
                    raise StorageError("cannot write anything", may_pass=True)
                yield

        def encoded(*arguments: object) -> object:
            with board.doing("encoding"):
                if board.sickness == "device":
                    raise RuntimeError("CUDA error: unspecified launch failure")
                if board.sickness == "unknown":
                    raise ValueError("an error that nobody knows")
                return encode(*arguments)  # type: ignore[arg-type]

        def read_half(file: LocalFileOpener, size: int = -1) -> bytes:
            is_cut = board.sickness == "reader" and file.name.endswith(".tar") and file.tell() >= file.size // 2
            return b"" if is_cut else bytes(read(file, size))

        def opened(*arguments: object) -> object:
            with board.doing("opening"):
                return open_sample(*arguments)  # type: ignore[arg-type]

        def finished(*arguments: object) -> None:
            with board.doing("recording"):
                finish(*arguments)  # type: ignore[arg-type]

        LocalFileOpener.read = read_half
        StageTimer.stage = staged  # type: ignore[method-assign, assignment]
        LatentEncoder.encode = encoded  # type: ignore[method-assign, assignment]
        flow.open_sample = opened  # type: ignore[assignment]
        commits.write_commit = finished  # type: ignore[assignment]
        return EncodeSpec.build(self, vae, stop)


def run_job(argv: list[str]) -> int:
    """The encode job with telling workers: what a child process of the soak runs."""
    from jobs import cache_spec, encode, slots

    slots.AVOID = AVOID
    cache_spec.EncodeSpec = SoakJob  # type: ignore[misc]
    return encode.main(argv)


def workers(board: Path) -> dict[int, str]:
    """The living workers that are well, and what they are doing."""
    found = {}
    for path in board.iterdir():
        if path.suffix or path.with_suffix(".sick").exists():
            continue
        if Path(f"/proc/{path.name}/cmdline").exists():
            found[int(path.name)] = path.read_text() or "idle"
    return found


def torment(argv: list[str], board: Path, hits: Counter[str], sick: Counter[str], draw: random.Random) -> int:
    """Run one job and kill workers under it: at random, but rather in phases that were seldom hit. Its exit code.

    Some others are made sick, but never two at a time: a worker is held against the others.
    """
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, BOARD: str(board), "PYTHONPATH": root}
    script = f"import sys; from bench.soak import run_job; sys.exit(run_job({argv!r}))"
    with open(f"{board}.log", "wb") as log:
        job = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.DEVNULL, stderr=log)
    left, left_sick, rests_until = KILLS_A_JOB, SICKNESSES_A_JOB, 0.0
    while job.poll() is None:
        time.sleep(draw.uniform(0.0, 0.02))
        alive = workers(board)
        if not alive:
            continue
        pid, phase = draw.choice(sorted(alive.items()))
        is_well = len(alive) > 1 and time.monotonic() > rests_until
        if left_sick and is_well and phase != "idle" and draw.random() < 0.05:
            what = min(SICKNESSES, key=lambda name: (sick[name], draw.random()))
            (board / f"{pid}.sick").write_text(what)
            sick[what] += 1
            left_sick -= 1
            rests_until = time.monotonic() + draw.uniform(2.0, 6.0)
            continue
        if not left:
            continue
        seldom = min(hits[name] for name in PHASES)
        if draw.random() < (0.5 if hits[phase] == seldom else 0.002):
            os.kill(pid, signal.SIGKILL)
            (board / str(pid)).unlink(missing_ok=True)
            hits[phase] += 1
            left -= 1
            time.sleep(draw.uniform(0.5, 3.0))  # for the next one to start
    return job.wait()


def digest(cache: Path) -> str:
    return str(json.loads((cache / "stats.json").read_text())["digest"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--sicknesses", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options = parser.parse_args()
    draw, hits, sick, failed = random.Random(options.seed), Counter[str](), Counter[str](), []
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        root = Path(folder)
        make_shards(root / "shards", SHARDS, SAMPLES)
        for path in list((root / "shards").glob("*.tar"))[::6]:
            spoil(path)
        AutoencoderKL(**MICRO).save_pretrained(root / "vae")
        argv = [str(root / "shards"), "--vae", str(root / "vae"), "--resolution", "128", "--rows-per-part", "8"]
        argv += ["--max-reject-rate", "1", "--to"]
        assert run_calm([*argv, str(root / "calm"), "--workers", "0"]) == 0
        jobs, samples = 0, account.samples_of(root / "shards")
        while sum(hits.values()) < options.kills or sum(sick.values()) < options.sicknesses:
            jobs += 1
            board = root / f"board{jobs}"
            board.mkdir()
            cache = root / f"c{jobs}"
            code = torment([*argv, str(cache), "--workers", "2"], board, hits, sick, draw)
            found = [f"exit code {code}"] if code else list(account.wrongs(account.files(cache), samples))
            if not found and digest(cache) != digest(root / "calm"):
                found = ["another digest than the calm run's"]
            if code:
                print(Path(f"{board}.log").read_text())
            failed += [f"seed {options.seed}, job {jobs}: {what}" for what in found]
            done = f"{sum(hits.values())} kills, {sum(sick.values())} sicknesses"
            print(f"job {jobs}: {done}; {'; '.join(found) or 'as the calm run'}", flush=True)
            shutil.rmtree(cache)
    print(f"seed {options.seed}: {sum(hits.values())} kills and {sum(sick.values())} sicknesses in {jobs} jobs")
    for name in (*PHASES, *SICKNESSES):
        times = hits[name] if name in PHASES else sick[name]
        print(f"  {name:<12}{times:>5}  {'#' * times}")
    failed += [f"{phase} was hit {hits[phase]} times" for phase in PHASES if hits[phase] < LEAST]
    failed += [f"{what} came up {sick[what]} times" for what in SICKNESSES if sick[what] < LEAST]
    for line in failed:
        print(f"FAIL: {line}")
    return 1 if failed else 0


def run_calm(argv: list[str]) -> int:
    return subprocess.run([sys.executable, "-m", "jobs.encode", *argv], stdout=subprocess.DEVNULL).returncode


def spoil(tar: Path) -> None:
    """Make one image of a tar none, at its place."""
    data = bytearray(tar.read_bytes())
    start = data.index(b"\xff\xd8\xff")
    data[start : start + 3] = b"no!"
    tar.write_bytes(data)


if __name__ == "__main__":
    sys.exit(main())
