import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.common_options import describe_options, parse_storage_options
from jobs.encode_options import EncodeOptions
from jobs.options import DecodeOptions
from jobs.parsing import parse
from jobs.resources import parse_worker_count
from pipeline.errors import UsageError

Command = Callable[..., tuple[int, str, str]]

REQUIRED = ["in/", "--to", "out", "--vae", "demo"]


def test_defaults_are_those_of_the_dataclass() -> None:
    options, given = parse(EncodeOptions, "encode", REQUIRED)
    assert options == EncodeOptions(source=("in/",), to="out", vae="demo")
    assert given == {"source", "to", "vae"}


def test_flags_have_the_types_of_the_fields() -> None:
    options, _ = parse(
        EncodeOptions, "encode", [*REQUIRED, "more/", "--resolution", "256", "--max-reject-rate", "0.5", "--json"]
    )
    assert (options.source, options.resolution, options.max_reject_rate, options.json) == (
        ("in/", "more/"),
        256,
        0.5,
        True,
    )


def test_a_repeated_flag_collects_its_values() -> None:
    options, _ = parse(DecodeOptions, "decode", ["c", "--to", "o", "--source", "a", "--source", "b"])
    assert options.source == ("a", "b")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "SOURCE is missing"),
        (["in/", "--to", "out"], "--vae is missing"),
        ([*REQUIRED, "--resolutoin", "256"], "unknown option --resolutoin; did you mean --resolution?"),
        ([*REQUIRED, "--resolution", "big"], "'big' is not a whole number"),
        ([*REQUIRED, "--interpolation", "bicubik"], "did you mean bicubic?"),
        ([*REQUIRED, "--max-reject-rate", "nan"], "'nan' is not a number"),
        ([*REQUIRED, "--stall-timeout", "inf"], "'inf' is not a number"),
        ([*REQUIRED, "--config", "nowhere.yaml"], "cannot read --config nowhere.yaml: no such file"),
    ],
)
def test_a_mistake_is_named(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        parse(EncodeOptions, "encode", argv)


def test_a_file_may_set_every_option_and_flags_override_it(tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    config.write_text("source: [a, b]\nto: out\nvae: demo\nresolution: 128\nmin-size: 64\njson: true\n")
    options, given = parse(EncodeOptions, "encode", ["--config", str(config), "--resolution", "256"])
    assert options == EncodeOptions(source=("a", "b"), to="out", vae="demo", resolution=256, min_size=64, json=True)
    assert "min_size" in given


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resolutoin: 3", "unknown key 'resolutoin'; did you mean resolution?"),
        ("resolution: big", "resolution in --config .*: 'big' is not a whole number"),
        ("json: 1", "json in --config .* must be true or false"),
        ("to:", "to in --config .* has no value"),
        ("json: null", "json in --config .* has no value"),
        ("source: [a, null]", "source in --config .* must be text or a number, not None"),
        ("columns: [txt, cls]", "columns in --config .* must be text or a number, not \\['txt', 'cls'\\]"),
        ("flip: no", "flip in --config .* must be text or a number, not False; put it in quotes"),
        ("storage_option: {anon: x}", "storage_option in --config .* must be text or a number, not {'anon': 'x'}"),
        ("max_reject_rate: .nan", "'nan' is not a number"),
        ("[1, 2]", "must be a mapping"),
        ("a: [", "invalid YAML"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(text)
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        parse(EncodeOptions, "encode", [*REQUIRED, "--config", str(config)])


def test_storage_options_read_secrets_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "hush")
    assert parse_storage_options(["key=id", "secret=env:MY_SECRET"]) == {"key": "id", "secret": "hush"}
    with pytest.raises(UsageError, match="the environment variable NO_SUCH_FILE is not set"):
        parse_storage_options(["secret=env:NO_SUCH_FILE"])
    with pytest.raises(UsageError, match="must be KEY=VALUE"):
        parse_storage_options(["secret"])


def test_the_record_of_a_run_has_no_secret() -> None:
    options = EncodeOptions(
        source=("in",),
        to="out",
        vae="demo",
        storage_option=("key=hush", "secret=env:NAME"),
        source_option=("key=shh", "secret=env:MINE"),
    )
    record = describe_options(options)
    assert record["storage_option"] == ["key=(not kept)", "secret=env:NAME"]
    assert record["source_option"] == ["key=(not kept)", "secret=env:MINE"]
    assert set(record) == {field.name for field in dataclasses.fields(EncodeOptions)}


@pytest.mark.parametrize("text", ["-1", "two", "1.5", ""])
def test_a_wrong_number_of_workers_is_named(text: str) -> None:
    with pytest.raises(UsageError, match=f"^--workers must be 0 or more, or auto, not '{text}'$"):
        parse_worker_count(text)


@pytest.mark.parametrize("seconds", ["0", "-1"])
def test_a_stall_timeout_of_no_time_is_refused(latentmill: Command, tmp_path: Path, shards: Path, seconds: str) -> None:
    argv = ["encode", shards, "--to", tmp_path / "c", "--vae", "demo", "--workers", 0, "--stall-timeout", seconds]
    assert latentmill(*argv) == (2, "", "latentmill: --stall-timeout must be more than 0 seconds\n")
