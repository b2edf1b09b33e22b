"""The named CPU cases: which shapes are timed, and whose work each of them stands for."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

CELLS = ("rnn", "lstm", "gru")
MODES = ("inference", "training")
PEERS = ("onnxruntime", "openvino")  # in inference, float32
GATES = {"rnn": 1, "lstm": 4, "gru": 3}

RESET_PROBABILITY = 0.03


@dataclass(frozen=True)
class Case:
    """One shape of a unidirectional recurrent module.

    Parameters
    ----------
    name : str
        What ``--case`` selects.
    batch, steps, input_size, hidden_size : int
        N, T, I and H.
    work : str
        Whose work the shape stands for.
    ragged : bool
        The rows of the batch have lengths from ``steps`` down to 5% of it (a PackedSequence in torch).
    resets : bool
        A new sequence starts at about 3% of the (t, n), as at the end of an episode.
    stateful : bool
        The initial state is given, as it is when the call continues an earlier one; otherwise it is left to be zeros.
    layers : int
        The module's ``num_layers``.
    """

    name: str
    batch: int
    steps: int
    input_size: int
    hidden_size: int
    work: str
    ragged: bool = False
    resets: bool = False
    stateful: bool = False
    layers: int = 1

    def lengths(self) -> Tensor:
        """Valid steps of each row, int64 ``[N]``, in decreasing order: all T unless the case is ragged."""
        if not self.ragged:
            return torch.full((self.batch,), self.steps)
        return torch.linspace(self.steps, self.steps // 20, self.batch).round().long()

    def reset(self, generator: torch.Generator) -> Tensor:
        """Bool ``[T, N]``: where a new sequence starts. The same for every call with an equally seeded generator."""
        probability = RESET_PROBABILITY if self.resets else 0.0
        return torch.rand(self.steps, self.batch, generator=generator) < probability

    def flops(self, cell: str, mode: str) -> float:
        """Floating-point operations of one call's matrix products (2 a multiply-add, training 3 times inference)."""
        rows = int(self.lengths().sum())
        forward = 2.0 * rows * self.weights(cell)
        return forward * (3.0 if mode == "training" else 1.0)

    def weights(self, cell: str) -> int:
        """Elements of W_ih and W_hh of all layers."""
        inputs = self.input_size + (self.layers - 1) * self.hidden_size
        return GATES[cell] * self.hidden_size * (inputs + self.layers * self.hidden_size)

    def weight_bytes(self, cell: str, mode: str) -> float:
        """Bytes of float32 weights that one call moves at least: W_ih once, W_hh at every step; training reads both
        twice as often, and writes a gradient of each.
        """
        once = 4.0 * self.weights(cell)
        steps = once + 4.0 * (self.steps - 1) * self.layers * GATES[cell] * self.hidden_size**2
        return steps if mode == "inference" else 2 * steps + once

    @property
    def shape(self) -> str:
        """The sizes as one reads them in a table."""
        steps = f"{self.steps}..{self.lengths().min().item()}" if self.ragged else f"{self.steps}"
        layers = f" L{self.layers}" if self.layers > 1 else ""
        return f"N{self.batch} T{steps} I{self.input_size} H{self.hidden_size}{layers}"


def _square(name: str, batch: int, steps: int, hidden_size: int, work: str, **flags: Any) -> Case:
    """A case whose input is as wide as its hidden state, as in every layer of a stack but the first."""
    return Case(f"{name}-{hidden_size}", batch, steps, hidden_size, hidden_size, work, **flags)


CASES: tuple[Case, ...] = (
    *(_square("stream", 1, 1, size, "real-time audio, keyboards, control", stateful=True) for size in (64, 256, 1024)),
    *(_square("online", 1, 128, size, "one utterance at a time") for size in (64, 128, 256, 512)),
    _square("online", 1, 64, 1024, "one utterance at a time"),
    _square("rl", 8, 128, 128, "PPO and R2D2 with done masks", resets=True, stateful=True),
    _square("rl", 16, 128, 256, "PPO and R2D2 with done masks", resets=True, stateful=True),
    Case("series", 32, 100, 1, 32, "time-series forecasting"),
    Case("tagger", 128, 100, 64, 64, "sequence labelling"),
    Case("nlp", 16, 64, 256, 256, "classification, language models"),
    Case("speech", 32, 64, 512, 512, "acoustic models"),
    Case("large", 64, 64, 1024, 1024, "language models"),
    Case("wide", 256, 32, 512, 512, "throughput inference"),
    Case("ragged", 32, 400, 128, 128, "packed sequences", ragged=True),
)


# Shapes that nobody's table has: odd sizes, inputs of another width, long and wide ones.
ODD_CASES: tuple[Case, ...] = (
    Case("odd-1", 1, 1000, 40, 129, "a long sequence"),
    Case("odd-3", 3, 200, 80, 257, "three long sequences"),
    Case("odd-7", 7, 33, 129, 67, "odd sizes"),
    Case("odd-17", 17, 50, 100, 300, "odd sizes"),
    Case("odd-33", 33, 33, 513, 385, "odd sizes"),
    Case("odd-65", 65, 100, 3, 17, "a small hidden state"),
    Case("odd-512", 512, 16, 256, 128, "a wide batch"),
)


# Of which several threads take a layer each, where that is faster than one layer after another.
STACKS: tuple[Case, ...] = (
    _square("stack", 1, 128, 64, "one utterance at a time, two layers", layers=2),
    _square("stack", 4, 128, 128, "a few utterances, two layers", layers=2),
    Case("stack-33", 3, 200, 80, 33, "odd sizes, three layers", layers=3),
    _square("stack", 16, 64, 256, "language models, two layers", layers=2),
)


def every_case() -> tuple[Case, ...]:
    """Those of the table, then the odd ones, then stacks of layers."""
    return CASES + ODD_CASES + STACKS


def select(patterns: list[str] | None) -> list[Case]:
    """The cases whose names match any of the shell patterns (``stream-*``), in the table's order; None: `CASES`.

    Raises
    ------
    ValueError
        If a pattern matches no case; the message lists the names.
    """
    if patterns is None:
        return list(CASES)
    every = every_case()
    for pattern in patterns:
        if not any(fnmatchcase(case.name, pattern) for case in every):
            raise ValueError(f"no case matches {pattern!r}; the cases are {', '.join(case.name for case in every)}")
    return [case for case in every if any(fnmatchcase(case.name, pattern) for pattern in patterns)]
