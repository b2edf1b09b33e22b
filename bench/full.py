"""``python -m bench full`` (``make bench-full``): all cases, threads and dtypes, every peer, and the machine's limits.

Beside the rows, what one asks of them: the geometric means over torch.nn and over the best peer, the part of the
machine's limit, what a second thread gives, what lengths and resets cost, and the memory of training.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from bench import cases, report, table, timing
from bench.layers import Row

MEMORY = r"""
import re, sys, torch
torch.manual_seed(0)
library, name, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
if library == "fastrnn":
    import fastrnn as nn
else:
    from torch import nn
net, x = getattr(nn, name)(128, 128), torch.randn(steps, 32, 128)
net(x[:2])[0].sum().backward()
def peak():
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read()).group(1))
before = peak()
net(x)[0].sum().backward()
print(peak() - before)
"""
MEMORY_SHAPE = "N32 T1000 I128 H128"


def run(
    total: float, out: Path, patterns: list[str] | None, cells: Sequence[str], console: Console, info: dict[str, Any]
) -> list[Path]:
    """Measure within ``total`` seconds, print, and write ``full.json`` and ``full.md`` to ``out``."""
    chosen = cases.select(patterns) if patterns else [*cases.CASES, *cases.ODD_CASES]
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
    """KiB that one training step adds to the peak of a process of its own, at `MEMORY_SHAPE`, by library (Linux)."""

    def measure(library: str) -> int:
        command = [sys.executable, "-c", MEMORY, library, name, MEMORY_SHAPE.split()[1][1:]]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=report.ROOT).stdout)

    return {library: measure(library) for library in ("torch", "fastrnn")}


def to_markdown(rows: Sequence[Row], memory: dict[str, dict[str, int]], info: dict[str, Any]) -> str:
    """The summary and every row."""
    lines = [
        "# fastrnn against its peers and the machine",
        "",
        f"{info['cpu']}, {info['cores']} cores, {info['cpu_capability']}; torch {info['torch']}, fastrnn "
        f"{info['fastrnn']} (commit {info['commit']}), Python {info['python']}; {info['date']}.",
        "",
        "All implementations of a row, and the machine's limits, are timed in turn in one process; ratios are of the "
        "fastest samples, above 1 fastrnn is faster. *Of limit*: the least time of the work, by multiply-adds in "
        "registers or by loads of the weights as measured in the same rounds, over fastrnn's time.",
    ]
    if few := sum(row.rounds < timing.MIN_ROUNDS for row in rows):
        lines += ["", f"{few} rows had time for fewer than {timing.MIN_ROUNDS} rounds: do not rely on them."]
    lines += ["", *summary(rows, memory)]
    for cell, group in report.by_cell(rows).items():
        lines += ["", f"## {cell.upper()}", "", *report.markdown_table(group)]
    return "\n".join(lines) + "\n"


def summary(rows: Sequence[Row], memory: dict[str, dict[str, int]]) -> list[str]:
    """What one asks of the rows, as Markdown."""
    lines = [
        "## In short",
        "",
        "| cell | mode | dtype | threads | over torch.nn | rows below 1 | over the best peer | rows below 1 |",
        "|---|---|---|--:|--:|---|--:|---|",
    ]
    for group in _groups(rows):
        first = group[0]
        peers = first.mode == "inference" and first.dtype == "float32"
        best = f"{report.geomean(row.best_ratio for row in group):.2f}" if peers else ""
        lines.append(
            f"| {first.cell.upper()} | {first.mode} | {first.dtype} | {first.threads} "
            f"| {report.geomean(row.ratio for row in group):.2f} | {_below((row.case, row.ratio) for row in group)} "
            f"| {best} | {_below((row.case, row.best_ratio) for row in group) if peers else ''} |"
        )
    lines += [
        "",
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
        if threads != 1 or every is None or one.bound != "multiply-add" or not _is_large(case):
            continue
        speedup = _seconds(one, "fastrnn") / _seconds(every, "fastrnn")
        machine = (every.flops_per_second or 0) / (one.flops_per_second or 1)
        lines.append(
            f"| {cell.upper()} | {case} | {mode} | {one.limit:.0%} | {every.limit:.0%} "
            f"| {1e-9 * (one.flops_per_second or 0):.0f} | {speedup:.2f} (machine {machine:.2f}) |"
        )
    lines += ["", "What lengths and resets cost, beside the same call without them:", ""]
    lines += ["| cell | case | mode | dtype | threads | time of a useful step |", "|---|---|---|---|--:|--:|"]
    named = {case.name: case for case in cases.CASES}
    for row in rows:
        plain = _seconds(row, "fastrnn-padded") or _seconds(row, "fastrnn-plain")
        if plain is None:
            continue
        case = named[row.case]
        useful = int(case.lengths().sum()) / (case.steps * case.batch)
        cost = _seconds(row, "fastrnn") / plain / useful
        lines.append(f"| {row.cell.upper()} | {row.case} | {row.mode} | {row.dtype} | {row.threads} | {cost:.2f} |")
    lines += ["", f"Memory that a training step adds to the peak of its process, {MEMORY_SHAPE}, MiB:", ""]
    lines += ["| module | torch.nn | fastrnn |", "|---|--:|--:|"]
    for name, peak in memory.items():
        lines.append(f"| {name} | {peak['torch'] / 1024:.0f} | {peak['fastrnn'] / 1024:.0f} |")
    return lines


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    groups: dict[tuple[str, str, str, int], list[Row]] = {}
    for group in report.by_cell(rows).values():
        for row in group:
            groups.setdefault((row.cell, row.dtype, row.mode, row.threads), []).append(row)
    return list(groups.values())


def _below(ratios: Iterable[tuple[str, float]]) -> str:
    return ", ".join(f"{case} {ratio:.2f}" for case, ratio in ratios if ratio < 1)


def _is_large(name: str) -> bool:
    case = next(case for case in (*cases.CASES, *cases.ODD_CASES) if case.name == name)
    return case.batch >= 16 and case.hidden_size >= 256


def _seconds(row: Row, variant: str) -> Any:
    return row.seconds[variant]["min"] if variant in row.seconds else None
