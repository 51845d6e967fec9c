"""The plots of the page, as inline SVG. Their colors are CSS variables, so they follow the theme of the page."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.report.sample import Sample
from pipeline.report.workers import WorkerRates

# What matplotlib draws, and what the page shows instead.
INK, FAINT, FIRST, SECOND, PAPER = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
VARIABLES = {INK: "--ink", FAINT: "--faint", FIRST: "--accent", SECOND: "--second", PAPER: "--paper"}
WIDTH = 9.0  # inches of 72 points
MAX_CHANNELS, MAX_POINTS = 32, 500
MAX_LINES, MAX_ROWS = 8, 40  # of workers
HEAT = (0.25, 0.5, 0.85)  # red, green and blue, readable in both themes
STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def draw(name: str, rows: int, columns: int, height: float, paint: Callable[[Any], None], **options: Any) -> str:
    """Return a figure as SVG. name: unique on the page. height: in inches. paint: draws on an array of axes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        paint(figure.subplots(rows, columns, squeeze=False, **options))
        sink = io.StringIO()
        figure.savefig(sink, format="svg", metadata={"Date": None})
    return embed(sink.getvalue(), name)


def embed(svg: str, name: str) -> str:
    """Return an SVG document as an element of a page: without links, with CSS variables and with ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(
        r'id="(figure|axes|patch|line2d|matplotlib\.axis|xtick|ytick|text|PathCollection|FillBetween\w*)_\d+"', "", svg
    )
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{name}"', svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg


def draw_histograms(sample: Sample, means: Sequence[float], stds: Sequence[float]) -> str:
    """Return the histogram of each channel, with the normal distribution of the model's constants."""
    channels = min(len(means), MAX_CHANNELS)
    columns = min(4, channels)
    rows = -(-channels // columns)

    def paint(axes: Any) -> None:
        for channel, axis in enumerate(axes.flat):
            if channel >= channels:
                axis.set_axis_off()
                continue
            edges, counts = sample.edges[channel], sample.counts[channel]
            width = edges[1] - edges[0]
            density = counts / max(1, counts.sum()) / width
            centers = (edges[1:] + edges[:-1]) / 2
            axis.fill_between(centers, density, step="mid", color=FIRST, alpha=0.55, linewidth=0)
            z = (centers - means[channel]) / stds[channel]
            normal = np.exp(-(z**2) / 2) / (stds[channel] * np.sqrt(2 * np.pi))
            axis.plot(centers, normal, color=SECOND, linewidth=1.1)
            axis.set_yticks([])
            axis.set_title(f"channel {channel}", fontsize=8, loc="left", pad=2)
            axis.tick_params(labelsize=7, length=2)
            axis.locator_params(axis="x", nbins=4)

    return draw("histograms of the channels", rows, columns, 1.15 * rows, paint)


def draw_moments(content: Mapping[str, Any], means: Sequence[float], stds: Sequence[float]) -> str:
    """Return the mean and deviation of each channel beside the model's constants. content: of stats.json."""
    channels = np.arange(len(means))

    def paint(axes: Any) -> None:
        axis = axes[0, 0]
        for offset, color, middle, width, label, marker in (
            (-0.14, FIRST, content["mean"], content["std"], "this cache", "o"),
            (0.14, SECOND, means, stds, "the model's constants", "D"),
        ):
            axis.errorbar(
                channels + offset, middle, width, color=color, fmt=marker, markersize=4, linewidth=1.4, label=label
            )
        axis.axhline(0, color=FAINT, linewidth=0.5)
        axis.set_xlabel("channel")
        axis.set_ylabel("mean and deviation")
        axis.set_xticks(channels if len(channels) <= MAX_CHANNELS else channels[::8])
        axis.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))

    return draw("mean and deviation of the channels", 1, 1, 2.8, paint)


def draw_sizes(sample: Sample) -> str:
    """Return the original sizes of the images, and their aspect ratios."""
    step = -(-len(sample) // MAX_POINTS)
    height, width = sample.sizes[::step].T
    ratio = sample.sizes[:, 1] / sample.sizes[:, 0]

    def paint(axes: Any) -> None:
        left, right = axes[0]
        left.scatter(width, height, s=9, color=FIRST, alpha=0.5, linewidths=0)
        left.set_xlabel("width in pixels")
        left.set_ylabel("height in pixels")
        left.set_xlim(0)
        left.set_ylim(0)
        right.hist(np.log2(ratio), bins=np.linspace(-2, 2, 41), color=FIRST, alpha=0.7)
        right.set_xticks([-2, -1, -0.585, 0, 0.585, 1, 2], ["1:4", "1:2", "2:3", "1:1", "3:2", "2:1", "4:1"])
        right.set_xlabel("width : height")
        right.set_ylabel("rows of the sample")

    return draw("original sizes and aspect ratios", 1, 2, 2.8, paint)


def draw_throughput(starts: Sequence[str], rates: Sequence[float]) -> str:
    """Return the throughput of each run, in the order of their starts."""

    def paint(axes: Any) -> None:
        axis = axes[0, 0]
        axis.bar(range(len(rates)), rates, color=FIRST, alpha=0.8, width=0.6)
        shown = range(0, len(starts), -(-len(starts) // 6))
        axis.set_xticks(list(shown), [starts[number][:16].replace("T", " ") for number in shown])
        axis.set_xlim(-1, len(rates))
        axis.set_ylabel("images per second")

    return draw("throughput of the runs", 1, 1, 2.2, paint)


def draw_workers(rates: WorkerRates) -> str:
    """Return the throughput of each worker over time: a line per worker if there are few, otherwise a row."""
    order = np.argsort(rates.mean, kind="stable")[:MAX_ROWS]
    is_whole = rates.seconds >= rates.seconds[0] / 2  # the last interval may be short
    values = (rates.counts / rates.seconds)[order][:, is_whole]
    names = [rates.names[number] for number in order]
    unit, divisor = ("minutes", 60) if rates.seconds.sum() >= 300 else ("seconds", 1)
    edges = np.concatenate([[0.0], np.cumsum(rates.seconds[is_whole])]) / divisor
    few = len(rates.names) <= MAX_LINES

    def paint(axes: Any) -> None:
        axis = axes[0, 0]
        paint_lines(axis, values, edges) if few else paint_rows(axis, values, edges, names)
        slowest = f"the slowest: {names[0]}" if few else f"the slowest first, of {len(rates.names):,} workers"
        median = f"the median is {np.median(rates.mean):.3g} images/s"
        axis.set_title(f"{slowest}; {median}" if len(names) > 1 else names[0], loc="left", fontsize=8, parse_math=False)
        axis.set_xlabel(f"{unit} since {rates.started[:16].replace('T', ' ')} UTC")

    return draw("throughput of the workers", 1, 1, 2.4 if few else 0.8 + 0.14 * len(order), paint)


def paint_lines(axis: Any, values: NDArray[np.float64], edges: NDArray[np.float64]) -> None:
    """Draw a line per worker, that of the slowest on top. values: images per second [W, T], the slowest first."""
    for number, line in reversed(list(enumerate(values))):
        is_slowest = not number and len(values) > 1
        color = SECOND if is_slowest else FIRST
        axis.stairs(np.nan_to_num(line), edges, baseline=None, color=color, linewidth=1.6 if is_slowest else 1.1)
    axis.set_ylabel("images per second")
    axis.set_ylim(0)


def paint_rows(axis: Any, values: NDArray[np.float64], edges: NDArray[np.float64], names: Sequence[str]) -> None:
    """Draw a row per worker, in a deeper color for more images per second. values: as of `paint_lines`."""
    share = np.nan_to_num(values) / max(float(np.nanmax(values)), 1e-9)
    colors = np.empty((*values.shape, 4))
    colors[..., :3], colors[..., 3] = HEAT, np.where(np.isnan(values), 0.0, 0.06 + 0.94 * share)
    axis.imshow(colors, aspect="auto", interpolation="nearest", extent=(0, edges[-1], len(names), 0))
    axis.set_yticks(np.arange(len(names)) + 0.5)
    axis.set_yticklabels(names, parse_math=False, fontsize=7)
    axis.tick_params(axis="y", length=0)
