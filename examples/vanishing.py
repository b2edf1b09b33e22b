"""Vanishing gradients: a digit, then noise, then the question; how long do tanh, ReLU, GRU and LSTM remember?"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastrnn
from examples import _common as common
from examples.classify import ROWS, Task, accuracy, digits, majority

HIDDEN = 64
NOISE = 0.1  # standard deviation of the steps behind the digit
BATCH = 64


def identity_rnn() -> nn.RNNBase:
    """A ReLU RNN that begins with keeping what it has: Le, Jaitly and Hinton (2015)."""
    layer = fastrnn.RNN(ROWS, HIDDEN, nonlinearity="relu", batch_first=True)
    parameters = dict(layer.named_parameters())
    nn.init.eye_(parameters["weight_hh_l0"])
    for name in ("bias_ih_l0", "bias_hh_l0"):
        nn.init.zeros_(parameters[name])
    return layer


def remembering_gru(bias: float = 5.0) -> nn.RNNBase:
    """A GRU whose update gate begins open: what ``forget_bias`` is for an LSTM."""
    layer = fastrnn.GRU(ROWS, HIDDEN, batch_first=True)
    parameters = dict(layer.named_parameters())
    for name, value in (("bias_ih_l0", bias), ("bias_hh_l0", 0.0)):
        nn.init.constant_(parameters[name][HIDDEN : 2 * HIDDEN], value)  # gates r, z, n
    return layer


# fastrnn's, also for --backend torch: torch.nn has no arguments for how the weights begin, and takes ours.
LAYERS: dict[str, Callable[[], nn.RNNBase]] = {
    "RNN, tanh": lambda: fastrnn.RNN(ROWS, HIDDEN, batch_first=True),
    "RNN, ReLU": lambda: fastrnn.RNN(ROWS, HIDDEN, nonlinearity="relu", batch_first=True),
    "GRU": lambda: fastrnn.GRU(ROWS, HIDDEN, batch_first=True),
    "LSTM": lambda: fastrnn.LSTM(ROWS, HIDDEN, batch_first=True),
    "RNN, tanh, orthogonal": lambda: fastrnn.RNN(ROWS, HIDDEN, batch_first=True, recurrent_init="orthogonal"),
    "RNN, ReLU, identity": identity_rnn,
    "GRU, update bias 5": remembering_gru,
    "LSTM, forget_bias=1": lambda: fastrnn.LSTM(ROWS, HIDDEN, batch_first=True, forget_bias=1.0),
    "LSTM, forget_bias=5": lambda: fastrnn.LSTM(ROWS, HIDDEN, batch_first=True, forget_bias=5.0),
}
# Of one family one colour; pale as torch.nn begins, strong where the beginning was chosen.
PALETTE = ("#e6a5a7", "#f2cf9d", "#a5d3b4", "#9cc3e6", "#c0282d", "#e08a1e", "#3a9a5b", "#2a78b5", "#123f66")
COLOURS = dict(zip(LAYERS, PALETTE, strict=True))


class LastState(nn.Module):
    """A layer and a linear layer on its last output."""

    def __init__(self, layer: nn.RNNBase, classes: int = 10) -> None:
        super().__init__()
        self.layer = layer
        self.linear = nn.Linear(layer.hidden_size, classes)

    def forward(self, input: Tensor) -> Tensor:
        """``[N, T, I]`` to logits ``[N, classes]``."""
        return self.linear(self.layer(input)[0][:, -1])


def make(name: str, backend: str) -> LastState:
    """A new model of the family ``name``, with the same weights on both backends."""
    model = LastState(LAYERS[name]())
    if backend == "torch":
        fastrnn.to_torch(model)
    return model


def delayed(images: Tensor, delay: int) -> Tensor:
    """Pictures ``[N, 8, 8]``, one row a step, with ``delay`` steps of noise behind them: ``[N, 8 + delay, 8]``."""
    return torch.cat([images, NOISE * torch.randn(len(images), delay, ROWS)], 1)


def gradient_norms(model: LastState, input: Tensor, classes: Tensor) -> Tensor:
    """How much the state after each step matters to the loss: the norm of d loss / d h_t, for an LSTM of (h_t, c_t).

    The layer is called once a step: within a call of a whole sequence the states are its own affair, and ``output``
    has the gradient of what reads it, not of the steps that follow.

    Returns
    -------
    Tensor
        ``[T]``: the root of the mean over the batch of the squared norms, times N, which the mean loss divides by.
    """
    state: Any = None
    states: list[tuple[Tensor, ...]] = []
    for step in input.unbind(1):
        _, state = model.layer(step[:, None], state)
        states.append(state if isinstance(state, tuple) else (state,))
        for part in states[-1]:
            part.retain_grad()
    loss = nn.functional.cross_entropy(model.linear(states[-1][0][0]), classes)
    loss.backward()
    model.zero_grad()
    # The c of the last step is read by nothing.
    squares = [sum(part.grad.square().sum() for part in parts if part.grad is not None) for parts in states]
    return (torch.as_tensor(squares) * len(input)).sqrt()


def train(model: LastState, task: Task, delay: int, updates: int, description: str) -> float:
    """Train with noise that is new in every batch; the accuracy on the test part."""
    data, _, classes = task.train
    batches = common.shuffled_batches(len(data), BATCH)

    def loss_of(_: int) -> Tensor:
        rows = next(batches)
        return nn.functional.cross_entropy(model(delayed(data[rows], delay)), classes[rows])

    common.fit(model, loss_of, updates, description=description)
    with torch.inference_mode():
        return accuracy(model(delayed(task.test[0], delay)).argmax(1), task.test[2])


def draw(accuracies: dict[str, list[float]], delays: Sequence[int], norms: dict[str, Tensor], chance: float) -> Figure:
    """The accuracy by the delay, and the gradient's norm by the distance from the loss."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4))
    for name, values in accuracies.items():
        left.plot(delays, values, "o-", color=COLOURS[name], label=name)
        # Relative to the last step's, so that only the way back is compared; zeros have no logarithm.
        relative = (norms[name] / norms[name][-1]).clamp(min=1e-30).flip(0)
        right.semilogy(relative, color=COLOURS[name])
    left.axhline(chance, color="#888888", linestyle=":", label="majority class")
    left.set(title="what is remembered", xlabel="steps of noise behind the digit", ylabel="accuracy", ylim=(0, 1.02))
    right.set(
        title=f"gradient of new models, {delays[-1]} steps of noise",
        xlabel="steps back from the loss",
        ylabel="norm, last step = 1",
        ylim=(1e-12, 1e3),
    )
    for panel in (left, right):
        panel.grid(color="#dddddd")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return figure


def run(options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """The accuracies by delay and the gradient norms of the longest one, both by family."""
    task = digits()
    delays, updates = ([10, 60], 60) if options.quick else ([0, 25, 75, 200], 600)
    names = ["RNN, tanh", "LSTM, forget_bias=5"] if options.quick else list(LAYERS)
    accuracies: dict[str, list[float]] = {name: [] for name in names}
    norms = {}
    with common.Timer() as timer:
        for name in names:
            common.seed(options.seed)
            images, _, classes = (part[:BATCH] for part in task.test)
            norms[name] = gradient_norms(make(name, options.backend), delayed(images, delays[-1]), classes)
            for delay in delays:
                common.seed(options.seed)
                model = make(name, options.backend)
                accuracies[name].append(train(model, task, delay, updates, f"{name}, {delay}"))
    common.show(
        f"accuracy by the steps of noise, and the gradient at the digit's last row for {delays[-1]}; "
        f"{updates} updates each, {timer.cpu:.0f} s of CPU time",
        ["layer", *map(str, delays), "gradient"],
        # What is left of the gradient where the digit's last row was read.
        [[name, *values, f"{norms[name][ROWS - 1] / norms[name][-1]:.0e}"] for name, values in accuracies.items()],
    )
    chance = majority(task.train[2], task.test[2])
    common.save(draw(accuracies, delays, norms, chance), "vanishing", options)
    return accuracies, norms


def main(given: Sequence[str] | None = None) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    return run(common.parse(common.arguments(__doc__), given))


if __name__ == "__main__":
    main()
