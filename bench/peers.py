"""Other runtimes as peers in inference: ONNX Runtime and OpenVINO, each on a graph of one recurrent node."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from bench.layers import Problem, Variant

PEERS = ("onnxruntime", "openvino")

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
    return {"onnxruntime": _onnxruntime, "openvino": _openvino}[peer](problem, threads)


def require_peer(peer: str) -> None:
    """Raise `MissingPeerError` with one line of advice if the peer cannot run here."""
    _require("onnx")
    _require(peer)


def onnx_model(problem: Problem) -> bytes:
    """A serialised ONNX graph of one node: X ``[T, N, I]``, and what the case needs of h0, c0 and lengths; gives Y."""
    onnx = _require("onnx")
    helper, float32, int32 = onnx.helper, onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
    case, cell = problem.case, problem.cell

    def weight(name: str, *parameters: str) -> Any:
        """Parameters of torch, gates reordered, one after the other, with ONNX's leading dimension of directions."""
        parts = [_reorder(getattr(problem.reference, parameter), cell) for parameter in parameters]
        return onnx.numpy_helper.from_array(torch.cat(parts)[None].numpy(), name)

    sizes = {"X": [case.steps, case.batch, case.input_size], "lengths": [case.batch]}
    sizes |= {name: [1, case.batch, case.hidden_size] for name in ("h0", "c0")}
    given = list(peer_inputs(problem))
    attributes = {"linear_before_reset": 1} if cell == "gru" else {}
    node = helper.make_node(
        cell.upper(),
        ["X", "W", "R", "B", *(name if name in given else "" for name in ("lengths", "h0", "c0"))][
            : 7 if cell == "lstm" else 6
        ],
        ["Y"],
        hidden_size=case.hidden_size,
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        cell,
        [helper.make_tensor_value_info(name, int32 if name == "lengths" else float32, sizes[name]) for name in given],
        [helper.make_tensor_value_info("Y", float32, [case.steps, 1, case.batch, case.hidden_size])],
        [weight("W", "weight_ih_l0"), weight("R", "weight_hh_l0"), weight("B", "bias_ih_l0", "bias_hh_l0")],
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


def _variant(peer: str, problem: Problem, forward: Any) -> Variant:
    """``forward`` returns Y ``[T, 1, N, H]`` as a NumPy array."""
    # With resets torch's plain call, which has none either, is what the peer must reproduce.
    return Variant(peer, forward, lambda y: problem.pack(torch.from_numpy(y)[:, 0]), expected="torch")


def _onnxruntime(problem: Problem, threads: int) -> Variant:
    runtime = _require("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Its threads may spin during a call, as torch's do, but not after it: the next in turn needs the cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = runtime.InferenceSession(onnx_model(problem), options, providers=["CPUExecutionProvider"])
    inputs = peer_inputs(problem)
    return _variant("onnxruntime", problem, lambda: session.run(None, inputs)[0])


def _openvino(problem: Problem, threads: int) -> Variant:
    openvino = _require("openvino")
    core = openvino.Core()
    config = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    request = core.compile_model(core.read_model(onnx_model(problem)), "CPU", config).create_infer_request()
    inputs = peer_inputs(problem)
    return _variant(
        "openvino", problem, lambda: request.infer(inputs, share_inputs=True, share_outputs=True).to_tuple()[0]
    )
