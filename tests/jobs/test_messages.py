"""Messages of a job: with times in batch use, plain at a terminal, and kept in the log of the run."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import encode, messages
from jobs.entry import run_guarded
from jobs.messages import PROGRESS, RunLogHandler, log_each, log_error, log_info, log_note, log_warning
from pipeline.errors import StorageError
from tests.conftest import STAMP, img2dataset_members, write_tar

Command = Callable[..., tuple[int, str, str]]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def job(micro_vae: Path, tmp_path: Path) -> list[object]:
    """Return an encode command for two shards, one of them truncated."""
    for number in range(2):
        write_tar(tmp_path / f"s/{number}.tar", img2dataset_members(10 * number, 8, height=64, width=64))
    intact = (tmp_path / "s/1.tar").read_bytes()
    (tmp_path / "s/1.tar").write_bytes(intact[: len(intact) // 2])
    return ["encode", tmp_path / "s", "--to", tmp_path / "c", "--vae", micro_vae, "--resolution", 64, "--workers", 0]


def read_log(cache: Path) -> str:
    (path,) = cache.glob("_runs/*.log")
    return path.read_text()


def test_in_batch_use_each_message_has_a_time_and_a_level(latentmill: Command, job: list[object]) -> None:
    _, _, err = latentmill(*job)
    assert err
    assert [line for line in err.splitlines() if not re.match(rf"{STAMP} (INFO|WARNING|ERROR) \S", line)] == []
    assert re.search(rf"^{STAMP} WARNING damaged: .*1\.tar is truncated", err, re.MULTILINE)


@pytest.mark.slow
def test_at_a_terminal_messages_are_plain(job: list[object], tmp_path: Path) -> None:
    """Standard error is a pseudo-terminal."""
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "jobs.encode", *map(str, job[1:])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, env=environment, cwd=tmp_path) as running:
        os.close(terminal)
        output = b""
        while True:
            try:
                output += os.read(controller, 1 << 16)
            except OSError:  # the other end was closed
                break
        assert running.wait() == 3
    os.close(controller)
    assert b"warning: damaged: " in output
    assert not re.search(rf"{STAMP} \w+ damaged".encode(), output)


def test_at_a_terminal_a_note_and_a_warning_are_marked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    for log in (log_info, log_note, log_warning, log_error):
        log(log.__name__)
    assert terminal.getvalue().splitlines() == [
        "log_info",
        "note: log_note",
        "warning: log_warning",
        "log_error",
    ]


def test_the_messages_of_a_run_are_kept_in_its_log(latentmill: Command, job: list[object], tmp_path: Path) -> None:
    _, _, err = latentmill(*job)
    lines = read_log(tmp_path / "c").splitlines()
    assert [line for line in lines if not re.match(rf"{STAMP}Z (INFO|WARNING|ERROR) \S", line)] == []
    printed = [re.sub(rf"^{STAMP} ", "", line) for line in err.splitlines()]
    logged = [re.sub(rf"^{STAMP}Z ", "", line) for line in lines]
    assert "INFO encode with latentmill" in logged[0]
    assert logged[1] == "INFO 2 units planned, 2 not done"
    assert logged[2:-1] == printed
    assert logged[-1] == "INFO done, exit code 3"
    assert latentmill("status", tmp_path / "c")[0] == 0
    _, out, _ = latentmill("verify", tmp_path / "c")
    assert "_runs" not in out, out


def test_an_error_that_ends_a_run_is_in_its_log(
    latentmill: Command, job: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise StorageError("cannot list it: no answer")

    monkeypatch.setattr(encode, "check_commits", refuse)
    code, _, err = latentmill(*job)
    assert (code, "latentmill: cannot list it: no answer" in err) == (1, True)
    assert re.search(rf"^{STAMP}Z ERROR cannot list it: no answer$", read_log(tmp_path / "c"), re.MULTILINE)


def test_verify_names_a_changed_log(latentmill: Command, job: list[object], tmp_path: Path) -> None:
    latentmill(*job)
    (path,) = (tmp_path / "c").glob("_runs/*.log")
    path.write_text(path.read_text().replace("damaged", "sound"))
    code, out, _ = latentmill("verify", tmp_path / "c")
    assert (code, f"_runs/{path.name}: it was changed" in out) == (1, True), out


def test_verbose_reports_the_result_of_each_unit(latentmill: Command, job: list[object], tmp_path: Path) -> None:
    _, out, err = latentmill(*job, "--json", "-v")
    json.loads(out)
    for shard in "01":
        assert re.search(rf"^{STAMP} DEBUG unit {shard}-[0-9a-f]{{16}}: \d+ rows, ", err, re.MULTILINE)
    assert " DEBUG unit 0-" in read_log(tmp_path / "c")
    assert " DEBUG " not in latentmill(*job)[2], "the next command in this process is not verbose"


@pytest.mark.slow
def test_warnings_of_other_libraries_are_shown_on_request_and_kept(job: list[object], tmp_path: Path) -> None:
    """The job runs in its own process, because pytest replaces the display of warnings."""
    script = (
        "import logging, sys, warnings\n"
        "from jobs import encode\n"
        "from jobs.entry import run_as_script\n"
        "real = encode.finalize_cache\n"
        "def finish(*args):\n"
        "    warnings.warn('an old driver')\n"
        "    logging.getLogger('botocore').warning('a slow store')\n"
        "    return real(*args)\n"
        "encode.finalize_cache = finish\n"
        "run_as_script(encode.main)\n"
    )
    (tmp_path / "warned.py").write_text(script)

    def run(*more: str) -> str:
        command = [sys.executable, "warned.py", *map(str, job[1:]), *more]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stderr

    quiet, log = run(), read_log(tmp_path / "c")
    assert "an old driver" not in quiet and "a slow store" not in quiet
    assert "UserWarning: an old driver" in log and "WARNING a slow store" in log
    verbose = run("--verbose")
    assert "UserWarning: an old driver" in verbose and "WARNING a slow store" in verbose


def test_a_log_is_bounded_and_keeps_its_start_and_end() -> None:
    handler = RunLogHandler()
    for number in range(20_000):
        handler.add(f"message {number} {'x' * 50}")
    text = handler.content.decode()
    assert len(text) < 257 << 10
    numbers = [int(number) for number in re.findall(r"message (\d+)", text)]
    assert (numbers[0], numbers[-1]) == (0, 19_999)
    assert numbers == sorted(set(numbers))
    (omitted,) = re.findall(r"\.\.\. (\d+) lines left out", text)
    assert len(numbers) + int(omitted) == 20_000
    handler.add("y" * 1_000_000)
    assert len(handler.content) < 257 << 10


def test_progress_is_not_logged() -> None:
    handler = RunLogHandler()
    messages.LOGGER.addHandler(handler)
    PROGRESS.addHandler(handler)
    try:
        PROGRESS.info(" 10%% of it")
        log_info("a note")
    finally:
        messages.LOGGER.removeHandler(handler)
        PROGRESS.removeHandler(handler)
    assert handler.content.count(b"\n") == 1


def test_secrets_are_removed_from_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "pl4nted-s3cret")
    options = {"key": "an-account", "client_kwargs": {"token": "another-s3cret"}, "endpoint_url": "http://store:9000"}
    handler = RunLogHandler(messages.collect_secrets(options))
    handler.add("refused: pl4nted-s3cret, another-s3cret of an-account at http://store:9000")
    assert handler.content.decode().endswith("refused: ***, *** of *** at http://store:9000\n")


def test_many_messages_of_one_kind_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    log_each([f"failed: unit {number}" for number in range(3000)], log_error)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21
    assert lines[-1].endswith("ERROR ... and 2,980 more like these")


HOSTILE_TEXT = "damaged: \x1b[2J\x07\x9b31m\u202egpj.tar\nlast line"
ESCAPED = "damaged: \\x1b[2J\\x07\\x9b31m\\u202egpj.tar\nlast line"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_names_of_files_cannot_control_the_terminal(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    kept = RunLogHandler()
    messages.LOGGER.addHandler(kept)
    try:
        log_warning(HOSTILE_TEXT)
    finally:
        messages.LOGGER.removeHandler(kept)

    def fail(argv: object) -> int:
        raise StorageError(HOSTILE_TEXT)

    assert run_guarded(fail, []) == 1
    for text in (stream.getvalue(), kept.content.decode()):
        assert ESCAPED in text
        assert "".join(text.split("\n")).isprintable()
    assert f"latentmill: {ESCAPED}\n" in stream.getvalue()
