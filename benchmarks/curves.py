"""Line charts for benchmarks whose results are curves; `benchmarks/render.py` draws bars."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    x_label: str
    y_label: str
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    """x and y by the name of each curve; equal names get equal colours in all panels."""
    log_y: bool = False
    variants: Mapping[str, str] = field(default_factory=dict)
    """Curves that are dashed, in the colour of the curve of this name."""


def write_svg(path: Path, question: str, rows: Sequence[Sequence[Panel]]) -> bool:
    """Draws a grid of panels.

    Returns:
        False, with a line on standard output, where matplotlib (extra ``bench``) is missing or
        there is no panel.
    """
    columns = max(map(len, rows), default=0)
    if columns == 0:
        print(f"nothing was measured: {path.name} was not drawn")
        return False
    if importlib.util.find_spec("matplotlib") is None:
        print(f"matplotlib is not installed (extra `bench`): {path.name} was not drawn")
        return False
    import matplotlib
    from matplotlib.figure import Figure

    panels = [panel for row in rows for panel in row]
    named = (panel.variants.get(name, name) for panel in panels for name in panel.curves)
    hues = list(dict.fromkeys(named))
    colors = matplotlib.colormaps["tab10" if len(hues) <= 10 else "tab20"].colors
    legend = {}
    figure = Figure(figsize=(4.2 * columns + 2, 3.2 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes_row, row in zip(grid, rows, strict=True):
        for axes in axes_row[len(row) :]:
            axes.set_visible(False)
        for axes, panel in zip(axes_row, row, strict=False):
            for name, (xs, ys) in panel.curves.items():
                color = colors[hues.index(panel.variants.get(name, name)) % len(colors)]
                style = "o--" if name in panel.variants else "o-"
                (legend[name],) = axes.plot(xs, ys, style, color=color, markersize=3)
            axes.set_title(panel.title, size=9)
            axes.set_xlabel(panel.x_label, size=8)
            axes.set_ylabel(panel.y_label, size=8)
            if panel.log_y:
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)
            axes.spines[["top", "right"]].set_visible(False)
    place = {"loc": "outside right center", "frameon": False, "fontsize": 7, "handlelength": 4}
    figure.legend(legend.values(), legend.keys(), **place)
    figure.suptitle("\n".join(textwrap.wrap(question, 50 * columns)), size=9)
    # Fixed ids and no date: the same numbers give the same file, so a diff means new numbers.
    with matplotlib.rc_context({"svg.hashsalt": "jpd"}):
        figure.savefig(path, metadata={"Date": None})
    return True
