"""Keras' SimpleRNN, LSTM and GRU as tutorials use them, each with its equivalent in fastrnn, on the same weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")  # before the import: Keras then takes and gives torch tensors

import keras
import numpy as np
import torch
from keras.layers import GRU, LSTM, Bidirectional, SimpleRNN
from torch import Tensor

import fastrnn
from examples._common import arguments, parse, show
from examples._keras_weights import NoEquivalentError, from_keras

# Odd ones: what swaps two dimensions or takes a vector's width for granted is found.
BATCH, STEPS, INPUTS, UNITS = 3, 11, 5, 17
LENGTHS = [7, 11, 1]  # of the three rows, where some are padded

Pair = tuple[Any, Any]  # what Keras returns and what fastrnn returns: tensors, or lists of them


def trained(layer: Any, x: Tensor, seed: int = 0) -> Any:
    """The layer with random weights, as if trained; Keras begins with biases of zero, which would hide mistakes."""
    generator = np.random.default_rng(seed)
    if not layer.built:
        layer.build(x.shape)
    layer.set_weights([generator.uniform(-0.5, 0.5, weight.shape) for weight in layer.get_weights()])
    return layer


# --- Each snippet: Keras first, then fastrnn; x is [N, T, I] ----------------------------------------------------------


def simple_rnn(x: Tensor) -> Pair:
    """SimpleRNN: the last output."""
    layer = trained(SimpleRNN(UNITS), x)
    theirs = layer(x)

    rnn = from_keras(layer)
    output, _ = rnn(x)
    return theirs, output[:, -1]


def simple_rnn_relu(x: Tensor) -> Pair:
    """SimpleRNN, relu, no bias, return_sequences."""
    layer = trained(SimpleRNN(UNITS, activation="relu", use_bias=False, return_sequences=True), x)
    theirs = layer(x)

    rnn = from_keras(layer)  # fastrnn.RNN(5, 17, nonlinearity="relu", bias=False, batch_first=True)
    output, _ = rnn(x)
    return theirs, output


def lstm_last(x: Tensor) -> Pair:
    """LSTM: the last output."""
    layer = trained(LSTM(UNITS), x)
    theirs = layer(x)

    lstm = from_keras(layer)
    _, (h_n, _) = lstm(x)
    return theirs, h_n[-1]  # or output[:, -1] of the first result


def lstm_sequences_and_state(x: Tensor) -> Pair:
    """LSTM, return_sequences, return_state."""
    layer = trained(LSTM(UNITS, return_sequences=True, return_state=True), x)
    whole_sequence, state_h, state_c = layer(x)

    lstm = from_keras(layer)
    output, (h_n, c_n) = lstm(x)
    return [whole_sequence, state_h, state_c], [output, h_n[0], c_n[0]]


def gru_sequences_and_state(x: Tensor) -> Pair:
    """GRU, return_sequences, return_state."""
    layer = trained(GRU(UNITS, return_sequences=True, return_state=True), x)
    whole_sequence, state = layer(x)

    gru = from_keras(layer)
    output, h_n = gru(x)
    return [whole_sequence, state], [output, h_n[0]]


def encoder_decoder(x: Tensor) -> Pair:
    """An encoder's state as the decoder's initial_state."""
    encoder = trained(LSTM(UNITS, return_state=True), x)
    decoder = trained(LSTM(UNITS, return_sequences=True), x, seed=1)
    _, *state = encoder(x)
    theirs = decoder(x.flip(1), initial_state=state)

    _, state = from_keras(encoder)(x)
    output, _ = from_keras(decoder)(x.flip(1), state)
    return theirs, output


def bidirectional_sequences(x: Tensor) -> Pair:
    """Bidirectional LSTM, return_sequences."""
    layer = trained(Bidirectional(LSTM(UNITS, return_sequences=True)), x)
    theirs = layer(x)

    lstm = from_keras(layer)
    output, _ = lstm(x)
    return theirs, output


def bidirectional_last(x: Tensor) -> Pair:
    """Bidirectional GRU: the last output of each direction."""
    layer = trained(Bidirectional(GRU(UNITS)), x)
    theirs = layer(x)

    gru = from_keras(layer)
    _, h_n = gru(x)
    return theirs, torch.cat([h_n[0], h_n[1]], dim=-1)  # not output[:, -1]: there the reverse begins


def bidirectional_sum(x: Tensor) -> Pair:
    """Bidirectional SimpleRNN, merge_mode="sum"."""
    layer = trained(Bidirectional(SimpleRNN(UNITS, return_sequences=True), merge_mode="sum"), x)
    theirs = layer(x)

    rnn = from_keras(layer)
    output, _ = rnn(x)
    return theirs, output.unflatten(-1, (2, UNITS)).sum(-2)  # "ave": mean, "mul": prod, None: unbind


def stacked(x: Tensor) -> Pair:
    """Two LSTM layers, stacked."""
    model = keras.Sequential([LSTM(UNITS, return_sequences=True), LSTM(UNITS)])
    theirs = trained(model, x)(x)

    lstm = from_keras(model.layers)  # fastrnn.LSTM(5, 17, num_layers=2, batch_first=True)
    output, _ = lstm(x)
    return theirs, output[:, -1]


def stacked_bidirectional(x: Tensor) -> Pair:
    """Three Bidirectional GRU layers, stacked."""
    model = keras.Sequential([Bidirectional(GRU(UNITS, return_sequences=True)) for _ in range(3)])
    theirs = trained(model, x)(x)

    gru = from_keras(model.layers)
    output, _ = gru(x)
    return theirs, output


def mask(x: Tensor) -> Pair:
    """Bidirectional LSTM with a mask: rows of different length."""
    lengths = torch.tensor(LENGTHS)
    layer = trained(Bidirectional(LSTM(UNITS, return_sequences=True, return_state=True, zero_output_for_mask=True)), x)
    sequences, *states = layer(x, mask=torch.arange(STEPS) < lengths[:, None])

    lstm = from_keras(layer)
    output, (h_n, c_n) = lstm(x, lengths=lengths)  # zero_output_for_mask is what fastrnn always does
    return [sequences, *states], [output, h_n[0], c_n[0], h_n[1], c_n[1]]


def stateful(x: Tensor) -> Pair:
    """GRU, stateful: a long sequence in two calls."""
    layer = trained(GRU(UNITS, return_sequences=True, stateful=True), x)
    theirs = [layer(x[:, :4]), layer(x[:, 4:])]

    gru = from_keras(layer)
    first, state = gru(x[:, :4])
    second, state = gru(x[:, 4:], state)
    return theirs, [first, second]


def go_backwards(x: Tensor) -> Pair:
    """LSTM, go_backwards."""
    layer = trained(LSTM(UNITS, return_sequences=True, go_backwards=True), x)
    theirs = layer(x)

    lstm = from_keras(layer)
    output, _ = lstm(x.flip(1))
    return theirs, output


SNIPPETS: tuple[Callable[[Tensor], Pair], ...] = (
    simple_rnn,
    simple_rnn_relu,
    lstm_last,
    lstm_sequences_and_state,
    gru_sequences_and_state,
    encoder_decoder,
    bidirectional_sequences,
    bidirectional_last,
    bidirectional_sum,
    stacked,
    stacked_bidirectional,
    mask,
    stateful,
    go_backwards,
)

NO_EQUIVALENT: tuple[Callable[[], Any], ...] = (
    lambda: GRU(UNITS, reset_after=False),
    lambda: LSTM(UNITS, recurrent_dropout=0.2),
    lambda: LSTM(UNITS, dropout=0.2),
    lambda: LSTM(UNITS, activation="relu"),
    lambda: GRU(UNITS, recurrent_activation="hard_sigmoid"),
    lambda: keras.layers.ConvLSTM1D(UNITS, 3),
)


# --- The program ------------------------------------------------------------------------------------------------------


def both(snippet: Callable[[Tensor], Pair]) -> tuple[list[Tensor], list[Tensor]]:
    """What Keras and fastrnn return, float32: Keras multiplies no matrices in float64, whatever its dtype policy."""
    x = torch.randn(BATCH, STEPS, INPUTS, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs, ours = snippet(x)
    return _as_list(theirs), _as_list(ours)


def _as_list(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def difference(snippet: Callable[[Tensor], Pair]) -> float:
    """The largest one between Keras and fastrnn."""
    return max((theirs - ours).abs().max().item() for theirs, ours in zip(*both(snippet), strict=True))


def refusal(make: Callable[[], Any]) -> str:
    """Why a layer is not converted."""
    try:
        from_keras(make())
    except NoEquivalentError as error:
        return str(error)
    raise AssertionError("it was converted")


def main(given: Sequence[str] | None = None) -> None:
    parse(arguments(__doc__), given)  # nothing to choose: the run takes no time
    show(
        f"Keras {keras.__version__} ({keras.backend.backend()}) and fastrnn {fastrnn.__version__}, float32",
        ("Keras", "values", "largest difference"),
        (
            (snippet.__doc__, sum(value.numel() for value in both(snippet)[1]), f"{difference(snippet):.1e}")
            for snippet in SNIPPETS
        ),
    )
    show("No equivalent", ("Keras: why not",), ([refusal(make)] for make in NO_EQUIVALENT))


if __name__ == "__main__":
    main()
