"""``python -m bench full`` (``make bench-full``): all cases, threads and dtypes, every peer, and the machine's limits.

Beside the rows, what one asks of them: the geometric means over torch.nn and over the best peer, the part of the
machine's limit, what a second thread gives, what lengths and resets cost, and the memory of training.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from bench import cases, report, table
from bench.layers import Row

MEMORY = r"""
import re, sys, torch
torch.manual_seed(0)
library, name = sys.argv[1:3]
batch, steps, inputs, units = map(int, sys.argv[3:])
if library == "fastrnn":
    import fastrnn as nn
else:
    from torch import nn
net, x = getattr(nn, name)(inputs, units), torch.randn(steps, batch, inputs)
net(x[:2])[0].sum().backward()
def peak():
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read()).group(1))
before = peak()
net(x)[0].sum().backward()
print(peak() - before)
"""
MEMORY_CASE = cases.Case("memory", 32, 1000, 128, 128, "a long sequence")


def run(
    total: float, out: Path, patterns: list[str] | None, cells: Sequence[str], console: Console, info: dict[str, Any]
) -> list[Path]:
    """Measure within ``total`` seconds, print, and write ``full.json`` and ``full.md`` to ``out``."""
    chosen = cases.select(patterns) if patterns else cases.every_case()
    threads = sorted({1, info["threads"]})
    # float32 is what the goals are about: five parts of the time
    parts = {"float32": 5 / 6, "bfloat16": 1 / 6}
    rows: list[Row] = []
    for dtype, part in parts.items():
        selection = table.Selection(chosen, cells, cases.MODES, (dtype,), threads, cases.PEERS, against_limits=True)
        rows += table.measure_table(selection, console, total=part * total)
    memory = {name: peak_memory(name) for name in ("RNN", "LSTM", "GRU")} if sys.platform == "linux" else {}
    text = to_markdown(rows, memory, info)
    console.print(Markdown("\n".join(summary(rows, memory))))
    out.mkdir(parents=True, exist_ok=True)
    info = info | {"memory_kib": memory}
    (out / "full.json").write_text(report.to_json(rows, info), encoding="utf-8")
    (out / "full.md").write_text(text, encoding="utf-8")
    return [out / "full.json", out / "full.md"]


def peak_memory(name: str) -> dict[str, int]:
    """KiB that one training step adds to the peak of a process of its own, at `MEMORY_CASE`, by library (Linux)."""
    case = MEMORY_CASE
    sizes = (case.batch, case.steps, case.input_size, case.hidden_size)

    def measure(library: str) -> int:
        command = [sys.executable, "-c", MEMORY, library, name, *map(str, sizes)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=report.ROOT).stdout)

    return {library: measure(library) for library in ("torch", "fastrnn")}


def to_markdown(rows: Sequence[Row], memory: dict[str, dict[str, int]], info: dict[str, Any]) -> str:
    """The summary and every row."""
    lines = [
        *report.heading("fastrnn against its peers and the machine", info),
        "All implementations of a row, and the machine's limits, are timed in turn in one process; ratios are of the "
        "fastest samples, above 1 fastrnn is faster. *Of limit*: the least time of the work, by multiply-adds in "
        "registers or by loads of the weights as measured in the same rounds, over fastrnn's time.",
    ]
    if few := report.few_rounds(rows):
        lines += ["", few]
    lines += ["", *summary(rows, memory)]
    for cell, group in report.by_cell(rows).items():
        lines += ["", f"## {cell.upper()}", "", *report.markdown_table(group)]
    return "\n".join(lines) + "\n"


def summary(rows: Sequence[Row], memory: dict[str, dict[str, int]]) -> list[str]:
    """What one asks of the rows, as Markdown."""
    named = {case.name: case for case in cases.every_case()}
    parts = [means(rows), of_limit(rows, named), costs(rows, named), memory_table(memory)]
    return ["## In short", *(line for part in parts for line in ("", *part))]


def means(rows: Sequence[Row]) -> list[str]:
    """Geometric means over torch.nn and over the best peer, and the cases where one is ahead."""
    lines = [
        "| cell | mode | dtype | threads | over torch.nn | rows below 1 | over the best peer | rows below 1 |",
        "|---|---|---|--:|--:|---|--:|---|",
    ]
    groups: dict[tuple[str, str, str, int], list[Row]] = {}
    for of_cell in report.by_cell(rows).values():
        for row in of_cell:
            groups.setdefault((row.cell, row.mode, row.dtype, row.threads), []).append(row)
    for (cell, mode, dtype, threads), group in groups.items():
        over_torch = _mean_and_below({row.case: row.ratio for row in group})
        peers = mode == "inference" and dtype == "float32"  # all that they do
        over_best = _mean_and_below({row.case: row.best_ratio for row in group}) if peers else " | "
        lines.append(f"| {cell.upper()} | {mode} | {dtype} | {threads} | {over_torch} | {over_best} |")
    return lines


def of_limit(rows: Sequence[Row], named: dict[str, cases.Case]) -> list[str]:
    """The large float32 layers against the machine's multiply-adds."""
    lines = [
        "Multiply-adds of the machine that reach the layer, where N >= 16 and H >= 256 (the goals: 88% in inference, "
        "84% in training), and what a second thread gives beside what it gives to plain multiply-adds:",
        "",
        "| cell | case | mode | of limit, 1 thread | of limit, all threads | GFLOP/s of a core | all threads over 1 |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    fp32 = {(row.cell, row.case, row.mode, row.threads): row for row in rows if row.dtype == "float32"}
    most = max((row.threads for row in rows), default=1)
    for (cell, case, mode, threads), one in fp32.items():
        every = fp32.get((cell, case, mode, most))
        large = named[case].batch >= 16 and named[case].hidden_size >= 256
        if threads != 1 or every is None or one.bound != "multiply-add" or not large:
            continue
        speedup = _seconds(one, "fastrnn") / _seconds(every, "fastrnn")
        machine = (every.flops_per_second or 0) / (one.flops_per_second or 1)
        lines.append(
            f"| {cell.upper()} | {case} | {mode} | {one.limit:.0%} | {every.limit:.0%} "
            f"| {1e-9 * (one.flops_per_second or 0):.0f} | {speedup:.2f} (machine {machine:.2f}) |"
        )
    return lines


def costs(rows: Sequence[Row], named: dict[str, cases.Case]) -> list[str]:
    """A useful step with lengths or resets over one without."""
    lines = [
        "What lengths and resets cost, beside the same call without them:",
        "",
        "| cell | case | mode | dtype | threads | time of a useful step |",
        "|---|---|---|---|--:|--:|",
    ]
    for row in rows:
        plain = _seconds(row, "fastrnn-padded") or _seconds(row, "fastrnn-plain")
        if plain is None:
            continue
        case = named[row.case]
        useful = int(case.lengths().sum()) / (case.steps * case.batch)
        cost = _seconds(row, "fastrnn") / plain / useful
        lines.append(f"| {row.cell.upper()} | {row.case} | {row.mode} | {row.dtype} | {row.threads} | {cost:.2f} |")
    return lines


def memory_table(memory: dict[str, dict[str, int]]) -> list[str]:
    """What `peak_memory` gave, by module."""
    lines = [
        f"Memory that a training step adds to the peak of its process, {MEMORY_CASE.shape}, MiB:",
        "",
        "| module | torch.nn | fastrnn |",
        "|---|--:|--:|",
    ]
    for name, peak in memory.items():
        lines.append(f"| {name} | {peak['torch'] / 1024:.0f} | {peak['fastrnn'] / 1024:.0f} |")
    return lines


def _mean_and_below(ratios: dict[str, float]) -> str:
    """Two entries of a table: the geometric mean, and the cases below 1."""
    below = ", ".join(f"{case} {ratio:.2f}" for case, ratio in ratios.items() if ratio < 1)
    return f"{report.geomean(ratios.values()):.2f} | {below}"


def _seconds(row: Row, variant: str) -> Any:
    return row.seconds[variant]["min"] if variant in row.seconds else None
