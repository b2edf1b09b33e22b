"""Keras' recurrent layers as fastrnn's: the weights moved, and nothing converted in silence that would differ.

Keras keeps ``kernel [I, G*H]``, ``recurrent_kernel [H, G*H]`` and ``bias``; torch keeps the transposes and two biases.

====== ================ ================ ============================= =====================================
layer  gates of Keras   gates of torch   bias of Keras                 biases of torch
====== ================ ================ ============================= =====================================
RNN    one              one              ``[H]``                       it, and zeros
LSTM   i, f, c, o       i, f, g, o       ``[4H]``                      it, and zeros (only the sum matters)
GRU    z, r, h          r, z, n          ``[2, 3H]``: input, state     both (the reset gate multiplies one)
====== ================ ================ ============================= =====================================

Nothing here imports Keras: it takes layers of any of its backends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastrnn

MODULES: dict[str, Any] = {"SimpleRNN": fastrnn.RNN, "LSTM": fastrnn.LSTM, "GRU": fastrnn.GRU}
# Which place each gate of torch has in Keras. It is its own inverse: r and z change places.
GATES = {"SimpleRNN": [0], "LSTM": [0, 1, 2, 3], "GRU": [1, 0, 2]}


class NoEquivalentError(ValueError):
    """The layer computes something that no module of torch.nn or fastrnn does."""


def reorder(weight: np.ndarray, kind: str) -> np.ndarray:
    """Gates ``[..., G*H]`` from the order of Keras to that of torch, or back."""
    gates = np.split(weight, len(GATES[kind]), axis=-1)
    return np.concatenate([gates[place] for place in GATES[kind]], axis=-1)


def to_torch(kind: str, weights: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``get_weights()`` of one Keras layer as ``[weight_ih, weight_hh]``, and ``bias_ih, bias_hh`` if it has biases."""
    kernel, recurrent, *biases = (reorder(np.asarray(weight), kind) for weight in weights)
    result = [kernel.T, recurrent.T]
    for bias in biases:
        result += list(bias) if bias.ndim == 2 else [bias, np.zeros_like(bias)]
    return result


def to_keras(kind: str, weights: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The way back, for ``set_weights()``: ``[kernel, recurrent_kernel]``, and ``bias`` if there are two."""
    weight_ih, weight_hh, *biases = (np.asarray(weight) for weight in weights)
    result = [weight_ih.T, weight_hh.T]
    if biases:
        result.append(np.stack(biases) if kind == "GRU" else biases[0] + biases[1])
    return [reorder(weight, kind) for weight in result]


def check(layer: Any) -> None:
    """Refuse one layer, SimpleRNN, LSTM or GRU, that has no equivalent.

    Raises
    ------
    NoEquivalentError
        With what is in the way.
    """
    kind, config = type(layer).__name__, layer.get_config()
    if kind not in MODULES:
        raise NoEquivalentError(f"{kind}: only {', '.join(MODULES)} and Bidirectional of them have an equivalent")
    activations = ("tanh", "relu") if kind == "SimpleRNN" else ("tanh",)
    if config["activation"] not in activations:
        raise NoEquivalentError(f"{kind}(activation={config['activation']!r}): only {' and '.join(activations)}")
    if config.get("recurrent_activation", "sigmoid") != "sigmoid":
        raise NoEquivalentError(f"{kind}(recurrent_activation={config['recurrent_activation']!r}): only sigmoid")
    if not config.get("reset_after", True):
        raise NoEquivalentError("GRU(reset_after=False): torch applies the reset gate after the matrix product")
    for name in ("dropout", "recurrent_dropout"):
        if config[name]:
            raise NoEquivalentError(f"{kind}({name}={config[name]}): torch drops between layers, not within one")


def from_keras(layers: Any) -> Any:
    """The fastrnn module with the weights of a built Keras layer, or of several that are stacked.

    What only concerns the call (``return_sequences``, ``return_state``, ``stateful``, ``go_backwards``,
    ``merge_mode``) is left to the caller; `examples.keras_equivalents` shows each.

    Parameters
    ----------
    layers : SimpleRNN, LSTM, GRU, Bidirectional of one of them, or a list of alike ones, the first one first.

    Returns
    -------
    module : fastrnn.RNN, LSTM or GRU with batch_first, in the dtype of the weights.

    Raises
    ------
    NoEquivalentError
        For a layer without equivalent (see `check`), and for stacked layers that are not alike.
    """
    stack = list(layers) if isinstance(layers, Sequence) else [layers]
    pairs = [
        [layer.forward_layer, layer.backward_layer] if hasattr(layer, "forward_layer") else [layer] for layer in stack
    ]
    flat = [layer for pair in pairs for layer in pair]
    for layer in flat:
        check(layer)

    def options(layer: Any) -> dict[str, Any]:
        config = layer.get_config()
        kind = type(layer).__name__
        words = {"nonlinearity": config["activation"]} if kind == "SimpleRNN" else {}
        return {"kind": kind, "hidden_size": config["units"], "bias": config["use_bias"], **words}

    arguments = options(flat[0])
    if len({len(pair) for pair in pairs}) > 1 or any(options(layer) != arguments for layer in flat):
        raise NoEquivalentError("stacked layers of different kind, width, bias or direction: convert one at a time")
    kind = arguments.pop("kind")
    weights = [torch.from_numpy(weight.copy()) for layer in flat for weight in to_torch(kind, layer.get_weights())]
    module = MODULES[kind](
        weights[0].shape[1],
        num_layers=len(pairs),
        bidirectional=len(pairs[0]) == 2,
        batch_first=True,
        dtype=weights[0].dtype,
        **arguments,
    )
    _copy(list(module.parameters()), weights)
    return module


@torch.no_grad()
def _copy(parameters: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.copy_(weight)
