"""What the examples share: the command line, the layers of a backend, the training loop, tables and pictures."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: there may be no display

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "examples" / "out"
GALLERY = ROOT / "docs" / "examples"

console = Console()
if not console.is_terminal:  # a file or a pipe has no width of its own
    console = Console(width=110)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every program has; a program adds its own before it calls `parse`.

    Parameters
    ----------
    description : str
        The program's docstring; its first line is shown by ``--help``.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--backend", choices=("fastrnn", "torch"), default="fastrnn", help="whose recurrent layers")
    parser.add_argument("--quick", action="store_true", help="a run of a few seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help="where pictures go (examples/out)")
    parser.add_argument("--gallery", action="store_true", help="also write the pictures that docs/examples shows")
    return parser


def parse(parser: argparse.ArgumentParser, given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, and seed torch and numpy with ``--seed``."""
    options = parser.parse_args(given)
    seed(options.seed)
    return options


def seed(value: int) -> None:
    """Start the random numbers of torch and numpy anew."""
    torch.manual_seed(value)
    np.random.seed(value)


def layers(backend: str) -> ModuleType:
    """The module that has RNN, LSTM and GRU: fastrnn or torch.nn."""
    return fastrnn if backend == "fastrnn" else nn


def run_lengths(module: nn.RNNBase, input: Tensor, lengths: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
    """Run layers over rows of different length; torch.nn's, which know no ``lengths``, on a packed batch.

    Parameters
    ----------
    module : RNN, LSTM or GRU of either backend, with batch_first.
    input : ``[N, T, I]``, padded with anything.
    lengths : int64 ``[N]``, from 1 to T, on the CPU.
    hx : the initial state, as the module takes it.

    Returns
    -------
    output : ``[N, T, D*H]``, zero beyond the lengths.
    hidden : the state after each row's last valid step, ``[L*D, N, H]``; of an LSTM a pair.
    """
    if type(module).__module__.startswith("fastrnn"):
        return module(input, hx, lengths=lengths)
    if bool((lengths == input.size(1)).all()):  # nothing to leave out, and packing is slow
        return module(input, hx)
    packed = pack_padded_sequence(input, lengths, batch_first=True, enforce_sorted=False)
    output, hidden = module(packed, hx)
    return pad_packed_sequence(output, batch_first=True, total_length=input.size(1))[0], hidden


def pad(rows: Sequence[Sequence[int]], value: int = 0) -> tuple[Tensor, Tensor]:
    """Sequences of numbers as int64 ``[N, T]``, filled up with ``value``, and their lengths ``[N]``."""
    lengths = torch.tensor([len(row) for row in rows])
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value), lengths


def parameter_count(model: nn.Module) -> int:
    """Number of trained numbers in a model."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class Timer:
    """``with Timer() as timer``: afterwards ``timer.seconds`` by the wall clock and ``timer.cpu`` of this process."""

    seconds: float
    cpu: float

    def __enter__(self) -> Timer:
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start[0]
        self.cpu = time.process_time() - self._start[1]


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[float], None]]:
    """A progress bar; the block calls what it is given with the loss, once an update."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, loss="")
        yield lambda loss: bar.update(task, advance=1, loss=f"loss {loss:.3f}")


def fit(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    updates: int,
    *,
    learning_rate: float = 3e-3,
    clip: float = 1.0,
    weight_decay: float = 0.0,
    description: str = "training",
) -> list[float]:
    """Train with AdamW, the learning rate rising over the first tenth of the updates and falling to zero by the last.

    Parameters
    ----------
    loss_of : callable
        From the number of the update, 0 and up, to the loss of its batch, a scalar that requires grad.
    clip : float
        Largest norm of the whole gradient: a recurrent network's can be a thousand times its usual size.

    Returns
    -------
    list of float
        The loss of every update.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=max(updates, 10), pct_start=0.1, cycle_momentum=False
    )
    losses = []
    model.train()
    with progress(description, updates) as advance:
        for update in range(updates):
            optimizer.zero_grad()
            loss = loss_of(update)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            advance(losses[-1])
    model.eval()
    return losses


def shuffled_batches(count: int, batch: int) -> Iterator[Tensor]:
    """Endless int64 ``[batch]`` of indices below ``count``: each once, in a new order, then anew."""
    batch = min(batch, count)
    while True:
        yield from torch.randperm(count)[: count // batch * batch].view(-1, batch)


def smooth(values: Sequence[float], window: int = 20) -> list[float]:
    """The mean of each value and those before it, ``window`` of them at the most: a curve that can be read."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()


def show(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table: floats with three digits behind the point, all but the first column to the right."""
    table = Table(box=None)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row))
    console.print(title, style="bold", highlight=False)
    console.print(table)


def save(figure: Figure, name: str, options: argparse.Namespace) -> Path:
    """Write ``name.png`` to ``--out`` and, with ``--gallery``, to docs/examples; the path of the first."""
    figure.set_layout_engine("constrained")
    for folder in [options.out, *([GALLERY] if options.gallery else [])]:
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=110)
        console.print(f"picture: {folder / name}.png", highlight=False, soft_wrap=True)
    plt.close(figure)
    return options.out / f"{name}.png"
