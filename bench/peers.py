"""Other runtimes as peers in inference: ONNX Runtime and OpenVINO, on a graph with a recurrent node for each layer."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.layers import Problem, Variant

# Where ONNX's gates (LSTM: i, o, f, c; GRU: z, r, h) stand in torch's order (LSTM: i, f, g, o; GRU: r, z, n).
GATE_ORDER = {"rnn": (0,), "lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}


class MissingPeerError(RuntimeError):
    """A peer's package is not installed."""


def _require(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MissingPeerError(f"the peer needs the package {package}: python -m pip install {package}") from None


def peer_variant(peer: str, problem: Problem, threads: int) -> Variant:
    """The problem's work in inference, float32, by the named runtime with that many threads.

    A case with resets is run without them: like torch.nn, these runtimes have none.
    """
    forward = peer_runner(peer, onnx_model(problem), peer_inputs(problem), threads)
    # With resets torch's plain call, which has none either, is what the peer must reproduce.
    return Variant(peer, forward, lambda results: problem.pack(torch.from_numpy(results[0])[:, 0]), expected="torch")


def peer_runner(peer: str, model: bytes, inputs: Mapping[str, Any], threads: int = 1) -> Callable[[], Sequence[Any]]:
    """A call that runs a graph in the named runtime on inputs bound beforehand: its outputs as NumPy arrays."""
    return _RUNTIMES[peer](model, inputs, threads)


def require_peer(peer: str) -> None:
    """Raise `MissingPeerError` with one line of advice if the peer cannot run here."""
    _require("onnx")
    _require(peer)


def onnx_model(problem: Problem) -> bytes:
    """A problem's work as a graph: what the case needs of X, lengths, h0 and c0 goes in, Y comes out."""
    return recurrent_graph(problem.reference, problem.case.steps, problem.case.batch, list(peer_inputs(problem)))


def recurrent_graph(
    module: nn.RNNBase, steps: int, batch: int, given: Sequence[str], outputs: Sequence[str] = ("Y",)
) -> bytes:
    """A serialised ONNX graph of one node for each layer: a time-major module of torch.nn in float32.

    Parameters
    ----------
    module : nn.RNNBase
        RNN, LSTM without projection or GRU, with biases. Several layers: of one direction, from zeros, for Y alone.
    steps, batch : int
        T and N, fixed in the graph.
    given : sequence of str
        The inputs: X ``[T, N, I]`` and any of lengths (int32 ``[N]``), h0 and c0 (``[D, N, H]``).
    outputs : sequence of str
        Any of Y ``[T, D, N, H]``, Y_h and Y_c ``[D, N, H]``.
    """
    onnx = _require("onnx")
    helper, float32, int32 = onnx.helper, onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
    cell, _, activation = module.mode.lower().partition("_")
    directions, layers = 2 if module.bidirectional else 1, module.num_layers
    if layers > 1 and (directions > 1 or {"h0", "c0"} & {*given} or {"Y_h", "Y_c"} & {*outputs}):
        raise ValueError("a graph of several layers has one direction, and neither takes nor gives their states")
    initializers = []

    def constant(name: str, value: Tensor) -> str:
        initializers.append(onnx.numpy_helper.from_array(value.numpy(), name))
        return name

    def weight(name: str, layer: int, *parameters: str) -> str:
        """Parameters of torch, gates reordered, one after the other, direction by direction."""
        parts = [
            torch.cat([_reorder(getattr(module, f"{parameter}_l{layer}{suffix}"), cell) for parameter in parameters])
            for suffix in ("", "_reverse")[:directions]
        ]
        return constant(f"{name}{layer}", torch.stack(parts))

    state = [directions, batch, module.hidden_size]
    sizes = {"X": [steps, batch, module.input_size], "lengths": [batch], "h0": state, "c0": state}
    sizes |= {"Y": [steps, *state], "Y_h": state, "Y_c": state}
    attributes: dict[str, Any] = {"direction": "bidirectional" if module.bidirectional else "forward"}
    if cell == "gru":
        attributes["linear_before_reset"] = 1
    if activation:
        attributes["activations"] = [activation.capitalize()] * directions
    results = ("Y", "Y_h", "Y_c") if cell == "lstm" else ("Y", "Y_h")
    optional = ("lengths", "h0", "c0") if cell == "lstm" else ("lengths", "h0")
    nodes, x = [], "X"
    for layer in range(layers):
        last = layer == layers - 1
        parameters = [
            weight("W", layer, "weight_ih"),
            weight("R", layer, "weight_hh"),
            weight("B", layer, "bias_ih", "bias_hh"),
        ]
        inputs = [x, *parameters, *(name if name in given else "" for name in optional)]
        made = [name if name in outputs else "" for name in results] if last else [f"Y{layer}"]
        nodes.append(helper.make_node(cell.upper(), inputs, made, hidden_size=module.hidden_size, **attributes))
        if not last:  # the next layer's input has no dimension of directions
            x = f"X{layer + 1}"
            nodes.append(helper.make_node("Squeeze", [f"Y{layer}", constant(f"axis{layer}", torch.tensor([1]))], [x]))
    graph = helper.make_graph(
        nodes,
        cell,
        [helper.make_tensor_value_info(name, int32 if name == "lengths" else float32, sizes[name]) for name in given],
        [helper.make_tensor_value_info(name, float32, sizes[name]) for name in outputs],
        initializers,
    )
    # Versions that runtimes of the last years read; the helper's own default may be newer than the runtime.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def peer_inputs(problem: Problem) -> dict[str, Any]:
    """The graph's inputs as NumPy arrays."""
    inputs = {"X": problem.input}
    if problem.case.ragged:
        inputs["lengths"] = problem.case.lengths().int()
    if problem.hx is not None:
        parts = problem.hx if isinstance(problem.hx, tuple) else (problem.hx,)
        inputs |= dict(zip(("h0", "c0"), parts, strict=False))
    return {name: value.numpy() for name, value in inputs.items()}


def _reorder(parameter: Tensor, cell: str) -> Tensor:
    """A weight or bias ``[G*H, ...]`` with its gates in ONNX's order."""
    gates = parameter.detach().chunk(len(GATE_ORDER[cell]))
    return torch.cat([gates[gate] for gate in GATE_ORDER[cell]])


def _onnxruntime(model: bytes, inputs: Mapping[str, Any], threads: int) -> Callable[[], Sequence[Any]]:
    runtime = _require("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Its threads may spin during a call, as torch's do, but not after it: the next in turn needs the cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, inputs)


def _openvino(model: bytes, inputs: Mapping[str, Any], threads: int) -> Callable[[], Sequence[Any]]:
    openvino = _require("openvino")
    core = openvino.Core()
    config = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    request = core.compile_model(core.read_model(model), "CPU", config).create_infer_request()
    return lambda: request.infer(inputs, share_inputs=True, share_outputs=True).to_tuple()


_RUNTIMES = {"onnxruntime": _onnxruntime, "openvino": _openvino}
