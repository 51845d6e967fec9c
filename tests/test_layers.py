"""The rules of the packages: which module may import which, and how large files and functions may grow."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("latentmill", "vae", "pipeline", "jobs")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
# From the lowest: a component (a file or a folder of pipeline/) imports those of its own layer and of lower ones.
LAYERS: tuple[set[str], ...] = (
    {"errors", "text", "values", "wording", "buffers"},
    {"canonical_json", "records", "limits", "prefetch", "timing", "subprocess_server", "batching"},
    {"device_loop", "staging"},
    {"storage"},
    {"formats", "images", "weights"},
    {"readers", "jax_model"},
    {"encoder"},
    {"sources", "tuning"},
    {"cache"},
    {"part_writer"},
    {"flow"},
    {"annotation", "estimate", "exports", "maintenance", "preview"},
    {"report"},
)
STEPS = ("readers", "images", "formats")  # the steps of a sample, which only flow combines
MAX_FUNCTION = 60
MAX_FILE = 450


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports, anywhere in it. Our modules have their full name."""
    for node in ast.walk(tree(path)):
        yield from imported(node)


def imported(node: ast.AST) -> Iterator[str]:
    """Yield the modules that a statement imports."""
    if isinstance(node, ast.Import):
        yield from (name.name for name in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, "imports are absolute"
        inner = [f"{node.module}.{name.name}" for name in node.names]
        yield from (name if name in MODULES else node.module for name in inner)


def importers(package: str) -> set[str]:
    """Return our modules that import a package or a module in it."""
    return {
        module
        for module, path in MODULES.items()
        if any(name == package or name.startswith(package + ".") for name in imports(path))
    }


def test_every_module_is_found() -> None:
    assert {"vae.model", "pipeline.flow", "jobs.ray_executor"} <= set(MODULES)
    assert {f"pipeline.{component}" for layer in LAYERS for component in layer} == {
        ".".join(module.split(".")[:2]) for module in MODULES if module.startswith("pipeline.")
    }


def packages_importing(package: str) -> set[str]:
    """Return the other top-level packages that import a package."""
    return {module.split(".")[0] for module in importers(package)} - {package}


def test_imports_run_from_jobs_to_pipeline_to_vae_to_latentmill() -> None:
    # the command alone goes the other way: once it can find our packages, it starts jobs.cli
    assert {module for module in importers("jobs") if not module.startswith("jobs.")} == {"latentmill.__main__"}
    assert packages_importing("pipeline") == {"jobs"}
    assert packages_importing("vae") == {"jobs", "pipeline"}
    assert packages_importing("latentmill") == {"jobs", "pipeline", "vae"}


def test_the_latentmill_package_imports_no_other_package_at_module_level() -> None:
    for module, path in MODULES.items():
        if module.split(".")[0] == "latentmill":
            nodes = tree(path).body if module == "latentmill.__main__" else ast.walk(tree(path))
            names = {name for node in nodes for name in imported(node)}
            assert not {name.split(".")[0] for name in names} & {"vae", "pipeline", "jobs"}, module


def test_the_latentmill_package_needs_four_libraries() -> None:
    """All other imports are of the standard library: no Pillow, no YAML, no Ray. isal is optional: zlib replaces it."""
    paths = [path for module, path in MODULES.items() if module.split(".")[0] == "latentmill"]
    names = {name.split(".")[0] for path in paths for name in imports(path)}
    assert names - sys.stdlib_module_names - {"latentmill", "jobs"} == {"fsspec", "isal", "numpy", "pyarrow", "torch"}


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("ray", {"jobs.ray_executor", "jobs.ray_metrics", "jobs.ray_node", "jobs.ray_openers"}),
        ("fsspec", {"latentmill.folder", "pipeline.storage.connection"}),
        ("s3fs", set()),
        ("diffusers", set()),
        ("webdataset", set()),
        ("triton", {"vae.group_norm_silu", "vae.triton_kernels"}),
        ("jax", {"pipeline.jax_model", "vae.flax", "vae.flax_blocks", "vae.flax_outputs"}),
        ("flax", {"vae.flax", "vae.flax_blocks", "vae.flax_outputs"}),
        ("msgpack", {"vae.flax_weights"}),
        ("argparse", {"jobs.parsing", "vae.train"}),
    ],
)
def test_a_library_is_imported_only_where_allowed(package: str, allowed: set[str]) -> None:
    assert importers(package) == allowed


def test_the_dependencies_are_the_packages_that_we_import() -> None:
    """A package that only tests import belongs to an extra. fsspec imports s3fs for `s3://`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.match(r"[\w.-]+", requirement)[0] for requirement in project["dependencies"]}  # type: ignore[index]
    called = {"pillow": "PIL", "pyyaml": "yaml"}
    imported = {name.split(".")[0] for path in FILES for name in imports(path)}
    assert {called.get(name, name) for name in names} <= imported | {"s3fs"}


def imported_components(path: Path) -> set[str]:
    """Return the components of pipeline/ that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("pipeline.")}


def test_only_allowed_modules_of_the_pipeline_import_the_vae() -> None:
    importing = {module for module in importers("vae") if module.startswith("pipeline.")}
    assert importing <= {
        f"pipeline.{name}"
        for name in ("encoder", "jax_model", "weights", "preview.render", "cache.reader", "cache.identity")
    }


def test_the_layers_of_the_pipeline_import_downwards() -> None:
    layer_of = {component: number for number, layer in enumerate(LAYERS) for component in layer}
    for module, path in MODULES.items():
        if module.startswith("pipeline."):
            component = module.split(".")[1]
            above = {name for name in imported_components(path) - {component} if layer_of[name] >= layer_of[component]}
            assert not {name for name in above if layer_of[name] > layer_of[component]}, (module, above)


def test_the_architecture_page_has_every_room_of_the_pipeline() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rooms = [room for layer in LAYERS for room in sorted(layer)]
    assert [room for room in rooms if not re.search(rf"`{room}/?`", page)] == []


def test_maintenance_and_preview_do_not_import_each_other() -> None:
    for component, other in (("maintenance", "preview"), ("preview", "maintenance")):
        for path in (ROOT / "pipeline" / component).glob("*.py"):
            assert other not in imported_components(path), path


def test_steps_do_not_import_each_other() -> None:
    for component in STEPS:
        for path in (ROOT / "pipeline" / component).glob("*.py"):
            assert not imported_components(path) & (set(STEPS) - {component}) - {"formats"}, path


def test_there_is_no_import_cycle() -> None:
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        if module not in done:
            for name in set(imports(MODULES[module])) & set(MODULES):
                visit(name, (*above, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{node.name} has {length} lines"


def test_only_jobs_and_vae_train_print() -> None:
    for module, path in MODULES.items():
        calls = (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call))
        prints = any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)
        assert not prints or module.startswith("jobs.") or module == "vae.train", module


def test_no_file_has_the_name_of_a_standard_module() -> None:
    # `python jobs/x.py` puts the folder of the file first on the path, where it would hide the standard library.
    names = {path.stem for path in FILES} - {"__init__"}
    assert not names & set(sys.stdlib_module_names)


def test_every_module_has_a_docstring() -> None:
    for module, path in MODULES.items():
        assert ast.get_docstring(tree(path)), module


def test_the_wheel_has_every_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {path.parent.relative_to(ROOT) for path in FILES}
    assert set(project["tool"]["setuptools"]["packages"]) == {".".join(folder.parts) for folder in folders}
