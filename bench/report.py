"""What is kept of a run: JSON for programs, a Markdown table for readers, and the summary that both carry."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench import charlm
from bench.cases import CELLS, MODES, every_case
from bench.layers import Row, load_fastrnn
from bench.timing import MIN_ROUNDS

ROOT = Path(__file__).resolve().parent.parent
OUT = Path(__file__).resolve().parent / "out"


def machine() -> dict[str, Any]:
    """What the numbers depend on besides the code timed: processor, versions, threads, and when and at which commit."""
    fastrnn = load_fastrnn()
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # of the last minute, in processes
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastrnn": getattr(fastrnn, "__version__", "unknown"),
        "build_info": fastrnn.build_info(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
    }


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the checkout, ``-dirty`` if it was changed since; ``unknown`` outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def geomean(ratios: Iterable[float]) -> float:
    """Geometric mean, the mean in which a ratio of 2 and one of 1/2 cancel; NaN of nothing."""
    logarithms = [math.log(ratio) for ratio in ratios]
    return math.exp(math.fsum(logarithms) / len(logarithms)) if logarithms else math.nan


def by_cell(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each cell that has any, each list in the order of the table of cases."""
    order = {case.name: position for position, case in enumerate(every_case())}
    cells = {cell: [row for row in rows if row.cell == cell] for cell in CELLS}
    for group in cells.values():
        group.sort(key=lambda row: (row.dtype, -row.threads, order.get(row.case, len(order)), MODES.index(row.mode)))
    return {cell: group for cell, group in cells.items() if group}


def summary(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Per cell the geometric mean of the ratios: of all rows and of each mode, and the number of regressions."""
    result = {}
    for cell, group in by_cell(rows).items():
        modes = [mode for mode in MODES if any(row.mode == mode for row in group)]
        result[cell] = {
            "all": geomean(row.ratio for row in group),
            **{mode: geomean(row.ratio for row in group if row.mode == mode) for mode in modes},
            "regressions": sum(row.regression for row in group),
        }
    return result


def describe_peers(row: Row) -> str:
    """The other variants' ratios in one cell of a table."""
    return ", ".join(f"{name} {ratio:.2f}" for name, ratio in row.peer_ratios.items())


def heading(title: str, info: dict[str, Any]) -> list[str]:
    """The first lines of a report: its title, and what the numbers depend on."""
    return [
        f"# {title}",
        "",
        f"{info['cpu']}, {info['cores']} cores, {info['cpu_capability']}; torch {info['torch']}, fastrnn "
        f"{info['fastrnn']} (commit {info['commit']}), Python {info['python']}; {info['date']}.",
        "",
    ]


def few_rounds(rows: Sequence[Row]) -> str:
    """A sentence on the rows that had too little time; empty if none."""
    few = sum(row.rounds < MIN_ROUNDS for row in rows)
    sentence = f"{few} rows had time for fewer than {MIN_ROUNDS} rounds: do not rely on them, or on the geomeans."
    return sentence if few else ""


def to_json(rows: Sequence[Row], info: dict[str, Any], language_model: charlm.Result | None = None) -> str:
    """Everything measured, samples of the language model included. Times are in seconds per call."""
    document = {
        "machine": info,
        "summary": summary(rows),
        "charlm": asdict(language_model) if language_model else None,
        "rows": [asdict(row) for row in rows],
    }
    return json.dumps(document, indent=1)


def to_markdown(rows: Sequence[Row], info: dict[str, Any], language_model: charlm.Result | None = None) -> str:
    """The table as one reads it; rows in which fastrnn is the slower one are set in bold and marked."""
    lines = [
        *heading("fastrnn against torch.nn", info),
        "Ratio: time of torch.nn over time of fastrnn, fastest samples, both timed in turn in one process; above 1, "
        "fastrnn is faster. *Paired*: the median over the rounds. ▼ marks what is slower than torch.nn.",
    ]
    if few := few_rounds(rows):
        lines += ["", few]
    if language_model:
        lines += [
            "",
            "## Training a character-level language model",
            "",
            f"{language_model.updates} updates: **{language_model.ratio:.2f} times as fast** as with torch.nn.LSTM "
            f"(median of the paired ratios; {language_model.total_ratio:.2f} by the totals), same loss curve.",
        ]
    lines += [
        "",
        "## Layers",
        "",
        "| cell | geomean | " + " | ".join(MODES) + " | slower rows |",
        "|---|---|---|---|---|",
    ]
    for cell, means in summary(rows).items():
        modes = " | ".join(f"{means[mode]:.2f}" if mode in means else "" for mode in MODES)
        lines.append(f"| {cell.upper()} | **{means['all']:.2f}** | {modes} | {means['regressions']} |")
    for cell, group in by_cell(rows).items():
        lines += ["", f"### {cell.upper()}", "", *markdown_table(group)]
    return "\n".join(lines) + "\n"


def markdown_table(group: Sequence[Row]) -> list[str]:
    words = ["case", "shape", "mode", "dtype"]
    numbers = ["threads", "torch ms", "fastrnn ms", "ratio", "paired", "rounds"]
    if with_limit := any(row.limit for row in group):
        numbers.append("of limit")
    lines = [
        f"| {' | '.join([*words, *numbers])} | others over fastrnn |",
        "|---" * len(words) + "|--:" * len(numbers) + "|---|",
    ]
    for row in group:
        times = " | ".join(f"{1e3 * row.seconds[name]['min']:.4g}" for name in ("torch", "fastrnn"))
        ratio = f"**{row.ratio:.2f} ▼**" if row.regression else f"{row.ratio:.2f}"
        share = f"{row.limit:.0%} ({row.bound}) | " if row.limit else " | " * with_limit
        lines.append(
            f"| {row.case} | {row.shape} | {row.mode} | {row.dtype} | {row.threads} | {times} | {ratio} | "
            f"{row.median_ratio:.2f} | {row.rounds} | {share}{describe_peers(row)} |"
        )
    return lines


def write(
    rows: Sequence[Row], info: dict[str, Any], language_model: charlm.Result | None = None, folder: Path = OUT
) -> list[Path]:
    """Write ``results.json``, ``results.md`` and ``ratios.png``, and return their paths."""
    from bench import plot

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(to_json(rows, info, language_model), encoding="utf-8")
    (folder / "results.md").write_text(to_markdown(rows, info, language_model), encoding="utf-8")
    plot.plot_ratios(rows, info, folder / "ratios.png")
    return [folder / name for name in ("results.json", "results.md", "ratios.png")]
