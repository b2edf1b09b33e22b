"""Export to ONNX's standard operators, checked by running the file in ONNX Runtime with other sizes."""

import pytest
import torch
from torch.export import Dim

import fastrnn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.usefixtures("native")

BOTH_WAYS = {"num_layers": 2, "bidirectional": True}
MODELS = [
    pytest.param("LSTM", {}, False, False, marks=pytest.mark.slow),
    ("LSTM", BOTH_WAYS, True, True),
    ("LSTM", {**BOTH_WAYS, "batch_first": True, "bias": False}, False, True),
    ("GRU", BOTH_WAYS, True, True),
    pytest.param("GRU", {"batch_first": True, "bias": False}, True, False, marks=pytest.mark.slow),
    pytest.param("RNN", {"bidirectional": True}, True, True, marks=pytest.mark.slow),
    ("RNN", {**BOTH_WAYS, "nonlinearity": "relu"}, False, False),
]


class Tagger(torch.nn.Module):
    """One of our modules in front of one of torch's."""

    def __init__(self, name, options):
        super().__init__()
        self.rnn = getattr(fastrnn, name)(3, 5, **options)
        self.head = torch.nn.Linear(10 if options.get("bidirectional") else 5, 2)

    def forward(self, input, hx=None, lengths=None):
        output, hidden = self.rnn(input, hx, lengths)
        return self.head(output), hidden


def arguments(net, steps, batch, hx, lengths):
    input = torch.randn(*((batch, steps) if net.batch_first else (steps, batch)), 3)
    rows = net.num_layers * (2 if net.bidirectional else 1)
    states = torch.randn(2, rows, batch, 5)
    states = None if not hx else tuple(states) if isinstance(net, fastrnn.LSTM) else states[0]
    valid = torch.arange(batch) % (steps + 1)  # 0 and, with enough rows, T among them
    return input, states, valid if lengths else None


def run(program, path, *arguments):
    """The outputs of the saved file, and how often each operator is in it."""
    program.save(path)
    proto = onnx.load(path)
    onnx.checker.check_model(proto)
    assert {opset.domain for opset in proto.opset_import} == {""}  # nothing but the standard
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = [leaf for leaf in torch.utils._pytree.tree_leaves(arguments) if leaf is not None]
    names = [value.name for value in session.get_inputs()]
    results = session.run(None, dict(zip(names, [leaf.numpy() for leaf in given], strict=True)))
    operators = [node.op_type for node in proto.graph.node]
    return [torch.from_numpy(result) for result in results], operators


@pytest.mark.parametrize("name, options, hx, lengths", MODELS)
def test_standard_operators(name, options, hx, lengths, tmp_path):
    torch.manual_seed(0)
    model = Tagger(name, options).eval()
    net, path = model.rnn, str(tmp_path / "model.onnx")
    steps, batch = Dim("steps", max=4096), Dim("batch", max=4096)
    states = ({1: batch}, {1: batch}) if name == "LSTM" else {1: batch}
    shapes = {
        "input": {0: batch, 1: steps} if net.batch_first else {0: steps, 1: batch},
        "hx": states if hx else None,
        "lengths": {0: batch} if lengths else None,
    }
    example = arguments(net, 6, 4, hx, lengths)
    program = fastrnn.onnx.export(model, example, dynamic_shapes=shapes, verbose=False)
    for sizes in ((6, 4), (3, 17), (1, 1), (9, 3)):
        given = arguments(net, *sizes, hx, lengths)
        found, operators = run(program, path, *given)
        expected = torch.utils._pytree.tree_leaves(model(*given))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert operators.count(name) == net.num_layers
    assert not {"Loop", "Scan", "If"} & set(operators)


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells(name, tmp_path):
    cell, input = getattr(fastrnn, name)(3, 5).eval(), torch.randn(4, 3)
    program = fastrnn.onnx.export(cell, (input,), dynamic_shapes=({0: Dim("batch", max=99)},), verbose=False)
    input = torch.randn(17, 3)
    found, operators = run(program, str(tmp_path / "cell.onnx"), input)
    expected = torch.utils._pytree.tree_leaves(cell(input))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert operators.count(name.removesuffix("Cell")) == 1


def test_the_table_by_itself_and_an_exported_program(tmp_path):
    net, input = fastrnn.GRU(3, 5).eval(), torch.randn(4, 2, 3)
    program = torch.export.export(net, (input,))
    table = fastrnn.onnx.translation_table()
    by_torch = torch.onnx.export(program, dynamo=True, custom_translation_table=table, verbose=False)
    ours = fastrnn.onnx.export(program, verbose=False)
    for made in (by_torch, ours):
        found, operators = run(made, str(tmp_path / "gru.onnx"), input)
        torch.testing.assert_close(found, list(net(input)), rtol=1e-4, atol=1e-5)
        assert operators.count("GRU") == 1


class Calls(torch.nn.Module):
    """A module that calls ours in one way."""

    def __init__(self, net, call):
        super().__init__()
        self.net, self.call = net, call

    def forward(self, *arguments):
        return torch.utils._pytree.tree_leaves(self.call(self.net, *arguments))


UNSUPPORTED = {
    "reset": (lambda: fastrnn.GRU(3, 5), lambda net, x: net(x, None, None, x[..., 0] > 0)),
    "projection": (lambda: fastrnn.LSTM(3, 5, proj_size=2), lambda net, x: net(x)),
    "cell state of every step": (lambda: fastrnn.LSTM(3, 5), lambda net, x: net.forward_states(x)),
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_what_onnx_cannot_say(what):
    build, call = UNSUPPORTED[what]
    with pytest.raises(RuntimeError, match=f"^ONNX's operator (GRU|LSTM) has no {what}"):
        fastrnn.onnx.export(Calls(build(), call).eval(), (torch.randn(4, 2, 3),), verbose=False)


def test_hidden_states_of_every_step_are_the_output(tmp_path):
    net, input = fastrnn.GRU(3, 5), torch.randn(4, 2, 3)
    model = Calls(net, lambda net, x: net.forward_states(x)).eval()
    found, _ = run(fastrnn.onnx.export(model, (input,), verbose=False), str(tmp_path / "states.onnx"), input)
    torch.testing.assert_close(found, model(input), rtol=1e-4, atol=1e-5)


def test_bad_arguments():
    net, input = fastrnn.GRU(3, 5).eval(), torch.randn(4, 2, 3)
    with pytest.raises(ValueError, match="dynamo=True only"):
        fastrnn.onnx.export(net, (input,), dynamo=False)
    with pytest.raises(torch.onnx.errors.OnnxExporterError):  # torch's own errors stay what they are
        fastrnn.onnx.export(net, (torch.randn(4, 2, 7),), verbose=False)


def test_without_the_native_library(monkeypatch):
    monkeypatch.setattr(fastrnn._backend, "native", None)
    monkeypatch.setattr(fastrnn._backend, "reason", "it was not built")
    with pytest.raises(RuntimeError, match="needs fastrnn's native library, which cannot be used: it was not built"):
        fastrnn.onnx.translation_table()
