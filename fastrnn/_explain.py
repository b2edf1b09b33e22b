"""What was built, and what a call would run: in words, for people."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import _backend

_RECURRENT = {
    "packed": "the recurrent weights packed for the tile once per call",
    "natural": "the recurrent weights read as they lie",
    "product": "the recurrent projection by a general matrix product per step",
}
_PARTS = {
    1: "products of bfloat16 with sums in float32",
    2: "products of float32 in two parts of bfloat16 each (bf16x2)",
    3: "products of float32 in three parts of bfloat16 each (bf16x3)",
}
_SHARD = {
    "none": "a direction to a thread",
    "units": "the units shared among the threads, with a barrier each step",
    "batch": "the batch shared among the threads",
}


def build_info() -> dict[str, Any]:
    """What this installation is.

    Returns
    -------
    dict
        ``backend`` ("native" or "python"), ``reason`` (why it is python, else empty), and from the native library:
        its version, the torch and compiler that it was built with, whether it has CUDA, the CPU capabilities built in,
        ``cpu_capability``, the one in use, ``cpu_bf16``, how bfloat16 is multiplied: "native", by instructions of the
        machine; "none", in float32; or "emulated" (``FASTRNN_CPU_BF16=emulate``); ``cpu_parts``, the same of float32 in
        parts of bfloat16, "native" with AMX; ``cpu_float32``, "bf16x3" if float32 is to be multiplied so
        (``FASTRNN_CPU_FLOAT32``), else "fma"; and ``cpu_gemm``, who multiplies large matrices: "own", the kernels
        themselves, or "library", torch's (``FASTRNN_CPU_GEMM``).
    """
    info: dict[str, Any] = {
        "backend": "python" if _backend.layer_ops is None else "native",
        "reason": _backend.reason,
    }
    if _backend.native is not None:
        info |= _backend.native.build_info()
        info["cpu_capability"] = _backend.native.cpu_capability()
        info["cpu_bf16"] = _backend.native.cpu_bf16()
        info["cpu_float32"] = _backend.native.cpu_float32()
        info["cpu_parts"] = _backend.native.cpu_parts()
        info["cpu_gemm"] = _backend.native.cpu_gemm()
    return info


def explain(
    module: torch.nn.Module,
    input: Any,
    hx: Any = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> str:
    """Say which backend, op and plan a call of a module would run, and why; nothing is run.

    Parameters
    ----------
    module : RNN, LSTM, GRU or one of the Cells of fastrnn.
    input, hx, lengths, reset : what the module would be called with.

    Returns
    -------
    str
        A few lines.

    Raises
    ------
    TypeError
        For a module that is not fastrnn's; ``fastrnn.convert`` makes it one.
    """
    cell = _cell_of(module)
    data = input.data if isinstance(input, PackedSequence) else input
    route = _backend.choose(data, lengths is not None or reset is not None)
    device = str(data.device)
    if route == "torch":
        return f"backend: torch\nop: torch.{cell}\nwhy: fastrnn has no native kernel for {device}"
    if route == "python":
        if _backend.native is None:
            why = f"the native library is not loaded: {_backend.reason}"
        elif _backend.layer_ops is None:
            why = "the Python backend is forced here"
        else:
            why = f"fastrnn has no native kernel for {device}, and torch's op knows no lengths and no reset"
        return f"backend: python\nop: fastrnn.reference.layer, a loop over the steps in Python\nwhy: {why}"
    over = _layout(input, lengths, reset)
    in_turn = f"op: torch.ops.fastrnn.{cell}_layer, one call per layer, {over}"
    if data.is_cpu and _backend.native is not None:
        beside, plans = _plans(module, cell, input, data, hx, lengths)
        at_once = (
            f"op: fastrnn._C.stacks[{cell!r}], one call for all layers, beside one another, each on a thread some "
            f"steps behind the one below, {over}"
        )
        lines = [at_once if beside else in_turn, f"cpu capability: {_backend.native.cpu_capability()}", *plans]
    else:
        lines = [in_turn]
    if data.is_cuda:
        lines.append(
            "kernels: one launch for all steps where the plan has one, else a matrix product and a pointwise kernel "
            "for each step; fastrnn._C.cuda_plan tells, FASTRNN_CUDA_PLAN chooses (docs/cuda.md)"
        )
    return "\n".join(["backend: native", *lines])


def _cell_of(module: torch.nn.Module) -> str:
    name = getattr(module, "_name", None)
    if not isinstance(module, torch.nn.RNNBase | torch.nn.RNNCellBase) or name is None:
        raise TypeError(
            f"explain takes a module of fastrnn, got: {type(module).__module__}.{type(module).__qualname__}"
        )
    kind = name.removesuffix("Cell").lower()
    return f"rnn_{module.nonlinearity}" if kind == "rnn" else kind


def _layout(input: Any, lengths: Tensor | None, reset: Tensor | None) -> str:
    if isinstance(input, PackedSequence):
        return "over the packed rows as they are"
    features = [name for name, value in (("lengths", lengths), ("reset", reset)) if value is not None]
    return f"with {' and '.join(features)}" if features else "over all steps of all rows"


def _dtype_of_call(data: Tensor) -> torch.dtype:
    """What the op computes on: autocast's dtype where it applies; float32 stands for what the op would refuse."""
    autocasts = torch.is_autocast_enabled(data.device.type) and data.dtype != torch.float64
    dtype = torch.get_autocast_dtype(data.device.type) if autocasts else data.dtype
    return dtype if dtype in (torch.float64, torch.bfloat16, torch.float16) else torch.float32


def _plans(module: Any, cell: str, input: Any, data: Tensor, hx: Any, lengths: Tensor | None) -> tuple[bool, list[str]]:
    """Whether the layers run beside one another; a line for the first layer, and one for those above it."""
    assert _backend.native is not None
    steps, batch, ragged = 1, 1, False
    if isinstance(input, PackedSequence):
        steps, batch = len(input.batch_sizes), int(input.batch_sizes[0])
        ragged = int(input.batch_sizes[-1]) < batch
    elif isinstance(module, torch.nn.RNNBase):
        if data.dim() == 3:
            steps, batch = data.shape[1 if module.batch_first else 0], data.shape[0 if module.batch_first else 1]
        else:
            steps = data.shape[0]
    elif data.dim() == 2:
        batch = data.shape[0]
    if lengths is not None:
        ragged = bool((lengths < steps).any())
    proj_size = getattr(module, "proj_size", 0)
    directions = 2 if getattr(module, "bidirectional", False) else 1
    given = [tensor for tensor in (data, *(hx if isinstance(hx, tuple | list) else (hx,))) if tensor is not None]
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (*given, *module.parameters()))
    shapes = {"layer 0": module.input_size}
    layers = getattr(module, "num_layers", 1)
    if layers > 1:
        shapes["the layers above"] = directions * (proj_size or module.hidden_size)
    dtype = str(_dtype_of_call(data)).removeprefix("torch.")
    threads = torch.get_num_threads()
    beside = (
        layers > 1
        and directions == 1
        and not (training or torch.is_autocast_enabled("cpu") or (module.training and module.dropout > 0))
        and not _backend.native.watched()
        and all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in given)  # no subclass, which sees each op
        and _backend.native.side_by_side(
            cell, layers, steps, batch, module.input_size, module.hidden_size, proj_size, dtype, threads, ragged
        )
    )
    lines = []
    for which, input_size in shapes.items():
        plan = _backend.native.plan(
            cell,
            steps,
            batch,
            input_size,
            module.hidden_size,
            proj_size,
            directions,
            dtype,
            training,
            1 if beside else threads,
            ragged=ragged,
            beside=beside,
        )
        lines.append(f"{which}: forward {_words(plan, '')}")
        if training:
            lines.append(f"{which}: backward {_words(plan, 'backward_')}")
    return beside, lines


def _words(plan: dict[str, Any], prefix: str) -> str:
    threads, shard = plan.get(f"{prefix}threads", 1), plan.get(f"{prefix}shard", "none")
    words = [f"on {threads} thread{'' if threads == 1 else 's'}"]
    if threads > 1:
        words.append(_SHARD.get(shard, str(shard)))
    recurrent = plan.get(f"{prefix}recurrent")
    if recurrent is not None:
        words.append(_RECURRENT.get(recurrent, str(recurrent)))
    if parts := plan.get(f"{prefix}parts"):
        words.append(_PARTS[parts])
    if plan.get(f"{prefix}fused_input"):
        words.append("the input multiplied along with them")
    elif ahead := plan.get(f"{prefix}ahead"):
        words.append(f"the input multiplied {ahead} steps at a time")
    return ", ".join(words)
