"""One recurrent layer in plain torch: the Python backend, and the mathematics behind second derivatives.

    g_t = x_t W_ih^T + b_ih                             # input projection, all steps at once
    s_t = step(g_t, h_{t-1} W_hh^T + b_hh, s_{t-1})     # the cell, s = (h,) or (h, c)
    h_t = h_t W_hr^T                                    # LSTM with projection

The three public functions have the arguments of the ops ``fastrnn::reference_layer``, ``reference_backward`` and
``reference_double_backward``. A row that is not valid is not visited and a state is dropped by selection, never by
multiplication, so that NaN in padding reaches nothing. 16-bit tensors are computed in float32.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import get_inplace_requires_grad_allowed, set_inplace_requires_grad_allowed

__all__ = ["CELLS", "Cell", "layer", "layer_backward", "layer_double_backward"]

States = tuple[Tensor, ...]


class Cell(NamedTuple):
    """What makes a cell: its step, and how many gates and states it has."""

    step: Callable[[Tensor, Tensor, States], States]  # (input gates, recurrent gates, states) -> states
    gates: int
    states: int


def rnn_tanh(input_gates: Tensor, recurrent_gates: Tensor, states: States) -> States:
    """H' = tanh(x + h), Elman (1990)."""
    return (torch.tanh(input_gates + recurrent_gates),)


def rnn_relu(input_gates: Tensor, recurrent_gates: Tensor, states: States) -> States:
    """H' = relu(x + h)."""
    return (torch.relu(input_gates + recurrent_gates),)


def lstm(input_gates: Tensor, recurrent_gates: Tensor, states: States) -> States:
    """C' = f c + i g, h' = o tanh(c'), Hochreiter and Schmidhuber (1997) with the forget gate of Gers et al. (2000)."""
    i, f, g, o = (input_gates + recurrent_gates).chunk(4, -1)
    c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru(input_gates: Tensor, recurrent_gates: Tensor, states: States) -> States:
    """H' = (1 - z) n + z h with n = tanh(x_n + r h_n), Cho et al. (2014) in the linear-before-reset form."""
    x_r, x_z, x_n = input_gates.chunk(3, -1)
    h_r, h_z, h_n = recurrent_gates.chunk(3, -1)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return ((1 - z) * n + z * states[0],)


CELLS = {
    "rnn_tanh": Cell(rnn_tanh, gates=1, states=1),
    "rnn_relu": Cell(rnn_relu, gates=1, states=1),
    "lstm": Cell(lstm, gates=4, states=2),
    "gru": Cell(gru, gates=3, states=1),
}


def layer(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    batch_sizes: Tensor | None,
    bidirectional: bool,
    batch_first: bool,
    need_steps: bool,
) -> list[Tensor]:
    """One layer, both directions; differentiable any number of times.

    Parameters
    ----------
    cell : "rnn_tanh", "rnn_relu", "lstm" or "gru".
    input : ``[T, N, I]``; ``[N, T, I]`` if ``batch_first``; ``[rows, I]`` with ``batch_sizes``.
    hx : initial states, ``h0 [D, N, P or H]`` and for the LSTM ``c0 [D, N, H]``; empty: zeros.
    weights : per direction ``w_ih, w_hh``, then ``b_ih, b_hh`` (both or neither), then ``w_hr``; each may have a
        leading dimension of groups, block k of the batch then uses slice k.
    lengths : int64 ``[N]``, the valid steps of each row; taken as 0 if negative and as T if greater.
    reset : bool, ``[T, N]`` or ``[N, T]`` as ``batch_first`` says: a new sequence starts here.
    batch_sizes : int64 ``[T]``, the layout of a PackedSequence.

    Returns
    -------
    ``[output, h_n]``, LSTM ``[output, h_n, c_n]``, and with ``need_steps`` the cell state of every step of the LSTM,
    laid out as output.
    """
    spec = CELLS[cell]
    directions = 2 if bidirectional else 1
    dtype = input.dtype
    compute = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    hx = [state.to(compute) for state in hx]
    weights = [weight.to(compute) for weight in weights]

    time_major = batch_sizes is not None or not batch_first
    x = input.to(compute)
    rows = None
    if batch_sizes is not None:
        batch = hx[0].shape[1] if hx else int(batch_sizes[0])
        x, lengths, rows = _unpack(x, batch_sizes.to(input.device), batch)
    elif not time_major:
        x = x.transpose(0, 1)
        reset = None if reset is None else reset.transpose(0, 1)
    steps, batch = x.shape[:2]
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")

    valid = None
    if lengths is not None:
        valid = (torch.arange(steps, device=x.device).unsqueeze(1) < lengths).unsqueeze(-1)  # [T, N, 1]
        x = torch.where(valid, x, 0.0)

    per_direction = len(weights) // directions
    scans = []
    for direction in range(directions):
        w_ih, w_hh, b_ih, b_hh, w_hr = _named(weights[direction * per_direction : (direction + 1) * per_direction])
        if hx:
            states = tuple(state[direction] for state in hx)
        else:
            sizes = [w_hh.shape[-1]] + [w_hh.shape[-2] // spec.gates] * (spec.states - 1)
            states = tuple(x.new_zeros(batch, size) for size in sizes)
        order = range(steps) if direction == 0 else range(steps - 1, -1, -1)
        kept = _kept(reset, valid, reverse=direction == 1)
        scans.append(_scan(spec.step, order, _linear(x, w_ih, b_ih), states, (w_hh, b_hh, w_hr), valid, kept))

    sequences = [torch.cat(parts, -1) for parts in zip(*(scan[0] for scan in scans), strict=True)]
    final = [torch.stack(parts) for parts in zip(*(scan[1] for scan in scans), strict=True)]
    if rows is not None:
        sequences = [sequence.flatten(0, 1).index_select(0, rows) for sequence in sequences]
    elif not time_major:
        sequences = [sequence.transpose(0, 1).contiguous() for sequence in sequences]
    outputs = [sequences[0], *final, *(sequences[1:] if need_steps else ())]
    return [output.to(dtype) for output in outputs]


def _named(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The weights of one direction as (w_ih, w_hh, b_ih, b_hh, w_hr)."""
    b_ih, b_hh = (weights[2], weights[3]) if len(weights) > 3 else (None, None)
    return weights[0], weights[1], b_ih, b_hh, weights[-1] if len(weights) % 2 else None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b`` over the last dimension; with a leading dimension of groups in W and b, block by block of N."""
    if weight.dim() == 2:
        return torch.nn.functional.linear(x, weight, bias)
    groups = weight.shape[0]
    blocks = x.unflatten(-2, (groups, x.shape[-2] // groups))
    y = torch.matmul(blocks, weight.transpose(1, 2))  # [..., groups, N / groups, G]
    return (y if bias is None else y + bias.unsqueeze(1)).flatten(-3, -2)


def _unpack(data: Tensor, batch_sizes: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed rows as ``[T, N, I]`` (what lies beyond a length is arbitrary), lengths, and each row's index in T * N."""
    device, count = data.device, data.shape[0]
    offsets = batch_sizes.cumsum(0) - batch_sizes
    column = torch.arange(batch, device=device)
    padded = data[(offsets.unsqueeze(1) + column).clamp(max=max(count - 1, 0))]
    lengths = (batch_sizes.unsqueeze(1) > column).sum(0)
    step = torch.repeat_interleave(torch.arange(len(batch_sizes), device=device), batch_sizes, output_size=count)
    return padded, lengths, step * batch + torch.arange(count, device=device) - offsets[step]


def _kept(reset: Tensor | None, valid: Tensor | None, reverse: bool) -> Tensor | None:
    """Where the state that enters a step is used, ``[T, N, 1]``; None: everywhere.

    A row that is not valid enters with zeros: its step is computed and thrown away, and must not make a NaN that the
    backward pass would multiply by zero.
    """
    if reset is None:
        return valid
    starts = reset.unsqueeze(-1) if valid is None else reset.unsqueeze(-1) & valid
    if reverse:  # what enters step t crosses from t + 1; the initial state enters at a row's last valid step
        starts = torch.cat([starts[1:], torch.zeros_like(starts[:1])])
    return ~starts if valid is None else valid & ~starts


def _scan(
    step: Callable[[Tensor, Tensor, States], States],
    order: range,
    gates: Tensor,  # [T, N, G*H]
    states: States,
    weights: tuple[Tensor, Tensor | None, Tensor | None],
    valid: Tensor | None,
    kept: Tensor | None,
) -> tuple[list[Tensor], States]:
    """The time loop: every state of every step, ``[T, N, *]`` each, and the final states."""
    w_hh, b_hh, w_hr = weights
    visited: list[States] = [()] * len(order)
    inputs = gates.unbind()
    for t in order:
        entering = states if kept is None else tuple(torch.where(kept[t], state, 0.0) for state in states)
        left = step(inputs[t], _linear(entering[0], w_hh, b_hh), entering)
        if w_hr is not None:
            left = (_linear(left[0], w_hr, None), *left[1:])
        if valid is None:
            states = visited[t] = left
        else:
            states = tuple(torch.where(valid[t], new, old) for new, old in zip(left, states, strict=True))
            visited[t] = tuple(torch.where(valid[t], new, 0.0) for new in left)
    return [torch.stack(sequence) for sequence in zip(*visited, strict=True)], states


def layer_backward(
    cell: str,
    grad_outputs: Sequence[Tensor | None],
    input: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    batch_sizes: Tensor | None,
    bidirectional: bool,
    batch_first: bool,
    mask: Sequence[bool],
    groups: int,
) -> list[Tensor]:
    """The vector-Jacobian product of :func:`layer`, itself differentiable where grad mode is on.

    Parameters
    ----------
    grad_outputs : follows the results of :func:`layer`; None: zeros. One more than states: with the per-step states.
    mask : what is wanted of ``[input, *hx, *weights]``.
    groups : if positive, the batch is so many blocks of rows, and each weight gradient has that leading dimension.

    Returns
    -------
    Gradients of ``[input, *hx, *weights]``, of shape ``[0]`` where ``mask`` is false.
    """
    create_graph = torch.is_grad_enabled()
    with _differentiable():
        primals = [_alias(tensor) for tensor in (input, *hx, *weights)]
        first = 1 + len(hx)
        if groups > 0:
            primals[first:] = [weight.unsqueeze(0).expand(groups, *weight.shape) for weight in primals[first:]]
        outputs = layer(
            cell,
            primals[0],
            primals[1:first],
            primals[first:],
            lengths,
            reset,
            batch_sizes,
            bidirectional,
            batch_first,
            len(grad_outputs) > 1 + CELLS[cell].states,
        )
        return _masked_gradients(outputs, grad_outputs, primals, mask, create_graph)


def layer_double_backward(
    cell: str,
    grads: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor | None],
    input: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    batch_sizes: Tensor | None,
    bidirectional: bool,
    batch_first: bool,
    mask: Sequence[bool],
    groups: int,
    need: Sequence[bool],
) -> list[Tensor]:
    """The vector-Jacobian product of :func:`layer_backward`, itself differentiable where grad mode is on.

    Parameters
    ----------
    grads : follows the results of :func:`layer_backward`; None: zeros.
    need : what is wanted of ``[*grad_outputs, input, *hx, *weights]``.

    Returns
    -------
    Gradients of ``[*grad_outputs, input, *hx, *weights]``, of shape ``[0]`` where ``need`` is false.
    """
    create_graph = torch.is_grad_enabled()
    with _differentiable():
        cotangents = [None if grad is None else _alias(grad) for grad in grad_outputs]
        primals = [_alias(tensor) for tensor in (input, *hx, *weights)]
        first = 1 + len(hx)
        gradients = layer_backward(
            cell,
            cotangents,
            primals[0],
            primals[1:first],
            primals[first:],
            lengths,
            reset,
            batch_sizes,
            bidirectional,
            batch_first,
            mask,
            groups,
        )
        wanted = [grad if kept else None for grad, kept in zip(grads, mask, strict=True)]
        return _masked_gradients(gradients, wanted, [*cotangents, *primals], need, create_graph)


@contextmanager
def _differentiable() -> Iterator[None]:
    """Grad mode on, and requires_grad_ allowed on our own aliases inside a torch.func transform too."""
    allowed = get_inplace_requires_grad_allowed()
    set_inplace_requires_grad_allowed(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        set_inplace_requires_grad_allowed(allowed)


def _alias(tensor: Tensor) -> Tensor:
    """A view that requires grad: it keeps history and tangents, and a gradient with respect to it is only ours."""
    view = tensor.view_as(tensor)
    return view if view.requires_grad else view.requires_grad_()


def _masked_gradients(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    mask: Sequence[bool],
    create_graph: bool,
) -> list[Tensor]:
    """Gradients of the inputs that the mask names (zeros where nothing arrives), shape ``[0]`` for the others."""
    pairs = [
        (output, cotangent)
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if cotangent is not None and output.requires_grad
    ]
    wanted = [tensor for tensor, kept in zip(inputs, mask, strict=True) if kept and tensor is not None]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if pairs and wanted:
        ys, gs = zip(*pairs, strict=True)
        found = torch.autograd.grad(ys, wanted, gs, create_graph=create_graph, allow_unused=True)
    gradients = iter(
        torch.zeros_like(tensor) if grad is None else grad for tensor, grad in zip(wanted, found, strict=True)
    )
    return [
        next(gradients) if kept and tensor is not None else outputs[0].new_empty(0)
        for tensor, kept in zip(inputs, mask, strict=True)
    ]
