"""The layer table: every selected row measured in turn under a progress bar, and printed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import layers, report
from bench.cases import CASES, CELLS, MODES, Case
from bench.layers import Row

# How many times its share of the remaining time a row may take to make its five rounds, before fewer must do.
OVERRUN = 3.0


@dataclass
class Selection:
    """Which rows to measure: the product of all that is listed. A thread count of 0 stands for all threads."""

    cases: Sequence[Case] = CASES
    cells: Sequence[str] = CELLS
    modes: Sequence[str] = MODES
    dtypes: Sequence[str] = ("float32",)
    threads: Sequence[int] = (0,)
    peers: Sequence[str] = field(default_factory=tuple)
    against_limits: bool = False
    session: bool = False

    def rows(self) -> list[tuple[Case, str, str, str, int]]:
        """Case, cell, mode, dtype and threads of each row, the most work first."""
        rows = list(product(self.cases, self.cells, self.modes, self.dtypes, self.threads))
        return sorted(rows, key=lambda row: -row[0].flops(row[1], row[2]))


def measure_table(
    selection: Selection, console: Console, *, budget: float = 1.0, total: float | None = None
) -> list[Row]:
    """Measure all rows of the selection.

    Parameters
    ----------
    budget : float
        Seconds for each row, unless ``total`` is given.
    total : float, optional
        Seconds for the table. Each row gets an equal share of what is left; the longest rows come first, so that what
        they take beyond their share is known when the many short ones share the rest.
    """
    planned = selection.rows()
    deadline = time.perf_counter() + (total or 0.0)
    measured = []
    columns = (
        TextColumn("timing"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[row]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(planned), row="")
        for done, (case, cell, mode, dtype, threads) in enumerate(planned):
            progress.update(task, completed=done, row=f"{cell} {case.name} {mode}")
            limit = math.inf
            if total is not None:
                budget = max(0.0, deadline - time.perf_counter()) / (len(planned) - done)
                limit = OVERRUN * budget
            measured.append(
                layers.measure(
                    case,
                    cell,
                    mode,
                    dtype=dtype,
                    thread_count=threads,
                    peers=selection.peers,
                    session=selection.session,
                    budget=budget,
                    limit=limit,
                    against_limits=selection.against_limits,
                )
            )
        progress.update(task, completed=len(planned), row="")
    return measured


def show(rows: Sequence[Row], console: Console) -> None:
    """Print one table a cell with its geometric mean; what is slower than torch.nn is red and marked."""
    # What is the same in all rows is in the title: a table should fit a terminal.
    varied = [name for name in ("dtype", "threads") if len({getattr(row, name) for row in rows}) > 1]
    for cell, group in report.by_cell(rows).items():
        fixed = "" if varied else f", {group[0].dtype}, {group[0].threads} threads"
        table = Table(title=cell.upper() + fixed)
        for name in ("case", "shape", "mode", *varied):
            table.add_column(name, no_wrap=True)
        with_limit = ("of limit",) if any(row.limit for row in group) else ()
        for name in ("torch ms", "fastrnn ms", "ratio", "paired", "rounds", *with_limit):
            table.add_column(name, justify="right", no_wrap=True, min_width=6)
        for row in group:
            labels = (row.case, row.shape, row.mode, *(str(getattr(row, name)) for name in varied))
            mark = " ▼" if row.regression else "  "
            numbers = (_milliseconds(row, "torch"), _milliseconds(row, "fastrnn"), f"{row.ratio:.2f}{mark}")
            style = "bold red" if row.regression else None
            share = (f"{row.limit:.0%}" if row.limit else "",) if with_limit else ()
            table.add_row(*labels, *numbers, f"{row.median_ratio:.2f}", str(row.rounds), *share, style=style)
            for name, ratio in row.peer_ratios.items():
                blanks = ("",) * (1 + len(varied))
                table.add_row("", f"  {name}", *blanks, _milliseconds(row, name), "", f"{ratio:.2f}  ", style="dim")
        console.print(table)
    if few := report.few_rounds(rows):
        console.print(few)
    console.print("Ratio: time of torch.nn over time of fastrnn; above 1, fastrnn is faster.", style="dim")
    for cell, means in report.summary(rows).items():
        modes = ", ".join(f"{mode} {means[mode]:.2f}" for mode in MODES if mode in means)
        slower = f"; [bold red]{means['regressions']} slower rows[/bold red]" if means["regressions"] else ""
        console.print(f"[bold]{cell.upper():5} geomean {means['all']:.2f}[/bold] ({modes}){slower}")


def _milliseconds(row: Row, name: str) -> str:
    """A variant's fastest call, with four digits."""
    return f"{1e3 * row.seconds[name]['min']:.4g}"
