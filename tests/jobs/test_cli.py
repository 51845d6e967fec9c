import dataclasses
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.cli import VERBS
from jobs.options import OPTIONS
from jobs.parsing import format_flag

Command = Callable[..., tuple[int, str, str]]

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_every_option(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"jobs.{verb}").main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    for field in dataclasses.fields(OPTIONS[verb]):
        assert format_flag(field) in text
    assert max(len(line) for line in text.splitlines()) <= 112


def test_help_lists_the_verbs(latentmill: Command) -> None:
    code, out, _ = latentmill("--help")
    assert code == 0
    assert all(verb in out for verb in VERBS)


def run_without_torch(*argv: object) -> str:
    """Run a command in a process in which `import torch` fails. Returns its standard output."""
    script = "import sys; sys.modules['torch'] = None; from jobs.cli import command; command()"
    argv = (sys.executable, "-c", script, *map(str, argv))
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_needs_no_torch(verb: str) -> None:
    assert f"usage: latentmill {verb}" in run_without_torch(*filter(None, [verb]), "--help")


def test_a_cache_is_shown_without_torch(latentmill: Command, shards: Path, micro_vae: Path, tmp_path: Path) -> None:
    job = ("encode", shards, "--to", tmp_path / "c", "--vae", micro_vae, "--resolution", 64, "--workers", 0)
    assert latentmill(*job)[0] == 0
    assert "units" in run_without_torch("status", tmp_path / "c")
    assert "latents" in run_without_torch("stats", tmp_path / "c")


def test_a_missing_verb_is_wrong_usage(latentmill: Command) -> None:
    assert latentmill()[0] == 2


def test_version_is_printed(latentmill: Command) -> None:
    assert latentmill("--version") == (0, "latentmill 0.1.0\n", "")


def test_an_unknown_verb_gets_a_suggestion(latentmill: Command) -> None:
    code, out, err = latentmill("encoed", "x")
    assert (code, out) == (2, "")
    assert err == "latentmill: unknown command 'encoed'; did you mean encode?\n"
