"""The page: one HTML file that needs nothing else. Jinja2 escapes every value; scripts are forbidden by its policy."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.errors import REASONS, UsageError
from pipeline.report.findings import Finding
from pipeline.report.recheck import Compared
from pipeline.text import printable

SHOWN_SIDE = 192  # of an image, in pixels
QUALITY = 82
SHEET_IMAGES, WORST_IMAGES = 24, 8
MAX_BUCKETS = 40
MAX_CAPTION = 300  # characters
INSTALL = 'latentmill report needs Jinja2 and matplotlib: pip install "latentmill[report]"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A table of the page: names and values."""

    title: str
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """All that the page shows.

    facts: tables on how the cache was made. tiles: the most important numbers. pairs: images that are alike, by the
    code of the finding. why_no_images: why there are no decoded images, or no originals; empty if there are. plots: SVG
    by name. buckets: name, rows, share of the largest one. runs: the runs of the cache. rejects: counts and examples by
    reason.
    """

    cache: str
    made: str
    tiles: Sequence[tuple[str, str]]
    findings: Sequence[Finding]
    facts: Sequence[Section]
    compared: Sequence[Compared]
    pairs: Mapping[str, Sequence[Sequence[np.ndarray]]]
    why_no_images: str
    plots: Mapping[str, str]
    agreement: str
    buckets: Sequence[tuple[str, int, float]]
    runs: Sequence[Mapping[str, Any]]
    rejected: Mapping[str, int]
    reject_examples: Mapping[str, Sequence[Mapping[str, Any]]]
    sampled: str


def check_packages() -> None:
    """Raise UsageError if a package of the extra `report` is missing."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(f"{INSTALL} ({error.name} is not installed)") from error


def render_page(page: Page) -> str:
    """Return the HTML of a page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    measured = [row for row in page.compared if row.psnr is not None]
    worst = sorted(measured, key=lambda row: (row.psnr or 0.0) + 20 * (row.ssim or 0.0))[:WORST_IMAGES]
    step = max(1, -(-len(page.compared) // SHEET_IMAGES))
    return environment.get_template("report.html").render(
        page=page,
        plots={name: Markup(svg) for name, svg in page.plots.items()},  # matplotlib escapes names
        pairs={code: [[to_data_uri(each) for each in pair] for pair in pairs] for code, pairs in page.pairs.items()},
        sheet=[show(row) for row in page.compared[::step]],
        worst=[show(row) for row in worst],
        sentences={reason: explain(reason, page.reject_examples.get(reason, ())) for reason in page.rejected},
    )


def explain(reason: str, examples: Sequence[Mapping[str, Any]]) -> str:
    """Return what is wrong with the samples that were rejected for a reason: what all examples say, if they agree."""
    details = {str(example.get("detail") or "") for example in examples}
    return details.pop() if len(details) == 1 else REASONS.get(reason, "").replace("{}", "N")


def show(row: Compared) -> dict[str, Any]:
    """Return a row for the page, its images as data URIs."""
    return {
        "key": row.key,
        "shard": row.shard,
        "psnr": row.psnr,
        "ssim": row.ssim,
        "cause": row.cause,
        "caption": printable(" ".join(row.caption[:MAX_CAPTION].split())),
        "decoded": to_data_uri(row.decoded),
        "original": None if row.original is None else to_data_uri(row.original),
    }


def to_data_uri(pixels: np.ndarray) -> str:
    """Return RGB uint8 [H, W, 3] as a JPEG of at most 192 pixels a side, in a data URI."""
    image, sink = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
    image.save(sink, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(sink.getvalue()).decode()}"
