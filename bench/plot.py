"""The picture of the layer table: the ratio of every case on a logarithmic scale, one panel per cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: there may be no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from bench.cases import MODES
from bench.layers import Row
from bench.report import by_cell, geomean
from bench.timing import MIN_ROUNDS

COLOURS = {"inference": "#2a78b5", "training": "#e08a1e"}
SLOWER = "#c0282d"
TICKS = (0.05, 0.1, 0.2, 0.5, 0.8, 1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100)
BAR = 0.38


def plot_ratios(rows: Sequence[Row], info: dict[str, Any], path: Path) -> None:
    """Draw the rows of the first dtype and number of threads in ``rows`` as horizontal bars and save them as PNG."""
    rows = [row for row in rows if (row.dtype, row.threads) == (rows[0].dtype, rows[0].threads)]
    cells = by_cell(rows)
    cases = list(dict.fromkeys(row.case for group in cells.values() for row in group))
    shapes = {row.case: row.shape for row in rows}
    figure, panels = plt.subplots(
        1, len(cells), figsize=(2.6 + 4.0 * len(cells), 2.2 + 0.44 * len(cases)), sharey=True, squeeze=False
    )
    # One scale for all panels, with room for the numbers at the bars' ends.
    low = min(0.8, *(row.ratio for row in rows)) / 1.05
    high = max(1.5, *(row.ratio for row in rows))
    high *= (high / low) ** 0.16
    for axes, (cell, group) in zip(panels[0], cells.items(), strict=True):
        _panel(axes, cell, group, cases)
        axes.set_xlim(low, high)
        _ticks(axes, low, high)
    panels[0][0].set_yticks(range(len(cases)), [f"{case}\n{shapes[case]}" for case in cases], fontsize=8.5)
    panels[0][0].invert_yaxis()

    figure.suptitle("fastrnn against torch.nn, time per call: ratio > 1 means that fastrnn is faster", fontsize=13)
    figure.supxlabel(
        f"{info['cpu']}, {rows[0].threads} thread{'s' if rows[0].threads > 1 else ''}, {rows[0].dtype}; "
        f"torch {info['torch']}, fastrnn {info['fastrnn']}; {info['date'][:10]}",
        fontsize=9,
        color="#555555",
    )
    handles: list[Any] = [Patch(color=COLOURS[mode], label=mode) for mode in MODES]
    handles.append(Patch(facecolor="white", edgecolor=SLOWER, hatch="////", label="slower than torch.nn"))
    handles.append(Line2D([], [], color="#444444", linestyle=":", label="geometric mean"))
    if any(row.rounds < MIN_ROUNDS for row in rows):
        handles.append(Line2D([], [], linestyle="none", label="?  too few rounds to rely on"))
    figure.legend(
        handles=handles, loc="upper center", ncols=len(handles), bbox_to_anchor=(0.5, 0.965), frameon=False, fontsize=10
    )
    figure.tight_layout(rect=(0, 0, 1, 0.955))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axes: Axes, cell: str, group: Sequence[Row], cases: Sequence[str]) -> None:
    """One cell: two bars a case, starting from the line at 1."""
    for row in group:
        place = cases.index(row.case) + BAR * (MODES.index(row.mode) - 0.5)
        style: dict[str, Any] = {"edgecolor": SLOWER, "hatch": "////", "linewidth": 0.8} if row.regression else {}
        axes.barh(place, row.ratio - 1, left=1, height=BAR, color=COLOURS[row.mode], **style)
        axes.annotate(
            (f"{row.ratio:.2f}" if row.ratio < 10 else f"{row.ratio:.1f}") + (" ?" if row.rounds < MIN_ROUNDS else ""),
            (max(row.ratio, 1.0), place),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=SLOWER if row.regression else "#222222",
            weight="bold" if row.regression else "normal",
        )
    mean = geomean(row.ratio for row in group)
    axes.axvline(1, color="black", linewidth=1.2)
    axes.axvline(mean, color="#444444", linestyle=":", linewidth=1.2, zorder=0)
    axes.set_title(f"{cell.upper()}   geomean {mean:.2f}", fontsize=12)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.6, len(cases) - 0.4)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _ticks(axes: Axes, low: float, high: float) -> None:
    """Ticks at ratios that one reads at a glance, as plain numbers, thinned out where they would collide."""
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    chosen: list[float] = [1.0]
    apart = math.log(high / low) / 13
    for tick in sorted(TICKS, key=lambda tick: abs(math.log(tick))):
        if low <= tick <= high and all(abs(math.log(tick / other)) > apart for other in chosen):
            chosen.append(tick)
    axes.set_xticks(sorted(chosen))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
