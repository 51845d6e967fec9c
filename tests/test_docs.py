"""Execute the documentation, and compare its tables with the code."""

import dataclasses
import re
import shlex
import subprocess
import sys
import tomllib
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import encode
from jobs.cli import VERBS
from jobs.encode_options import EncodeOptions
from jobs.options import EXPORT_NAMES, OPTIONS
from jobs.parsing import make_parser, parse
from jobs.progress import ProgressMeter
from jobs.totals import RunTotals, describe_totals
from latentmill import Scaling
from pipeline.cache import plan
from pipeline.errors import REASONS
from pipeline.exports.formats import FORMATS
from pipeline.formats.parquet import make_schema
from pipeline.formats.schema import OutputSchema
from pipeline.limits import Limits
from pipeline.records import Recipe, Seconds
from tests.servers import upload
from vae import AutoencoderKLConfig
from vae.presets import PRESETS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMAND_LINE = ROOT / "docs/command-line.md"


def find_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def make_command_line_page() -> str:
    """Return docs/command-line.md, generated from the options."""
    parts = [
        "# The command line\n",
        "<!-- Made by `python -m tests.test_docs`. A test compares it with the options. -->\n",
    ]
    parts.append(
        "This page has the help of each command, as `latentmill COMMAND --help` prints it. Every option can also be\n"
        "set in a YAML file (`--config job.yaml`), with the same name: `resolution: 512`.\n"
    )
    for verb, text in VERBS.items():
        parts.append(f"## latentmill {verb}\n\n{text[0].upper()}{text[1:]}.\n")
        parts.append(f"```text\n{make_parser(OPTIONS[verb], verb).format_help()}```\n")
    return "\n".join(parts)


def test_the_command_line_page_has_the_current_help() -> None:
    assert COMMAND_LINE.read_text(encoding="utf-8") == make_command_line_page()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the cache demo-output/latents, made like that of `make demo`, but without Ray."""
    folder = tmp_path_factory.mktemp("readme")
    line = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "latentmill encode" in line)
    argv = line.split("latentmill ")[1].replace("$(DEMO)", "demo-output").split()
    argv[1] = str(ROOT / argv[1])
    command = [sys.executable, "-m", "jobs.encode", *argv[1:], "--workers", "0"]
    subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(ROOT)}, check=True, capture_output=True, timeout=100)
    options = ["--vae", "demo", "--resolution", "256", "--workers", "0", "--format", "webdataset"]
    code = encode.main([f"{argv[1]}/coffee.jpg", "--to", f"{folder}/demo-output/tars", *options])
    assert code == 0
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of Lightning
def test_the_python_code_of_the_readme_runs(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)
    names: dict[str, Any] = {}
    for block in find_blocks(README, "python"):
        names["latent"] = names["caption"] = None
        exec(block, names)
        if "latents = " in block or "latents, captions" in block:
            latents = names["latents"]
            assert (latents.shape, latents.dtype) == ((3, 16, 32, 32), torch.float32)
            assert (0.7 < latents.std() < 1.3, abs(latents.mean()) < 0.4) == (True, True)
        if names["latent"] is not None:
            assert names["latent"].shape == (16, 32, 32)
            assert any(names["caption"] == row["txt"] for row in names["cache"].rows(names["cache"].files()[0]))
    assert len(names["captions"]) == 3
    # after two epochs with torch and one with accelerate; Lightning asks for no batch after the last one
    assert (names["loader"].epoch, names["loader"].step) == (3, 2)


def find_command_lines(text: str) -> list[str]:
    """Return the command lines of the `sh` blocks of a page, with continued lines joined and comments removed."""
    joined = "".join(find_blocks(text, "sh")).replace("\\\n", " ")
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line]


def find_section(title: str) -> str:
    """Return the text of a section of README.md."""
    (text,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    return str(text)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_commands_of_a_page_exist(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    lines = find_command_lines((ROOT / page).read_text(encoding="utf-8"))
    assert any(line.startswith("make ") for line in lines)
    for line in lines:
        words = shlex.split(line.replace("python -m jobs.", "latentmill "))
        words = words[words.index("--") + 1 :] if "--" in words else words
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), line
        elif words[0] == "latentmill":
            make_parser(OPTIONS[words[1]], words[1]).parse_args(words[2:])
        else:
            assert words[0] in ("export", ".", "ray", "python", "python3", "pip", "pre-commit"), line


def test_the_config_file_of_the_readme_gives_the_options_of_the_quickstart(tmp_path: Path) -> None:
    (block,) = find_blocks(README, "yaml")
    (tmp_path / "job.yaml").write_text(block)
    line = next(line for line in find_command_lines(find_section("Quickstart")) if "latentmill encode" in line)
    from_file = parse(EncodeOptions, "encode", ["--config", str(tmp_path / "job.yaml")])
    assert from_file == parse(EncodeOptions, "encode", shlex.split(line)[2:])


def remove_numbers(line: str) -> list[str]:
    """Return the words of a line of output, without numbers, paths and shapes."""
    return [word for word in line.split() if not re.search(r"[\d/]", word)]


def test_the_quickstart_prints_the_output_that_it_shows(
    latentmill: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    quickstart = find_section("Quickstart")
    (first, *_), (shown,) = find_blocks(quickstart, "sh"), find_blocks(quickstart, "text")
    printed = []
    for line in find_command_lines(f"```sh\n{first}```"):
        argv = shlex.split(line)[1:]
        code, out, err = latentmill(*argv, *([] if argv[0] == "stats" else ["--workers", 0]))
        assert code == 0, err
        printed += [remove_numbers(output_line) for output_line in out.splitlines()]
    for line in shown.splitlines():
        assert remove_numbers(line) in printed, line


def test_the_commands_before_during_and_after_a_job_run(
    latentmill: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    outputs = {}
    for line in find_command_lines(find_section("Before, during and after a job")):
        command, *argv = shlex.split(line)[1:]
        more = {"plan": ["--seconds", 0.1], "encode": ["--workers", 0]}.get(command, [])
        code, outputs[command], err = latentmill(command, *argv, *more)
        assert code == 0, err
    assert list(outputs) == ["plan", "encode", "status", "report"]
    assert "6 images (exact)" in outputs["plan"] and "100%" in outputs["status"], outputs
    assert "<html" in (tmp_path / "demo-output/report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_s3_commands_of_the_readme_run(
    latentmill: Callable[..., tuple[int, str, str]], shards: Path, micro_vae: Path, bucket: str
) -> None:
    # the bucket, the shards and the VAE are those of the test; everything else is from the README
    upload(shards, f"{bucket}/shards")
    upload(micro_vae, f"{bucket}/sdxl-vae")
    lines = [line for line in find_command_lines(find_section("WebDataset on S3")) if line.startswith("latentmill ")]
    assert [shlex.split(line)[1] for line in lines] == ["encode", "status", "decode"]
    for line in lines:
        argv = shlex.split(line.replace("s3://bucket", bucket).replace("00127", "00002"))[1:]
        code, out, err = latentmill(*argv, *([] if argv[0] == "status" else ["--workers", 0]))
        assert code == 0, err
        assert "18" in out, line


def test_the_measurements_of_the_readme_are_in_the_benchmarks() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    numbers = re.findall(r"\d[\d,]*\.\d+|\d,\d{3}", find_section("Performance"))
    assert len(numbers) >= 10
    for number in numbers:
        assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d]|[.,]\d)", page), number


def test_the_readme_names_every_preset_and_extra() -> None:
    for name in PRESETS:
        assert f"`{name}`" in find_section("Supported VAEs"), name
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name in set(project["optional-dependencies"]) - {"dev", "docs", "peers"}:
        assert f"`{name}`" in find_section("Install"), name


def test_every_link_of_the_documentation_has_a_target() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "examples/README.md"]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def make_presets_table() -> str:
    """Return the rows of the table of presets in docs/models.md."""
    rows = []
    for name, preset in PRESETS.items():
        config = preset.config
        means, shift, scale = "", "", "in the weights"
        if isinstance(config, AutoencoderKLConfig):
            means = f"{list(config.latents_mean)}, {list(config.latents_std or [])}" if config.latents_mean else ""
            shift = "" if config.shift_factor is None else str(config.shift_factor)
            scale = str(config.scaling_factor)
        facts = (config.latent_channels, scale, shift, means, config.force_upcast, preset.source)
        rows.append(f"| `{name}` | " + " | ".join(map(str, facts)) + " |\n")
    return "".join(rows)


def make_reasons_table() -> str:
    """Return the table of reasons in docs/limits.md."""
    rows = "".join(f"| `{reason}` | {sentence.replace('{}', 'N')} |\n" for reason, sentence in REASONS.items())
    return "| reason | |\n|---|---|\n" + rows


def make_limits_table() -> str:
    """Return the table of limits in docs/limits.md."""
    meanings = {
        "image_bytes": "bytes of an encoded image",
        "pixels": "pixels of an image",
        "side": "pixels of the longer side of an image",
        "text_bytes": "bytes of a caption, or of any other text of an image, also inside a list",
        "columns_bytes": "bytes that the columns of a part's rows occupy in memory; each row may use an equal share",
        "key_bytes": "bytes of a key",
        "members": "members of a tar, of a range of a large tar, or of a zip",
        "table_bytes": "bytes of a table of metadata or paths; also of memory for all tables that a process keeps",
        "header_bytes": "bytes of one extended header of a tar",
        "footer_bytes": "bytes of a Parquet file's footer, or of a zip's directory",
        "batch_bytes": "bytes of a record batch of an Arrow file",
        "expansion": "times that the content of a gzip file may be larger than the file, beyond its first GiB",
        "seconds": "seconds for an image that is decoded in a separate process",
        "memory": "bytes of memory of the separate process",
    }
    rows = "".join(f"| `{f.name}` | {f.default:,} | {meanings[f.name]} |\n" for f in dataclasses.fields(Limits))
    return "| name | default | |\n|---|---|---|\n" + rows


def test_the_limits_page_has_every_reason_and_limit() -> None:
    page = (ROOT / "docs/limits.md").read_text(encoding="utf-8")
    assert make_reasons_table() in page
    assert make_limits_table() in page


def test_the_models_page_has_every_preset() -> None:
    assert make_presets_table() in (ROOT / "docs/models.md").read_text(encoding="utf-8")


def test_the_python_code_of_the_models_page_runs() -> None:
    first, flux2, _ = find_blocks((ROOT / "docs/models.md").read_text(encoding="utf-8"), "python")
    names: dict[str, Any] = {}
    exec(first, names)
    assert (names["latent"].shape, names["back"].shape) == ((1, 16, 32, 32), (1, 3, 256, 256))
    exec(flux2, names)
    assert (names["raw"].shape, names["latent"].shape) == ((1, 32, 32, 32), (1, 128, 16, 16))
    assert names["back"].shape == (1, 3, 256, 256)


def test_the_python_code_of_the_micro_conditioning_runs(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (ROOT / "docs/inputs.md").read_text(encoding="utf-8").split("## Micro-conditioning")[1]
    (block,) = find_blocks(section.split("\n## ")[0], "python")
    monkeypatch.chdir(demo / "demo-output")
    names: dict[str, Any] = {}
    exec(block, names)
    assert len(names["numbers"]) == 6
    assert {numbers[0][4:] for numbers in names["numbers"]} == {(256, 256)}


def test_the_python_code_of_the_training_page_runs(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = find_blocks((ROOT / "docs/training.md").read_text(encoding="utf-8"), "python")
    monkeypatch.chdir(demo)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert (names["latents"].shape, len(names["captions"])) == ((2, 16, 32, 32), 2)
    assert (len(names["loader"]), names["loader"].epoch, names["rest"]) == (3, 2, [1, 2])
    assert (names["stream"].epoch, names["state"]["epoch"], names["state"]["sessions"]) == (1, 1, [])
    assert sum(names["shares"]) == 20


def test_the_commands_of_the_inputs_page_exist() -> None:
    for line in find_command_lines((ROOT / "docs/inputs.md").read_text(encoding="utf-8")):
        program, verb, *argv = shlex.split(line)
        assert program == "latentmill"
        make_parser(OPTIONS[verb], verb).parse_args(argv)


def test_the_exports_page_has_every_format_and_its_commands_exist() -> None:
    page = (ROOT / "docs/exports.md").read_text(encoding="utf-8")
    table = page.split("\n| `--format`")[1].split("\n\n")[0]
    assert tuple(FORMATS) == EXPORT_NAMES
    for name, form in FORMATS.items():
        (line,) = (line for line in table.splitlines() if f"`{name}`" in line)
        assert form.program in line, line
        assert f"| {form.space}" in line, line
        assert (str(form.dtype).removeprefix("torch.") if form.dtype else "of the cache") in line, line
    vae = "demo"
    for line in find_command_lines(page):
        program, verb, *argv = shlex.split(line)
        assert program == "latentmill"
        arguments = make_parser(OPTIONS[verb], verb).parse_args(argv)
        if verb == "encode":
            vae = arguments.vae
            continue
        form = FORMATS[arguments.format]
        if form.scaling or form.plain_scaling:
            assert vae != "demo", f"the export of the cache of this VAE is refused: {line}"


def test_the_inputs_page_names_every_recipe() -> None:
    page = (ROOT / "docs/inputs.md").read_text(encoding="utf-8")
    for recipe in typing.get_args(Recipe):
        assert f"`{recipe.replace('aspect-ratio-', '-')}`" in page or f"`{recipe}`" in page, recipe


@pytest.mark.slow
def test_the_jax_code_of_the_models_page_runs() -> None:
    pytest.importorskip("flax")
    *_, block = find_blocks((ROOT / "docs/models.md").read_text(encoding="utf-8"), "python")
    names: dict[str, Any] = {}
    exec(block, names)
    assert (names["latent"].shape, names["back"].shape) == ((1, 32, 32, 16), (1, 3, 256, 256))


@pytest.mark.parametrize(
    "constants",
    [
        {"scaling_factor": 0.18215},
        {"scaling_factor": 1.5305, "shift_factor": 0.0609},
        {"scaling_factor": 0.5, "latents_mean": [1.0, 2.0], "latents_std": [2.0, 4.0]},
        {"scaling_factor": 1.0, "latents_mean": [*range(8)], "latents_std": [*range(1, 9)], "patch_size": [2, 2]},
    ],
    ids=lambda constants: " ".join(constants),
)
def test_the_python_code_of_the_format_page_makes_model_latents(constants: dict[str, Any]) -> None:
    (block,) = find_blocks((ROOT / "docs/cache-format.md").read_text(encoding="utf-8"), "python")
    names: dict[str, Any] = {}
    exec(block, names)
    every = {"shift_factor": None, "latents_mean": None, "latents_std": None, "patch_size": None, **constants}
    patch = tuple(every["patch_size"]) if every["patch_size"] else None
    raw = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    expected = Scaling.from_constants(**{**every, "patch_size": patch}).to_model(raw)
    torch.testing.assert_close(torch.tensor(names["to_model_latent"](raw.numpy(), every)).float(), expected)


def test_the_format_page_names_every_column() -> None:
    page = (ROOT / "docs/cache-format.md").read_text(encoding="utf-8")
    for field in make_schema(OutputSchema(has_flipped=True)):
        assert f"`{field.name}`" in page, field.name


def test_the_format_page_names_every_stage_and_bottleneck() -> None:
    page = (ROOT / "docs/cache-format.md").read_text(encoding="utf-8")
    stages = [field.name for field in dataclasses.fields(Seconds)]
    bounds = RunTotals(seconds=Seconds(**dict.fromkeys(stages, 1.0))).shares
    for name in [*stages, *bounds, *describe_totals(RunTotals()), *ProgressMeter("encoded", 1).facts]:
        assert name in ("counts", "rejects") or f"`{name}`" in page, name


def test_the_format_page_names_every_column_of_the_plan() -> None:
    page = (ROOT / "docs/cache-format.md").read_text(encoding="utf-8")
    (entry,) = re.findall(r"^- `_plan/NNNNN.parquet`: (.*?)^- ", page, re.MULTILINE | re.DOTALL)
    for name in plan.SCHEMA.names:
        assert f"`{name}`" in entry, name


if __name__ == "__main__":
    COMMAND_LINE.write_text(make_command_line_page(), encoding="utf-8")
