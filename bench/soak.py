"""Kills workers at random moments, again and again: every sample must be there once, with the digest of a calm run.

    python -m bench.soak --kills 200 --seed 1

Jobs on a local Ray with two workers; each worker writes down what it is doing (a file in shared memory), so that every
kill is known by the phase that it hit. When enough workers were killed under one job it goes on to its end; then its
cache is read by pyarrow and json alone. Prints the histogram of phases; the seed stands in every failure.

Exit code 1 where a cache was wrong, or a phase was hit fewer than ten times.
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
from contextlib import contextmanager
from pathlib import Path

from bench import account
from bench.make_shards import MICRO, make_shards
from pipeline import commit, flow
from pipeline.encode import Vae
from pipeline.flow import EncodeJob, Encoder
from vae import AutoencoderKL

PHASES = ("idle", "reading", "opening", "encoding", "publishing", "recording")
BOARD = "LATENTMILL_SOAK_BOARD"  # where workers write down their phase
LEAST = 10  # hits of each phase
KILLS_A_JOB = 10
SHARDS, SAMPLES = 24, 960


class Board:
    """The phases of a worker's threads, the busiest of which is written down."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / str(os.getpid())
        self.lock = threading.Lock()
        self.phases: dict[int, str] = {}
        self.write()

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


class SoakJob(EncodeJob):
    """An encode job whose worker tells its phases."""

    __slots__ = ()

    def build(self, vae: Vae, stop: threading.Event) -> Encoder:
        board = Board(Path(os.environ[BOARD]))
        stage, open_sample, finish = flow.Clock.stage, flow.open_sample, commit.finish
        names = {"read": "reading", "encode": "encoding", "write": "publishing"}

        @contextmanager
        def staged(clock: flow.Clock, name: str) -> Iterator[None]:
            with board.doing(names[name]), stage(clock, name):
                yield

        def opened(*arguments: object) -> object:
            with board.doing("opening"):
                return open_sample(*arguments)  # type: ignore[arg-type]

        def finished(*arguments: object) -> None:
            with board.doing("recording"):
                finish(*arguments)  # type: ignore[arg-type]

        flow.Clock.stage = staged  # type: ignore[method-assign, assignment]
        flow.open_sample = opened  # type: ignore[assignment]
        commit.finish = finished  # type: ignore[assignment]
        return EncodeJob.build(self, vae, stop)


def run_job(argv: list[str]) -> int:
    """The encode job with telling workers: what a child process of the soak runs."""
    from jobs import encode, settings

    settings.EncodeJob = SoakJob  # type: ignore[misc]
    return encode.main(argv)


def workers(board: Path) -> dict[int, str]:
    """The living workers and what they are doing."""
    found = {}
    for path in board.iterdir():
        if Path(f"/proc/{path.name}/cmdline").exists():
            found[int(path.name)] = path.read_text() or "idle"
    return found


def torment(argv: list[str], board: Path, hits: Counter[str], draw: random.Random) -> int:
    """Run one job and kill workers under it: at random, but rather in phases that were seldom hit. Its exit code."""
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, BOARD: str(board), "PYTHONPATH": root}
    script = f"import sys; from bench.soak import run_job; sys.exit(run_job({argv!r}))"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    job = subprocess.Popen([sys.executable, "-c", script], env=environment, **quiet)
    left = KILLS_A_JOB
    while job.poll() is None:
        time.sleep(draw.uniform(0.0, 0.02))
        alive = workers(board)
        if not left or not alive:
            continue
        pid, phase = draw.choice(sorted(alive.items()))
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
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options = parser.parse_args()
    draw, hits, failed = random.Random(options.seed), Counter[str](), []
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
        while sum(hits.values()) < options.kills:
            jobs += 1
            board = root / f"board{jobs}"
            board.mkdir()
            cache = root / f"c{jobs}"
            code = torment([*argv, str(cache), "--workers", "2"], board, hits, draw)
            found = [f"exit code {code}"] if code else list(account.wrongs(account.files(cache), samples))
            if not found and digest(cache) != digest(root / "calm"):
                found = ["another digest than the calm run's"]
            failed += [f"seed {options.seed}, job {jobs}: {what}" for what in found]
            print(f"job {jobs}: {sum(hits.values())} kills; {'; '.join(found) or 'as the calm run'}", flush=True)
            shutil.rmtree(cache)
    print(f"seed {options.seed}: {sum(hits.values())} kills in {jobs} jobs")
    for phase in PHASES:
        print(f"  {phase:<12}{hits[phase]:>5}  {'#' * hits[phase]}")
    failed += [f"{phase} was hit {hits[phase]} times" for phase in PHASES if hits[phase] < LEAST]
    for line in failed:
        print(f"FAIL: {line}")
    return 1 if failed else 0


def run_calm(argv: list[str]) -> int:
    return subprocess.run([sys.executable, "-m", "jobs.encode", *argv], stdout=subprocess.DEVNULL).returncode


def spoil(tar: Path) -> None:
    """Make one picture of a tar none, at its place."""
    data = bytearray(tar.read_bytes())
    start = data.index(b"\xff\xd8\xff")
    data[start : start + 3] = b"no!"
    tar.write_bytes(data)


if __name__ == "__main__":
    sys.exit(main())
