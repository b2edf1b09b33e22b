"""A plot of a GPU's results: how many times as fast as cuDNN each case is, as called and in a graph.

python -m bench.gpu_plot bench/results/gpu-h200.json docs/gpu.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

from bench.report import geomean


def draw(report: dict[str, Any], to: Path) -> None:
    """One row of dots for each cell, dtype and mode; the line is where cuDNN is as fast."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        if row.get("ratio"):
            groups.setdefault(f"{row['cell'].upper()} {row['dtype']} {row['mode']}", []).append(row)
    figure, axes = plt.subplots(figsize=(9, 0.32 * len(groups) + 1.4), layout="constrained")
    for place, rows in enumerate(groups.values()):
        for key, marker, label in (("ratio", "o", "as called"), ("graph_ratio", "|", "in a CUDA graph")):
            ratios = [row[key] for row in rows if row[key]]
            axes.plot(
                ratios,
                [place] * len(ratios),
                marker,
                color="tab:blue" if key == "ratio" else "tab:orange",
                alpha=0.7,
                label=label if place == 0 else None,
            )
        axes.text(0.62, place, f"{geomean([row['ratio'] for row in rows]):.2f}", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.6, 18)
    axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.set_yticks(range(len(groups)), list(groups), fontsize=8)
    axes.invert_yaxis()
    device = report["stages"]["environment"]["detail"]
    axes.set_title(
        f"{device['device']}: time of cuDNN {device['cudnn']} over time of fastrnn (left: geomean)", fontsize=10
    )
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(to, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="gpu_check.json of a run")
    parser.add_argument("to", type=Path, help="the picture, by its suffix PNG, SVG or PDF")
    arguments = parser.parse_args()
    draw(json.loads(arguments.results.read_text(encoding="utf-8")), arguments.to)
