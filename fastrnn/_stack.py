"""The stack of layers: arguments checked once, a backend chosen once, layer by layer with dropout between."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _backend

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def stack(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    need_steps: bool = False,
) -> tuple[Tensor, Sequence[Tensor], list[list[Tensor]]]:
    """The layers of any cell: output, final states, and for ``need_steps`` every state of every step, by layer."""
    if num_layers < 1:
        raise ValueError(f"num_layers should be at least 1, got: {num_layers}")
    directions = 2 if bidirectional else 1
    per_layer = len(weights) // num_layers
    # with a projection the number of weights of a direction is odd: 2 or 4, and one more
    if per_layer * num_layers != len(weights) or per_layer // directions not in ((4, 5) if has_biases else (2, 3)):
        raise ValueError(
            f"weights should hold, for each of {num_layers} layers and {directions} directions, 2 matrices, "
            f"{'2 biases' if has_biases else 'no bias'} and at most one projection, got {len(weights)} tensors"
        )
    features = lengths is not None or reset is not None
    if features:
        lengths, reset = _checked(input, lengths, reset, batch_sizes, batch_first)
    if hx is not None:
        check_hidden(hx)
        states = list(hx)
    elif batch_sizes is not None:  # the number of rows does not show in a packed input: the op takes it from the states
        states = _backend.zero_states(cell, input, weights, num_layers * directions, _backend.packed_batch(batch_sizes))
    elif _backend.wants_states():
        batch = input.shape[0 if batch_first else 1]
        states = _backend.zero_states(cell, input, weights, num_layers * directions, batch)
    else:
        states = []
    route = _backend.choose(input, features or need_steps)
    if route == "torch":
        output, *final = _backend.torch_layers(
            cell,
            input,
            states,
            weights,
            has_biases,
            num_layers,
            dropout,
            training,
            bidirectional,
            batch_first,
            batch_sizes,
        )
        return output, final, []

    count = 2 if cell == "lstm" else 1
    rest = (lengths, reset, batch_sizes, bidirectional, batch_first, need_steps)
    if num_layers == 1:
        result = run_layer(route, cell, input, states, weights, *rest)
        steps = [[result[0], *result[1 + count : 2 * count]]] if need_steps else []
        return result[0], result[1 : 1 + count], steps

    dropout = dropout if training else 0.0
    if route == "native" and not (bidirectional or dropout or need_steps):
        at_once = _backend.native_stack(
            cell, num_layers, input, states, weights, lengths, reset, batch_sizes, batch_first
        )
        if at_once is not None:
            return at_once[0], at_once[1:], []
    by_layer = _split_states(states, num_layers, directions) if states else [[]] * num_layers
    finals, steps = [], []
    for index in range(num_layers):
        here = weights[index * per_layer : (index + 1) * per_layer]
        result = run_layer(route, cell, input, by_layer[index], here, *rest)
        input = result[0]
        finals.append(result[1 : 1 + count])
        if need_steps:
            steps.append([input, *result[1 + count : 2 * count]])
        if dropout and index < num_layers - 1:
            input = _dropout(input, dropout, transposed=batch_first and batch_sizes is None)
    return input, [torch.cat(parts) for parts in zip(*finals, strict=True)], steps


def run_layer(route: str, cell: str, *arguments: Any) -> list[Tensor]:
    """One layer on the chosen backend."""
    return _backend.native_layer(cell, *arguments) if route == "native" else _backend.python_layer(cell, *arguments)


def _split_states(states: Sequence[Tensor], num_layers: int, directions: int) -> list[list[Tensor]]:
    for index, state in enumerate(states):
        if state.dim() != 3:
            raise RuntimeError(f"hidden[{index}] should be 3-D, got {state.dim()}-D")
        if state.shape[0] != num_layers * directions:
            raise RuntimeError(
                f"hidden[{index}] should have num_layers * directions = {num_layers * directions} rows, "
                f"got {state.shape[0]}"
            )
    return [list(parts) for parts in zip(*(state.split(directions) for state in states), strict=True)]


def _dropout(input: Tensor, p: float, transposed: bool) -> Tensor:
    """Dropout with torch.nn's mask, which it draws over the time-major tensor whatever batch_first says."""
    if not transposed:
        return torch.dropout(input, p, True)
    batch, steps, channels = input.shape
    mask = torch.dropout(input.new_ones(steps, batch, channels), p, True)
    return input * mask.transpose(0, 1)


def _checked(
    input: Tensor, lengths: Tensor | None, reset: Tensor | None, batch_sizes: Tensor | None, batch_first: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Lengths and reset as the op wants them: int64 and bool, on the input's device."""
    if batch_sizes is not None:
        given = "lengths" if lengths is not None else "reset"
        raise ValueError(
            f"{given} should not be given with a PackedSequence, which carries its own lengths: "
            "pass the padded input with lengths (and reset) instead"
        )
    if input.dim() != 3:
        raise RuntimeError(f"input must have 3 dimensions, got {input.dim()}")
    steps, batch = (input.shape[1], input.shape[0]) if batch_first else (input.shape[0], input.shape[1])
    if lengths is not None:
        check_tensor("lengths", lengths, "integers", _INTEGERS)
        _check_readable("lengths", lengths, input)
        if lengths.shape != (batch,):
            raise ValueError(f"lengths should have the shape (N,) = ({batch},), got: {tuple(lengths.shape)}")
        if lengths.is_cpu and not input.is_cpu:
            _backend.check_lengths_range(lengths, steps)
        lengths = lengths.to(input.device, torch.int64)
    if reset is not None:
        check_tensor("reset", reset, "bool", (torch.bool,))
        _check_readable("reset", reset, input)
        expected, layout = ((batch, steps), "(N, T)") if batch_first else ((steps, batch), "(T, N)")
        if reset.shape != expected:
            raise ValueError(f"reset should have the shape {layout} = {expected}, got: {tuple(reset.shape)}")
        reset = reset.to(input.device)
    return lengths, reset


def check_hidden(hx: object) -> None:
    """A tensor would come apart along its first dimension; the functions of one state wrap theirs themselves."""
    if isinstance(hx, Tensor):
        raise TypeError("hx should be a tuple (h_0, c_0), got: Tensor")


def check_tensor(name: str, value: object, content: str, dtypes: Sequence[torch.dtype]) -> None:
    """TypeError unless a Tensor of one of the dtypes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} should be a Tensor of {content}, got: {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} should be a Tensor of {content}, got: {value.dtype}")


def _check_readable(name: str, value: Tensor, input: Tensor) -> None:
    """Any device will do, but one that holds no numbers."""
    if value.is_meta and not input.is_meta:
        raise ValueError(f"{name} should be on the device of input ({input.device}) or another with data, got: meta")
