"""The main job on real input: a character-level language model, trained with torch.nn.LSTM and with fastrnn.LSTM.

The text is the Python language reference that every CPython carries. Both models start from the same weights and see
the same batches, one update each in turn, so that the time ratio is a paired one and the loss curves can be compared.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from bench.layers import DisagreementError, load_fastrnn

State = tuple[Tensor, Tensor]

# Two float32 implementations round differently (1e-7), and training multiplies that difference: Adam divides each
# gradient by its own size, so where a gradient is near zero its rounding alone decides the sign of a full-sized step.
# So the curves are held together twice: tightly while the difference is still rounding, then only as two runs of one
# experiment, averaged over a window in which both see the same batches. Measured between two paths of torch's own LSTM
# (with and without oneDNN, 500 updates, two seeds): 2e-7 over the first 12 updates, 0.7% between windows of 20, and
# 3% between single updates late in the run. The tolerances leave room for activations a few ulp apart.
EARLY_UPDATES = 10
EARLY_TOLERANCE = 1e-4  # relative
WINDOW = 20
WINDOW_TOLERANCE = 0.03  # relative
# The first updates also pay for memory pools, threads and lazy initialisation; they are not timed.
UNTIMED_UPDATES = 3


class CurvesError(DisagreementError):
    """The two loss curves are further apart than rounding explains."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the model and of the run; the defaults take about a minute on two cores."""

    embedding_size: int = 64
    hidden_size: int = 256
    num_layers: int = 2
    batch: int = 16  # N streams of text, read in parallel
    steps: int = 64  # T characters an update
    updates: int = 500
    learning_rate: float = 4e-3
    clip: float = 1.0  # largest norm of the gradient
    sample_length: int = 320
    temperature: float = 0.6
    seed: int = 0
    budget: float = 75.0  # seconds; the training ends there even if updates are left

    @classmethod
    def quick(cls) -> Settings:
        """A run of a few seconds, for tests."""
        return cls(embedding_size=16, hidden_size=48, batch=8, steps=24, updates=40, sample_length=80, budget=20.0)


@dataclass
class Result:
    """What `run` measured. Lists have one value an update."""

    settings: dict[str, Any]
    losses: dict[str, list[float]]  # nats per character, by implementation
    seconds: dict[str, list[float]]  # per update, by implementation
    ratio: float  # median over the updates of torch's time over fastrnn's
    total_ratio: float
    sample: str

    @property
    def updates(self) -> int:
        return len(self.losses["torch"])


def load_text() -> str:
    """The topics of Python's ``help()``, in alphabetical order: 465 kB of English about a language."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise RuntimeError(
            "this Python lacks pydoc_data, the text of help(); use a full CPython (Debian: libpython3-stdlib)"
        ) from None
    return "\n".join(topics[name] for name in sorted(topics))


class CharModel(nn.Module):
    """Embedding, stacked LSTM, linear: logits of the next character.

    Parameters
    ----------
    vocabulary : int
        Number of different characters, V.
    lstm_class : type
        ``torch.nn.LSTM`` or a drop-in for it.
    """

    def __init__(self, vocabulary: int, settings: Settings, lstm_class: type[nn.Module] = nn.LSTM) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, settings.embedding_size)
        self.lstm = lstm_class(settings.embedding_size, settings.hidden_size, settings.num_layers)
        self.linear = nn.Linear(settings.hidden_size, vocabulary)

    def forward(self, characters: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Int64 ``[T, N]`` to logits ``[T, N, V]`` and the state to go on from."""
        output, state = self.lstm(self.embedding(characters), state)
        return self.linear(output), state


class Trainer:
    """One model with its optimizer; the state is carried from batch to batch (truncated backpropagation in time)."""

    def __init__(self, model: CharModel, settings: Settings) -> None:
        self.model, self.clip = model, settings.clip
        self.optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
        self.state: State | None = None
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def update(self, batch: Tensor, first: bool) -> None:
        """Train on one batch, int64 ``[T + 1, N]``; ``first``: it starts the text, and the state with it."""
        start = time.perf_counter()
        state = None if first or self.state is None else (self.state[0].detach(), self.state[1].detach())
        self.optimizer.zero_grad()
        logits, self.state = self.model(batch[:-1], state)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())


def batches(text: Tensor, settings: Settings) -> Iterator[tuple[Tensor, bool]]:
    """Endless batches ``[T + 1, N]`` of N parallel streams of the text; true with a batch that starts it anew."""
    length = len(text) // settings.batch
    streams = text[: length * settings.batch].view(settings.batch, length).t()  # [length, N]
    while True:
        for start in range(0, length - settings.steps, settings.steps):
            yield streams[start : start + settings.steps + 1].contiguous(), start == 0


def check_curves(expected: list[float], actual: list[float]) -> None:
    """Compare two loss curves, update by update at first and then by their moving averages.

    Raises
    ------
    CurvesError
        If they are further apart than `EARLY_TOLERANCE` or `WINDOW_TOLERANCE`, or not finite.
    """
    if len(expected) != len(actual):
        raise CurvesError(f"the curves have {len(expected)} and {len(actual)} updates")
    for update, (a, b) in enumerate(zip(expected, actual, strict=True)):
        if not (math.isfinite(a) and math.isfinite(b)):
            raise CurvesError(f"the loss is not finite at update {update}: torch {a}, fastrnn {b}")
        if update < EARLY_UPDATES and abs(a - b) > EARLY_TOLERANCE * a:
            raise CurvesError(f"the losses differ at update {update}: torch {a:.6f}, fastrnn {b:.6f}")
    for end in range(WINDOW, len(expected) + 1):
        a, b = statistics.fmean(expected[end - WINDOW : end]), statistics.fmean(actual[end - WINDOW : end])
        if abs(a - b) > WINDOW_TOLERANCE * a:
            raise CurvesError(
                f"the losses, averaged over the {WINDOW} updates before update {end}, differ by {abs(a - b) / a:.1%} "
                f"(allowed: {WINDOW_TOLERANCE:.0%}): torch {a:.4f}, fastrnn {b:.4f}"
            )


@torch.inference_mode()
def sample(model: CharModel, alphabet: str, settings: Settings, prompt: str = "The ") -> str:
    """Text that continues ``prompt``, a character at a time; the same for equal weights and settings."""
    generator = torch.Generator().manual_seed(settings.seed)
    text, state = prompt, None
    characters = torch.tensor([alphabet.index(character) for character in prompt])[:, None]
    while len(text) < settings.sample_length:
        logits, state = model(characters, state)
        probabilities = (logits[-1] / settings.temperature).softmax(-1)
        characters = torch.multinomial(probabilities, 1, generator=generator)
        text += alphabet[int(characters)]
    return text


def train(trainers: dict[str, Trainer], text: Tensor, settings: Settings, console: Console) -> None:
    """Update all trainers with the same batches, in turn, under a progress bar that shows their losses."""
    columns = (
        TextColumn("training"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    )
    deadline = time.perf_counter() + settings.budget
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=settings.updates, losses="")
        for update, (batch, first) in zip(range(settings.updates), batches(text, settings), strict=False):
            # A B, then B A: neither finds the caches always as the other has left them.
            for trainer in list(trainers.values())[:: 1 if update % 2 == 0 else -1]:
                trainer.update(batch, first)
            losses = "  ".join(f"{name} {trainer.losses[-1]:.3f}" for name, trainer in trainers.items())
            progress.update(task, advance=1, losses=f"loss: {losses}")
            if time.perf_counter() > deadline:
                progress.update(task, total=update + 1)
                break


def run(settings: Settings | None = None, console: Console | None = None) -> Result:
    """Train the model with both implementations, check the curves and sample a text from fastrnn's model.

    Raises
    ------
    CurvesError
        If the loss curves disagree.
    """
    settings, console = settings or Settings(), console or Console()
    text = load_text()
    alphabet = "".join(sorted(set(text)))
    index = {character: number for number, character in enumerate(alphabet)}
    characters = torch.tensor([index[character] for character in text])
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        models = {
            name: CharModel(len(alphabet), settings, lstm_class)
            for name, lstm_class in (("torch", nn.LSTM), ("fastrnn", load_fastrnn().LSTM))
        }
    models["fastrnn"].load_state_dict(models["torch"].state_dict())
    trainers = {name: Trainer(model, settings) for name, model in models.items()}

    console.print(
        f"[bold]Character model[/bold]: {len(text):,} characters of the Python reference, "
        f"{settings.num_layers}-layer LSTM, hidden {settings.hidden_size}, N {settings.batch}, T {settings.steps}, "
        f"{torch.get_num_threads()} threads"
    )
    train(trainers, characters, settings, console)
    losses = {name: trainer.losses for name, trainer in trainers.items()}
    check_curves(losses["torch"], losses["fastrnn"])
    seconds = {name: trainer.seconds for name, trainer in trainers.items()}
    ours, theirs = (seconds[name][UNTIMED_UPDATES:] for name in ("fastrnn", "torch"))
    return Result(
        settings=asdict(settings),
        losses=losses,
        seconds=seconds,
        ratio=statistics.median(a / b for a, b in zip(theirs, ours, strict=True)),
        total_ratio=sum(theirs) / sum(ours),
        sample=sample(models["fastrnn"], alphabet, settings),
    )


def show(result: Result, console: Console) -> None:
    """Print the sampled text, the last losses and the time ratio."""
    last = {name: statistics.fmean(losses[-WINDOW:]) for name, losses in result.losses.items()}
    milliseconds = {name: 1e3 * statistics.median(seconds) for name, seconds in result.seconds.items()}
    console.print("Sampled from the model that fastrnn trained:", style="bold")
    console.print(result.sample, style="cyan", markup=False, highlight=False)
    console.print(
        f"The curves agree: loss after {result.updates} updates torch {last['torch']:.4f}, fastrnn "
        f"{last['fastrnn']:.4f} nats per character."
    )
    console.print(
        f"[bold]An update: torch {milliseconds['torch']:.1f} ms, fastrnn {milliseconds['fastrnn']:.1f} ms: "
        f"{result.ratio:.2f} times as fast[/bold] (median of the paired ratios; by the totals {result.total_ratio:.2f})"
    )
