"""The table of models in docs/models.md against the classes that the pipelines of diffusers declare."""

import ast
import re
from pathlib import Path

import pytest

from vae.config import FLUX2_CLASS, TORCH_CLASS

diffusers = pytest.importorskip("diffusers")

PAGE = Path(__file__).parents[2] / "docs/models.md"
ROW = re.compile(r"^\| ([^|]+) \| `(\w+Pipeline)` \| `(\w+)` \| (yes|no)\b", re.MULTILINE)
PIPELINES = Path(diffusers.__file__).parent / "pipelines"


def read_vae_class(pipeline: str) -> str:
    """Return the annotation of a pipeline's argument `vae`. Most pipelines cannot be imported without transformers."""
    for path in PIPELINES.glob("*/*.py"):
        text = path.read_text(encoding="utf-8")
        if not re.search(rf"^class {pipeline}\(", text, re.MULTILINE):
            continue
        (found,) = (n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == pipeline)
        (init,) = (n for n in found.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
        (annotation,) = (argument.annotation for argument in init.args.args if argument.arg == "vae")
        assert annotation is not None
        return ast.unparse(annotation)
    raise AssertionError(f"diffusers has no {pipeline}")


@pytest.mark.slow
def test_every_model_has_the_vae_that_the_page_says() -> None:
    rows = ROW.findall(PAGE.read_text(encoding="utf-8"))
    assert len(rows) > 30
    for model, pipeline, vae_class, works in rows:
        assert read_vae_class(pipeline) == vae_class, model
        assert (works == "yes") == (vae_class in (TORCH_CLASS, FLUX2_CLASS)), model
