"""Recurrent layers and cells as functions of their weights: what the modules are made of, public by itself."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _backend, reference
from ._stack import check_hidden, run_layer, stack

__all__ = ["gru", "gru_cell", "lstm", "lstm_cell", "rnn", "rnn_cell"]

_unsafe_view = torch.ops.aten._unsafe_view.default


def lstm(
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    r"""A stack of LSTM layers, with projection if the weights have one.

    ``i, f, o = sigmoid(...)``, ``g = tanh(...)`` of ``W_ih x_t + b_ih + W_hh h_{t-1} + b_hh``; then
    ``c_t = f c_{t-1} + i g`` and ``h_t = W_hr (o tanh(c_t))``.

    Parameters
    ----------
    input : Tensor
        ``[T, N, I]``; ``[N, T, I]`` if ``batch_first``; ``[rows, I]``, the data of a PackedSequence, with
        ``batch_sizes``. float32, float64, bfloat16 or float16, the same as the weights.
    hx : (Tensor, Tensor) or None
        ``h_0 [L*D, N, P or H]`` and ``c_0 [L*D, N, H]``; None: zeros.
    weights : list of Tensor
        Layer by layer, then direction by direction: ``w_ih [4*H, I or D*(P or H)]``, ``w_hh [4*H, P or H]``, then with
        biases ``b_ih, b_hh [4*H]``, then with projection ``w_hr [P, H]``. Gate order i, f, g, o.
    dropout : float
        Applied to the output of every layer but the last where ``training``, with torch.nn's own mask for the same
        seed on the CPU.
    lengths : Tensor, optional
        Integers ``[N]``, any order, 0 to T: the valid steps of each row. The output beyond them is zero, the final
        states are those of the last valid step (of length 0: the initial states), the reverse direction starts there.
        Checked where they lie on the CPU, clamped on another device.
    reset : Tensor, optional
        bool, ``[T, N]``, or ``[N, T]`` if ``batch_first``: a new sequence starts at (t, n), so no state crosses from
        step t - 1 to t, or back.
    batch_sizes : Tensor, optional
        int64 ``[T]`` on the CPU, not increasing: the layout of a PackedSequence. Excludes ``lengths`` and ``reset``.

    Returns
    -------
    output : Tensor
        ``[T, N, D*(P or H)]``, laid out as the input.
    (h_n, c_n) : (Tensor, Tensor)
        Shaped as ``hx``.

    Raises
    ------
    ValueError, TypeError
        For arguments that contradict each other, and for ``lengths`` or ``reset`` of a wrong type or shape.
    RuntimeError
        For tensors of the wrong shape, dtype or device, ``lengths`` out of range, and T = 0.

    References
    ----------
    Hochreiter and Schmidhuber (1997); forget gate: Gers, Schmidhuber and Cummins (2000); projection: Sak, Senior and
    Beaufays (2014).
    """
    output, (h_n, c_n), _ = stack(
        "lstm",
        input,
        hx,
        weights,
        has_biases,
        num_layers,
        dropout,
        training,
        bidirectional,
        batch_first,
        lengths,
        reset,
        batch_sizes,
    )
    return output, (h_n, c_n)


def gru(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A stack of GRU layers, linear-before-reset as torch.nn and cuDNN have it.

    ``r = sigmoid(W_ir x_t + b_ir + W_hr h_{t-1} + b_hr)``, ``z`` alike,
    ``n = tanh(W_in x_t + b_in + r (W_hn h_{t-1} + b_hn))``, ``h_t = (1 - z) n + z h_{t-1}``.

    Parameters
    ----------
    input, dropout, lengths, reset, batch_sizes :
        As for :func:`lstm`.
    hx : Tensor or None
        ``h_0 [L*D, N, H]``; None: zeros.
    weights : list of Tensor
        Layer by layer, then direction by direction: ``w_ih [3*H, I or D*H]``, ``w_hh [3*H, H]``, then with biases
        ``b_ih, b_hh [3*H]``. Gate order r, z, n.

    Returns
    -------
    output : Tensor
        ``[T, N, D*H]``, laid out as the input.
    h_n : Tensor
        ``[L*D, N, H]``.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As :func:`lstm` does.

    References
    ----------
    Cho et al. (2014), arXiv:1406.1078v1 for the linear-before-reset form.
    """
    output, (h_n,), _ = stack(
        "gru",
        input,
        None if hx is None else (hx,),
        weights,
        has_biases,
        num_layers,
        dropout,
        training,
        bidirectional,
        batch_first,
        lengths,
        reset,
        batch_sizes,
    )
    return output, h_n


def rnn(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    nonlinearity: str = "tanh",
) -> tuple[Tensor, Tensor]:
    """A stack of Elman RNN layers: ``h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)``, or relu of it.

    Parameters
    ----------
    input, dropout, lengths, reset, batch_sizes :
        As for :func:`lstm`.
    hx : Tensor or None
        ``h_0 [L*D, N, H]``; None: zeros.
    weights : list of Tensor
        Layer by layer, then direction by direction: ``w_ih [H, I or D*H]``, ``w_hh [H, H]``, then with biases
        ``b_ih, b_hh [H]``.
    nonlinearity : "tanh" or "relu"

    Returns
    -------
    output : Tensor
        ``[T, N, D*H]``, laid out as the input.
    h_n : Tensor
        ``[L*D, N, H]``.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As :func:`lstm` does; ValueError also for an unknown nonlinearity.

    References
    ----------
    Elman (1990).
    """
    output, (h_n,), _ = stack(
        _rnn_cell_name(nonlinearity),
        input,
        None if hx is None else (hx,),
        weights,
        has_biases,
        num_layers,
        dropout,
        training,
        bidirectional,
        batch_first,
        lengths,
        reset,
        batch_sizes,
    )
    return output, h_n


def _rnn_cell_name(nonlinearity: str) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    return f"rnn_{nonlinearity}"


def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of :func:`lstm`.

    Parameters
    ----------
    input : Tensor
        ``[N, I]``.
    hx : (Tensor, Tensor) or None
        ``h`` and ``c``, ``[N, H]`` each; None: zeros.
    w_ih, w_hh, b_ih, b_hh : Tensor
        ``[4*H, I]``, ``[4*H, H]``, ``[4*H]``, ``[4*H]``; both biases or neither.

    Returns
    -------
    h, c : Tensor
        ``[N, H]`` each.

    Raises
    ------
    ValueError, TypeError
        For one bias without the other, and for ``hx`` that is no pair.
    RuntimeError
        For tensors of the wrong shape, dtype or device.
    """
    h, c = _cell("lstm", input, hx, w_ih, w_hh, b_ih, b_hh)
    return h, c


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One step of :func:`gru`.

    Parameters
    ----------
    input : Tensor
        ``[N, I]``.
    hx : Tensor or None
        ``[N, H]``; None: zeros.
    w_ih, w_hh, b_ih, b_hh : Tensor
        ``[3*H, I]``, ``[3*H, H]``, ``[3*H]``, ``[3*H]``; both biases or neither.

    Returns
    -------
    Tensor
        ``[N, H]``.

    Raises
    ------
    ValueError, RuntimeError
        As :func:`lstm_cell` does.
    """
    return _cell("gru", input, None if hx is None else (hx,), w_ih, w_hh, b_ih, b_hh)[0]


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    nonlinearity: str = "tanh",
) -> Tensor:
    """One step of :func:`rnn`.

    Parameters
    ----------
    input : Tensor
        ``[N, I]``.
    hx : Tensor or None
        ``[N, H]``; None: zeros.
    w_ih, w_hh, b_ih, b_hh : Tensor
        ``[H, I]``, ``[H, H]``, ``[H]``, ``[H]``; both biases or neither.
    nonlinearity : "tanh" or "relu"

    Returns
    -------
    Tensor
        ``[N, H]``.

    Raises
    ------
    ValueError, RuntimeError
        As :func:`lstm_cell` does; ValueError also for an unknown nonlinearity.
    """
    return _cell(_rnn_cell_name(nonlinearity), input, None if hx is None else (hx,), w_ih, w_hh, b_ih, b_hh)[0]


def _cell(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> Sequence[Tensor]:
    """A layer of one step; the messages of the checks are torch's."""
    if (b_ih is None) != (b_hh is None):
        raise ValueError("b_ih and b_hh should be given both or neither")
    if input.dim() != 2:
        raise RuntimeError(f"input must have 2 dimensions, got {input.dim()}")
    _backend.check_matrices(w_ih, w_hh)
    batch, size = input.shape
    if size != w_ih.shape[1]:
        raise RuntimeError(f"input has inconsistent input_size: got {size} expected {w_ih.shape[1]}")
    if hx is not None:
        check_hidden(hx)
        states = list(hx)
        if len(states) != reference.CELLS[cell].states:
            raise RuntimeError(f"{cell}_cell expects two hidden states")
    elif _backend.wants_states():
        states = [state.squeeze(0) for state in _backend.zero_states(cell, input, [w_ih, w_hh], 1, batch)]
    else:
        states = []
    for index, state in enumerate(states):
        if state.dim() != 2:
            raise RuntimeError(f"hidden{index} must have 2 dimensions, got {state.dim()}")
        if state.shape[0] != batch:
            raise RuntimeError(f"Input batch size {batch} doesn't match hidden{index} batch size {state.shape[0]}")
        if state.shape[1] != w_hh.shape[1]:
            raise RuntimeError(
                f"hidden{index} has inconsistent hidden_size: got {state.shape[1]}, expected {w_hh.shape[1]}"
            )
    route = _backend.choose(input, features=False)
    if route == "torch":
        return _backend.torch_cell(cell, input, states, w_ih, w_hh, b_ih, b_hh)
    weights = [w_ih, w_hh] if b_ih is None or b_hh is None else [w_ih, w_hh, b_ih, b_hh]
    if route == "native":
        new = _backend.native_cell(cell, input, states, weights)
        if new is not None:
            return new
    result = run_layer(
        route,
        cell,
        input.unsqueeze(0),
        [state.unsqueeze(0) for state in states],
        weights,
        None,
        None,
        None,
        False,
        False,
        False,
    )
    states = result[1 : 3 if cell == "lstm" else 2]
    if torch.jit.is_tracing():  # whose sizes are to stay open
        return [state.squeeze(0) for state in states]
    # no views: what a cell returns may be detached and changed in place
    return [_unsafe_view(state, (batch, state.shape[2])) for state in states]
