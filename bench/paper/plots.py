"""Plots as SVG that stands in a page by itself: no script, no reference to anything outside."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

COLORS = {
    "paging": "#1f5fbf", "oracle": "#e08a1e", "oracle, ideally packed": "#b59a3c", "pow2": "#3f9b5a", "max": "#b8433c",
}  # fmt: skip
"""Of memory policies, the same in every plot."""
OTHERS = ("#1f5fbf", "#e08a1e", "#3f9b5a", "#b8433c", "#7a5aa6", "#5b6770", "#b59a3c")
PAPER_COLOR = "#c9ced6"
WIDTH, HEIGHT = 6.4, 3.1
"""Inches."""


class PlotsMissingError(RuntimeError):
    """matplotlib is not installed."""


def _figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  an optional extra
    except ImportError as error:
        raise PlotsMissingError(
            "the report's plots need matplotlib: install it, as with `pip install 'jaxpaged[bench]'`"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e8ec", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any, label: str) -> str:
    """The drawing alone: prolog, document type, metadata and namespaces, which name addresses, are not for HTML."""
    import matplotlib  # noqa: PLC0415  an optional extra

    text = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif", "font.size": 9}
    with matplotlib.rc_context(settings):
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href=", "href=")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def bars(
    label: str, groups: Sequence[str], series: Mapping[str, Sequence[float | None]], *, unit: str,
    digits: int = 1, paper: Sequence[str] = (), bands: Mapping[str, tuple[float, float]] | None = None,
) -> str:  # fmt: skip
    """A bar for each series in each group, with its value; None leaves a gap.

    Args:
        paper: Names of series that are the paper's, drawn in grey.
        bands: Ranges that the paper gives, by group: a grey band behind the group.
    """
    figure, axes = _figure(WIDTH, HEIGHT)
    width = 0.8 / len(series)
    others = iter(OTHERS)
    for index, group in enumerate(groups):
        if bands and group in bands:
            low, high = bands[group]
            axes.fill_between([index - 0.46, index + 0.46], low, high, color=PAPER_COLOR, zorder=0,
                              label="paper" if group == next(iter(bands)) else None)  # fmt: skip
    for number, (name, values) in enumerate(series.items()):
        color = PAPER_COLOR if name in paper else COLORS.get(name) or next(others)
        places = [index + (number - (len(series) - 1) / 2) * width for index in range(len(groups))]
        drawn = axes.bar(places, [value or 0 for value in values], width * 0.94, color=color, label=name)
        shown = ["" if value is None else f"{value:.{digits}f}" for value in values]
        axes.bar_label(drawn, shown, fontsize=7 if len(groups) * len(series) > 12 else 8, padding=1)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(unit)
    axes.margins(y=0.12)
    if len(series) > 1 or bands:
        axes.legend(frameon=False, fontsize=8, ncols=min(4, len(series) + bool(bands)), loc="upper center",
                    bbox_to_anchor=(0.5, 1.2))  # fmt: skip
    return _svg(figure, label)


def lines(
    label: str, series: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str, limits: Sequence[float] = (),
    has_log_x: bool = False, has_log_y: bool = False, ticks: Sequence[float] = (),
) -> str:  # fmt: skip
    """A line through the points of each series.

    Args:
        limits: Heights of dashed lines across.
        ticks: Places on the x axis, where they should be these.
    """
    figure, axes = _figure(WIDTH, HEIGHT)
    others = iter(OTHERS)
    for name, points in series.items():
        color = COLORS.get(name) or next(others)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, linewidth=1.6, color=color, label=name)
    for limit in limits:
        axes.axhline(limit, color="#8a93a0", linewidth=0.9, linestyle="--")
    if has_log_x:
        axes.set_xscale("log", base=2)
    if has_log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    if ticks:
        axes.set_xticks(list(ticks), [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure, label)
