"""torch.compile, torch.export and AOTInductor: one graph for all sizes, the same numbers as without."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.func import functional_call, grad_and_value

import fastrnn

pytestmark = pytest.mark.usefixtures("native")

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
# What differs between the cells is in the operator: the slow suite tries them all, the fast one one of them.
LSTM_FIRST = ["LSTM", *(pytest.param(name, marks=pytest.mark.slow) for name in ("RNN", "GRU"))]
LSTM_CELL_FIRST = ["LSTMCell", *(pytest.param(name, marks=pytest.mark.slow) for name in ("RNNCell", "GRUCell"))]
# No two sizes alike, nor like a size of the weights, in a first call: dynamo would take them for one. Not 1, at which
# dynamo always compiles anew.
ONLY_ONE_CHANGES = [(7, 8), (9, 8), (17, 8), (17, 6), (17, 11)]


@pytest.fixture(autouse=True)
def _forget():
    torch._dynamo.reset()


def leaves(value):
    return torch.utils._pytree.tree_leaves(value)


def arguments(net, steps, batch, hx=True, features=True):
    """Input, initial state, lengths and resets of a module with 3 inputs and 5 units."""
    input = torch.randn(*((batch, steps) if net.batch_first else (steps, batch)), 3)
    rows = net.num_layers * (2 if net.bidirectional else 1)
    states = tuple(torch.randn(2, rows, batch, 5))
    lengths, reset = torch.arange(batch) % (steps + 1), torch.rand(input.shape[:2]) < 0.3
    states = (states if isinstance(net, fastrnn.LSTM) else states[0]) if hx else None
    return (input, states, *((lengths, reset) if features else (None, None)))


def same(compiled, net, *given, training=True):
    found, expected = leaves(compiled(*given)), leaves(net(*given))
    torch.testing.assert_close(found, expected)
    if training:
        gradients = [
            torch.autograd.grad(sum(t.square().sum() for t in result), [*net.parameters()])
            for result in (found, expected)
        ]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["training", "inference"])
@pytest.mark.parametrize("dynamic", [True, pytest.param(None, marks=pytest.mark.slow)], ids=["dynamic", "automatic"])
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "zeros"])
@pytest.mark.parametrize("features", [True, False], ids=["features", "plain"])
@pytest.mark.parametrize("name", LSTM_FIRST)
def test_no_graph_for_another_size(name, features, hx, dynamic, training):
    """Only T changes, then only N: with dynamic=True no other graph, else at most one more for each of the two."""
    net = getattr(fastrnn, name)(3, 5, 2, bidirectional=True).train(training).requires_grad_(training)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend=counter)
    counts = []
    for sizes in ONLY_ONE_CHANGES:
        same(compiled, net, *arguments(net, *sizes, hx, features), training=training)
        counts.append(counter.frame_count)
    if dynamic:
        assert len(set(counts)) == 1
    else:
        assert counts[-1] - counts[0] <= 2


@pytest.mark.parametrize("name", CELLS)
def test_no_graph_for_another_batch_of_a_cell(name):
    net = getattr(fastrnn, name)(3, 5)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=counter)
    counts = set()
    for batch in (4, 7, 17):
        hx = tuple(torch.randn(2, batch, 5))
        same(compiled, net, torch.randn(batch, 3), hx if name == "LSTMCell" else hx[0])
        counts.add(counter.frame_count)
    assert len(counts) == 1


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
def test_functional(name):
    net = getattr(fastrnn, name.upper())(3, 5, 2)
    function = getattr(fastrnn.functional, name)
    counter = CompileCounterWithBackend("aot_eager")

    def call(input, hx, lengths, reset):
        return function(input, hx, net._weights(), num_layers=2, lengths=lengths, reset=reset)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    counts = set()
    for sizes in ONLY_ONE_CHANGES[::2]:
        given = arguments(net, *sizes)
        torch.testing.assert_close(compiled(*given), net(*given))
        counts.add(counter.frame_count)
    assert len(counts) == 1


@pytest.mark.parametrize(
    "name, dynamic", [("LSTM", True), *(pytest.param(n, None, marks=pytest.mark.slow) for n in ("RNN", "GRU"))]
)
def test_inductor(name, dynamic):
    net = getattr(fastrnn, name)(3, 5, 2, bidirectional=True, batch_first=True)
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic)
    for sizes in ((7, 4), (9, 6)):
        same(compiled, net, *arguments(net, *sizes))
    with torch.no_grad():
        same(compiled, net, *arguments(net, 3, 17), training=False)


@pytest.mark.parametrize("name", LSTM_CELL_FIRST)
def test_inductor_cells(name):
    net = getattr(fastrnn, name)(3, 5)
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    for batch in (4, 7):
        same(compiled, net, torch.randn(batch, 3))


@pytest.mark.parametrize("name", LAYERS)
def test_per_sample_gradients(name):
    net = getattr(fastrnn, name)(3, 5)
    weights = {key: value.detach() for key, value in net.named_parameters()}

    def loss(weights, input):
        return functional_call(net, weights, (input,))[0].square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))
    input = torch.randn(7, 4, 3)
    compiled = torch.compile(per_sample, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weights, input), per_sample(weights, input))


@pytest.mark.parametrize("name", LAYERS)
def test_whole_training_step(name):
    """Forward, backward and update in one graph."""
    net = getattr(fastrnn, name)(3, 5)

    def loss(weights, input):
        return functional_call(net, weights, (input,))[0].square().mean()

    def step(weights, input):
        gradients, value = grad_and_value(loss)(weights, input)
        return {key: weight - 0.1 * gradients[key] for key, weight in weights.items()}, value

    runs = []
    for function in (step, torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")):
        torch.manual_seed(1)
        weights, losses = {key: value.detach() for key, value in net.named_parameters()}, []
        for sizes in ((7, 4), (9, 6), (3, 17)):
            weights, value = function(weights, torch.randn(*sizes, 3))
            losses.append(value)
        runs.append((weights, losses))
    torch.testing.assert_close(*runs)


class Model(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.rnn = getattr(fastrnn, name)(3, 5, 2, bidirectional=True)
        self.head = torch.nn.Linear(10, 2)

    def forward(self, input, hx=None, lengths=None, reset=None):
        output, hidden = self.rnn(input, hx, lengths, reset)
        return self.head(output), hidden


def exported(name, hx, features, strict):
    model = Model(name).eval()
    steps, batch = Dim("steps", max=4096), Dim("batch", max=4096)
    states = ({1: batch}, {1: batch}) if name == "LSTM" else {1: batch}
    shapes = {
        "input": {0: steps, 1: batch},
        "hx": states if hx else None,
        "lengths": {0: batch} if features else None,
        "reset": {0: steps, 1: batch} if features else None,
    }
    example = arguments(model.rnn, 6, 4, hx, features)
    return model, torch.export.export(model, example, dynamic_shapes=shapes, strict=strict)


SIZES = [(6, 4), (9, 17), (1, 1), (2, 1)]


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("hx, features", [(True, True), (False, False), (False, True)])
@pytest.mark.parametrize("name", LSTM_FIRST)
def test_export_saved_and_loaded(name, hx, features, strict, tmp_path):
    model, program = exported(name, hx, features, strict)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for sizes in SIZES:
        given = arguments(model.rnn, *sizes, hx, features)
        torch.testing.assert_close(loaded(*given), model(*given), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name, hx, features", [("LSTM", False, True), ("RNN", True, False), ("GRU", True, False)])
def test_aot_inductor(name, hx, features, tmp_path):
    model, program = exported(name, hx, features, strict=False)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for sizes in SIZES:
        given = arguments(model.rnn, *sizes, hx, features)
        torch.testing.assert_close(loaded(*given), model(*given))


@pytest.mark.slow
def test_aot_inductor_cells(tmp_path):
    for name in CELLS:
        cell = getattr(fastrnn, name)(3, 5).eval()
        program = torch.export.export(cell, (torch.randn(4, 3),), dynamic_shapes=({0: Dim("batch", max=99)},))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / f"{name}.pt2"))
        input = torch.randn(17, 3)
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(input), cell(input))


def test_errors_are_those_of_an_eager_call():
    net = torch.compile(fastrnn.GRU(3, 5), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"input.size\(-1\) must be equal to input_size. Expected 3, got 4"):
        net(torch.randn(7, 4, 4))
    with pytest.raises(Exception, match="lengths should be between 0 and 7, got 8"):
        net(torch.randn(7, 4, 3), None, torch.tensor([1, 2, 3, 8]))
