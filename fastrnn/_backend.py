"""Which implementation runs a layer: the native ops, torch's own ops, or the Python reference.

The environment variable ``FASTRNN_BACKEND``, read at import, is one of

- ``auto`` (the default): native, or python with one warning where the native library cannot be loaded;
- ``native``: the same, but what would be a warning is an error;
- ``python``: the native library is not even looked for.
"""

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from . import _ops, _tuned, reference

BACKENDS = ("auto", "native", "python")
CPU_VARIABLES = {
    "FASTRNN_CPU_CAPABILITY": ("avx512", "avx2", "default"),
    "FASTRNN_CPU_BF16": ("auto", "off", "emulate"),
    "FASTRNN_CPU_FLOAT32": ("fma", "bf16x3"),
    "FASTRNN_CPU_GEMM": ("auto", "own", "library"),
}

native: ModuleType | None = None  # fastrnn._C, once loaded
reason = ""  # why it is not
native_cuda = False
_library: torch.library.Library | None = None  # keeps the registrations below alive
_native_ops: dict[str, Callable[..., list[Tensor]]] | None = None

# What runs now, by cell; None: the Python backend. A plain global, because dynamo guards on it and it costs nothing.
layer_ops: dict[str, Callable[..., list[Tensor]]] | None = None


def _check(variable: str, value: str, values: Sequence[str]) -> None:
    if value not in values:
        raise ValueError(f"{variable} should be one of {', '.join(values[:-1])} or {values[-1]}, got: {value!r}")


def _load() -> None:
    """Import fastrnn._C, which registers the ops, and give it the reference as composite kernels."""
    global native, reason, native_cuda, _library, _native_ops
    name = f"{__package__}._C"
    if importlib.util.find_spec(name) is None:
        reason = "it was not built (FASTRNN_NATIVE=0 when fastrnn was installed, or the build was not run)"
        return
    for variable, values in CPU_VARIABLES.items():
        if value := os.environ.get(variable):
            _check(variable, value, values)  # the library refuses it too, but that would look like a broken one
    try:
        extension = importlib.import_module(name)
    except (ImportError, OSError) as error:
        reason = f"it does not load, having been built for another torch or Python ({error})"
        return
    _library = torch.library.Library("fastrnn", "IMPL")
    for op, function in (
        ("reference_layer", _reference_layer),
        ("reference_backward", _without_autocast(reference.layer_backward)),
        ("reference_double_backward", _without_autocast(reference.layer_double_backward)),
    ):
        _library.impl(op, function, "CompositeImplicitAutograd")
        _library.impl(op, function, "FuncTorchBatchedDecomposition")  # the same under vmap, whose tensors stay batched
        _library.impl(op, function, "Batched")  # and under the older one, of torch.autograd.grad(is_grads_batched=True)
    for cell in reference.CELLS:
        _library.impl(f"{cell}_layer_backward", functools.partial(_backward_by_reference, cell), "Batched")
    _ops.register({cell: spec.states for cell, spec in reference.CELLS.items()})
    _native_ops = {cell: getattr(torch.ops.fastrnn, f"{cell}_layer").default for cell in reference.CELLS}
    native_cuda = bool(extension.build_info().get("cuda", False))
    _tuned.load(extension, native_cuda)
    native = extension


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """With an autocast that changes no float32: what the reference is given has been cast.

    To turn it off would not do, as torch.func's transforms turn it on again for every op.
    """

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        before = {device: torch.get_autocast_dtype(device) for device in ("cpu", "cuda")}
        try:
            for device in before:
                torch.set_autocast_dtype(device, torch.float32)
            return function(*arguments)
        finally:
            for device, dtype in before.items():
                torch.set_autocast_dtype(device, dtype)

    return run


@_without_autocast
def _reference_layer(*arguments: Any) -> list[Tensor]:
    """The reference in the native op's place, which has checked all but values."""
    _, input, hx, _, lengths, _, batch_sizes, _, batch_first, _ = arguments
    if lengths is not None:
        check_lengths_range(lengths, input.shape[1 if batch_first else 0])
    if batch_sizes is not None:
        _check_batch_sizes(batch_sizes, hx[0].shape[1], input.shape[0])
    return reference.layer(*arguments)


def _backward_by_reference(cell: str, *arguments: Any) -> list[Tensor]:
    """The backward op of a cell, without what it is given of the forward op's results."""
    before, (_output, _reserve, *rest) = arguments[:7], arguments[7:]
    return torch.ops.fastrnn.reference_backward(cell, *before, *rest)


def initialize() -> None:
    """Load what ``FASTRNN_BACKEND`` asks for; called once, at import."""
    global layer_ops
    wanted = os.environ.get("FASTRNN_BACKEND") or "auto"
    _check("FASTRNN_BACKEND", wanted, BACKENDS)
    if wanted == "python":
        global reason
        reason = "FASTRNN_BACKEND=python"
        return
    _load()
    if native is None:
        message = f"fastrnn's native library cannot be used: {reason}."
        rebuild = (
            "To build it: pip install --no-build-isolation --force-reinstall --no-deps fastrnn (a C++20 compiler)."
        )
        if wanted == "native":
            raise ImportError(f"{message} {rebuild}")
        warnings.warn(
            f"{message} The Python backend runs instead: the same results, but without the speed, torch.compile and "
            f"torch.export. {rebuild} FASTRNN_BACKEND=python silences this warning.",
            stacklevel=3,
        )
    layer_ops = _native_ops


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run everything in the block on one backend; for tests and comparisons, and not per thread.

    Parameters
    ----------
    name : "auto", "native" or "python".

    Raises
    ------
    ValueError : for another name.
    RuntimeError : for "native" where the native library is not loaded.
    """
    global layer_ops
    if name not in BACKENDS:
        raise ValueError(f"backend should be one of auto, native or python, got: {name!r}")
    if name == "native" and _native_ops is None:
        raise RuntimeError(f"fastrnn's native library cannot be used: {reason}")
    before = layer_ops
    layer_ops = None if name == "python" else _native_ops
    try:
        yield
    finally:
        layer_ops = before


def choose(tensor: Tensor, features: bool) -> str:
    """The implementation for a tensor's device: "native", "torch" or "python".

    A device without native kernels (mps, xpu, CUDA on a CPU build) runs torch's own op, unless a feature is in use
    that torch's op has not: lengths, resets, per-step states.
    """
    if tensor.is_cpu or tensor.is_meta or (native_cuda and tensor.is_cuda):
        return "python" if layer_ops is None else "native"
    return "python" if features else "torch"


def native_layer(cell: str, *arguments: Any) -> list[Tensor]:
    """The native op, with the arguments of `python_layer`: output, final states, per-step states for need_steps.

    Its own binding takes half of the time of torch.ops off the call of a small layer, and declines where something
    watches the calls of torch.ops. torch.compile cannot ask it.
    """
    assert native is not None and layer_ops is not None
    if not torch.compiler.is_compiling():
        result = native.layers[cell](*arguments)
        if result is not None:
            return result
    return layer_ops[cell](*arguments, False)[:-1]  # but the reserve


def native_cell(cell: str, input: Tensor, hx: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor] | None:
    """A layer of one step, without its dimension: the new states; None where the call has to go by torch.ops."""
    assert native is not None
    return None if torch.compiler.is_compiling() else native.cells[cell](input, hx, weights)


def traced_by_fx(input: object) -> bool:
    """Whether torch.fx.symbolic_trace has called, which needs `node_of`."""
    return isinstance(input, Proxy)


def node_of(module: torch.nn.Module, input: Any, *options: Any) -> Any:
    """A call of the module as one node, which the trace makes by itself of modules whose name begins with torch.nn."""
    while options and options[-1] is None:
        options = options[:-1]
    tracer = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (input, *options), {})


def native_stack(cell: str, *arguments: Any) -> list[Tensor] | None:
    """All layers of a stack of one direction beside one another: output and final states.

    None where they have to be called one after another: where that is faster, where something watches, and where more
    is asked for than these results.
    """
    assert native is not None
    return None if torch.compiler.is_compiling() else native.stacks[cell](*arguments)


def python_layer(
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
    """The reference behind the checks and the autocast that the native op has in C++."""
    device = input.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        input, *rest = (
            tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
            for tensor in (input, *hx, *weights)
        )
        hx, weights = rest[: len(hx)], rest[len(hx) :]
        with torch.autocast(device, enabled=False):
            return python_layer(
                cell, input, hx, weights, lengths, reset, batch_sizes, bidirectional, batch_first, need_steps
            )
    _check_layer(cell, input, hx, weights, batch_sizes, bidirectional, batch_first)
    if lengths is not None:
        check_lengths_range(lengths, input.shape[1 if batch_first else 0])
    return reference.layer(
        cell, input, hx, weights, lengths, reset, batch_sizes, bidirectional, batch_first, need_steps
    )


def check_lengths_range(lengths: Tensor, steps: int) -> None:
    """The native op's own check of the values, where they lie on the CPU and can be read."""
    if not lengths.is_cpu or torch.compiler.is_compiling():
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(lengths):  # under vmap: the lengths of all samples
        lengths = torch._C._functorch.get_unwrapped(lengths)
    wrong = ((lengths < 0) | (lengths > steps)).nonzero()
    if len(wrong) > 0:
        where = wrong[0].tolist()
        value, index = int(lengths[tuple(where)]), where[0] if len(where) == 1 else where
        raise RuntimeError(f"lengths should be between 0 and {steps}, got {value} at index {index}")


def _check_layer(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bidirectional: bool,
    batch_first: bool,
) -> None:
    """The native op's own checks: what would broadcast, promote or be read past its end without a word."""
    spec, directions = reference.CELLS[cell], 2 if bidirectional else 1
    if not input.is_floating_point():
        raise RuntimeError(f"Expected a floating point input, got {input.dtype}")
    per_direction = len(weights) // directions
    if per_direction * directions != len(weights) or not 2 <= per_direction <= 5:
        raise RuntimeError(f"Expected 2 to 5 weights for each of {directions} directions, got {len(weights)}")
    projected = per_direction % 2 == 1
    if projected and cell != "lstm":
        raise RuntimeError(f"Only the LSTM has a projection, got {per_direction} weights")
    if len(hx) not in (0, spec.states):
        raise RuntimeError(f"Expected {spec.states} initial states or none, got {len(hx)}")
    dims = 3 if batch_sizes is None else 2
    if input.dim() != dims:
        raise RuntimeError(f"input must have {dims} dimensions, got {input.dim()}")
    check_matrices(weights[0], weights[1])
    inputs, outputs = weights[0].shape[1], weights[1].shape[1]
    if input.shape[-1] != inputs:
        raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {inputs}, got {input.shape[-1]}")

    units = weights[per_direction - 1].shape[-1] if projected else outputs
    rows = spec.gates * units
    expected: list[tuple[str, tuple[int, ...]]] = [("w_ih", (rows, inputs)), ("w_hh", (rows, outputs))]
    if per_direction >= 4:
        expected += [("b_ih", (rows,)), ("b_hh", (rows,))]
    if projected:
        expected.append(("w_hr", (outputs, units)))
    for weight, (name, shape) in zip(weights, expected * directions, strict=True):
        _check_tensor(weight, input, "parameter", name, shape)

    if batch_sizes is None:
        steps, batch = (input.shape[1], input.shape[0]) if batch_first else (input.shape[0], input.shape[1])
    else:
        batch = packed_batch(batch_sizes)
        steps = len(batch_sizes)
    if steps == 0:
        raise RuntimeError(_NO_STEPS)
    for state, name, size in zip(hx, ("h0", "c0"), (outputs, units), strict=False):
        _check_tensor(state, input, "hidden", name, (directions, batch, size))
    if batch_sizes is not None:
        _check_batch_sizes(batch_sizes, batch, input.shape[0])


_NO_STEPS = "Expected sequence length to be larger than 0 in RNN"


def _check_tensor(tensor: Tensor, input: Tensor, what: str, name: str, shape: tuple[int, ...]) -> None:
    if tensor.device != input.device:
        raise RuntimeError(
            f"Input and {what} tensors are not at the same device, found input tensor at {input.device} "
            f"and {what} tensor at {tensor.device}"
        )
    if tensor.dtype != input.dtype:
        raise RuntimeError(
            f"Input and {what} tensors are not the same dtype, found input tensor with {input.dtype} "
            f"and {name} with {tensor.dtype}"
        )
    if tensor.dim() != len(shape):
        raise RuntimeError(f"Expected {name} to be {len(shape)}-D, got {tensor.dim()}-D")
    if tensor.shape != shape:
        raise RuntimeError(f"Expected {name} size {list(shape)}, got {list(tensor.shape)}")


def check_matrices(w_ih: Tensor, w_hh: Tensor) -> None:
    """Both must be matrices before anything is read off their shapes."""
    if w_ih.dim() != 2 or w_hh.dim() != 2:
        raise RuntimeError(f"Expected w_ih and w_hh to be 2-D, got {w_ih.dim()}-D and {w_hh.dim()}-D")


def packed_batch(batch_sizes: Tensor) -> int:
    """The batch size of packed rows, the first of their batch sizes."""
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or not (batch_sizes.is_cpu or batch_sizes.is_meta):
        raise RuntimeError("batch_sizes should be a 1-D int64 tensor on the CPU")
    if len(batch_sizes) == 0:
        raise RuntimeError(_NO_STEPS)
    return batch_sizes[0] if torch.jit.is_tracing() else int(batch_sizes[0])  # type: ignore[return-value]


def _check_batch_sizes(batch_sizes: Tensor, batch: int, rows: int) -> None:
    before = batch
    for step, size in enumerate(batch_sizes.tolist()):
        if not 0 < size <= before:
            raise RuntimeError(
                f"batch_sizes should be positive, not increasing, and begin with the batch size {batch}, "
                f"got {size} at step {step}"
            )
        before = size
    if int(batch_sizes.sum()) != rows:
        raise RuntimeError(f"Expected batch_sizes to add up to {rows} rows, got {int(batch_sizes.sum())}")


def wants_states() -> bool:
    """Whether initial states must be tensors even where they are zeros.

    torch.export keeps an empty list as it is, but AOTInductor then calls the op with None in its place. ONNX has a
    way of its own to say zeros: nothing.
    """
    return torch.compiler.is_exporting() and not torch.onnx.is_in_onnx_export()


def zero_states(cell: str, input: Tensor, weights: Sequence[Tensor], rows: int, batch: int) -> list[Tensor]:
    """Initial states ``[rows, batch, P or H]``, for the LSTM also ``[rows, batch, H]``."""
    check_matrices(weights[0], weights[1])
    spec = reference.CELLS[cell]
    sizes = [weights[1].shape[1], weights[1].shape[0] // spec.gates]
    return [input.new_zeros(rows, batch, size) for size in sizes[: spec.states]]


def torch_layers(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, ...]:
    """All layers by torch's own op: output and final states."""
    function: Any = getattr(torch._VF, cell)
    if not hx:
        batch = input.shape[0 if batch_first else 1] if batch_sizes is None else packed_batch(batch_sizes)
        hx = zero_states(cell, input, weights, num_layers * (2 if bidirectional else 1), batch)
    states: Any = hx[0] if len(hx) == 1 else tuple(hx)
    shared = (has_biases, num_layers, dropout, training, bidirectional)
    if batch_sizes is None:
        return function(input, states, weights, *shared, batch_first)
    return function(input, batch_sizes, states, weights, *shared)


def torch_cell(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, ...]:
    """One step by torch's own op: the new states."""
    states = tuple(hx) or (input.new_zeros(input.shape[0], w_hh.shape[1]),) * reference.CELLS[cell].states
    result = getattr(torch._VF, f"{cell}_cell")(input, states if cell == "lstm" else states[0], w_ih, w_hh, b_ih, b_hh)
    return result if cell == "lstm" else (result,)
