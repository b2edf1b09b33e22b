"""ONNX: fastrnn's layers as the standard operators RNN, LSTM and GRU, which every runtime has.

    program = fastrnn.onnx.export(model, (input,), dynamic_shapes=...)     # torch.onnx.export with the table below
    program.save("model.onnx")

Source of the operators' definitions: https://onnx.ai/onnx/operators/onnx__LSTM.html, and alike for GRU and RNN.
Needed besides torch: the packages onnx and onnxscript, as for torch.onnx.export itself.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

__all__ = ["export", "translation_table"]


class _Operator(NamedTuple):
    """A cell in ONNX: the operator, and where each of its gates is in torch's order."""

    name: str
    gates: tuple[int, ...]
    activation: str = ""  # of each direction; the other operators have the right ones by default


_OPERATORS = {
    "rnn_tanh": _Operator("RNN", (0,), "Tanh"),
    "rnn_relu": _Operator("RNN", (0,), "Relu"),
    "lstm": _Operator("LSTM", (0, 3, 1, 2)),  # i, o, f, c of i, f, g, o
    "gru": _Operator("GRU", (1, 0, 2)),  # z, r, h of r, z, n
}


class UnsupportedError(RuntimeError):
    """What ONNX has no operator for."""


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For ``torch.onnx.export(..., dynamo=True, custom_translation_table=fastrnn.onnx.translation_table())``.

    Returns
    -------
    dict
        From each native op of fastrnn to the function that writes it with ONNX's operators.

    Raises
    ------
    RuntimeError
        Where the native library is not loaded: only with it is a layer one op that can be translated.
    ImportError
        Without the package onnxscript.
    """
    from . import _backend

    if _backend.native is None:
        raise RuntimeError(f"ONNX export needs fastrnn's native library, which cannot be used: {_backend.reason}")
    try:
        from onnxscript import opset18
    except ImportError as error:
        raise ImportError("ONNX export needs the packages onnx and onnxscript: pip install onnxscript") from error
    return {
        getattr(torch.ops.fastrnn, f"{cell}_layer").default: _translation(opset18, operator)
        for cell, operator in _OPERATORS.items()
    }


def export(model: Any, args: tuple[Any, ...] = (), f: Any = None, **options: Any) -> Any:
    """``torch.onnx.export`` of a model with fastrnn's modules in it.

    Each layer becomes one operator RNN, LSTM or GRU with its directions, initial states and lengths
    (``sequence_lens``); of what T and N are in the file, ``dynamic_shapes`` decides, as ever.

    Parameters
    ----------
    model : Module or torch.export.ExportedProgram
        In evaluation mode.
    args, f, options :
        As for ``torch.onnx.export``, whose ``dynamo=True`` is implied; a ``custom_translation_table`` is added to ours.

    Returns
    -------
    torch.onnx.ONNXProgram

    Raises
    ------
    RuntimeError
        For what ONNX's operators have not: resets, a projection, the cell states of every step, packed rows. Also as
        :func:`translation_table` does.
    ValueError
        For ``dynamo=False``: that exporter knows no table.
    """
    if options.pop("dynamo", True) is not True:
        raise ValueError("fastrnn's layers are exported with dynamo=True only")
    table = {**translation_table(), **(options.pop("custom_translation_table", None) or {})}
    try:
        return torch.onnx.export(model, args, f, dynamo=True, custom_translation_table=table, **options)
    except torch.onnx.errors.OnnxExporterError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UnsupportedError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None


def _translation(op: Any, operator: _Operator) -> Callable[..., Any]:
    # torch reads the signature, and takes for attributes of the graph what is annotated so
    def translate(
        input: Any,
        hx: Sequence[Any],
        weights: Sequence[Any],
        lengths: Any = None,
        reset: Any = None,
        batch_sizes: Any = None,
        bidirectional: bool = False,
        batch_first: bool = False,
        need_steps: bool = False,
        need_reserve: bool = False,
    ) -> Sequence[Any]:
        directions = 2 if bidirectional else 1
        per_direction = len(weights) // directions
        for name, unsupported in (
            ("reset", reset is not None),
            ("projection (proj_size)", per_direction % 2 == 1),
            ("cell state of every step (forward_states)", need_steps and operator.name == "LSTM"),
            ("packed rows (pass the padded input with lengths)", batch_sizes is not None),
        ):
            if unsupported:
                raise UnsupportedError(f"ONNX's operator {operator.name} has no {name}")
        return _layer(op, operator, input, hx, weights, lengths, directions, per_direction, batch_first)

    return translate


def _layer(
    op: Any,
    operator: _Operator,
    input: Any,
    hx: Sequence[Any],
    weights: Sequence[Any],
    lengths: Any,
    directions: int,
    per_direction: int,
    batch_first: bool,
) -> list[Any]:
    """Output and final states, and something in place of the reserve, which no inference reads."""

    def stacked(index: int) -> Any:
        """One of the weights, for all directions: its gates in ONNX's order, a dimension of directions in front."""
        each = [weights[direction * per_direction + index] for direction in range(directions)]
        return op.Concat(*(op.Unsqueeze(_reorder(op, w, operator.gates), [0]) for w in each), axis=0)

    biases = op.Concat(stacked(2), stacked(3), axis=1) if per_direction == 4 else None
    # Layout 0, time-major, is the only one that ONNX Runtime has on the CPU.
    time_major = op.Transpose(input, perm=[1, 0, 2]) if batch_first else input
    results = getattr(op, operator.name)(
        time_major,
        stacked(0),
        stacked(1),
        biases,
        None if lengths is None else op.Cast(lengths, to=6),  # int32
        *hx,
        direction="bidirectional" if directions == 2 else "forward",
        hidden_size=weights[1].shape[1],
        **_attributes(operator, directions),
    )
    steps, *final = results
    # [T, D, N, H] to [T, N, D*H] or [N, T, D*H]
    output = op.Transpose(steps, perm=[2, 0, 1, 3] if batch_first else [0, 2, 1, 3])
    output = op.Reshape(output, [0, 0, -1])
    if lengths is not None and hx:  # a row without steps hands its state through; ONNX does not say what it returns
        empty = op.Unsqueeze(op.Equal(lengths, op.Constant(value_int=0)), [0, 2])
        final = [op.Where(empty, before, after) for before, after in zip(hx, final, strict=True)]
    return [output, *final, op.Constant(value_float=0.0)]


def _reorder(op: Any, weight: Any, gates: Sequence[int]) -> Any:
    """The blocks of rows of a weight or bias in another order."""
    if len(gates) == 1:
        return weight
    size = weight.shape[0] // len(gates)
    rows = [row for gate in gates for row in range(gate * size, (gate + 1) * size)]
    return op.Gather(weight, op.Constant(value_ints=rows), axis=0)


def _attributes(operator: _Operator, directions: int) -> dict[str, Any]:
    if operator.activation:
        return {"activations": [operator.activation] * directions}
    return {"linear_before_reset": 1} if operator.name == "GRU" else {}
