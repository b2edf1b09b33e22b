"""The functions by themselves: dropout's mask, the cells, and arguments that contradict each other."""

import pytest
import torch
from cases import data, module, parametrize, small, tensors
from tolerance import check
from torch.nn.utils.rnn import pack_sequence

import fastrnn
from fastrnn import _backend, functional, reference


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("layout", ["time_major", "batch_first", "packed", "unbatched"])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_dropout_draws_the_mask_of_torch(name, layout, p, backend):
    """With the identity-like second layer any other mask shows; p = 1 leaves the bias alone."""
    shared = {"num_layers": 3, "dropout": p, "batch_first": layout == "batch_first", "bidirectional": True}
    torch.manual_seed(1)
    theirs = getattr(torch.nn, name)(3, 5, **shared)
    ours = getattr(fastrnn, name)(3, 5, **shared)
    ours.load_state_dict(theirs.state_dict())
    input = torch.randn(17, 3) if layout == "unbatched" else torch.randn(17, 7, 3)
    if layout == "packed":
        input = pack_sequence([torch.randn(n, 3) for n in (17, 9, 9, 1)])
    results = []
    for net in (ours, theirs):
        torch.manual_seed(3)
        output, hidden = net(input)
        results.append((output.data, hidden, torch.rand(2)))  # the generator is left where torch leaves it
    torch.testing.assert_close(*results)
    ours.eval()
    assert not torch.allclose(ours(input)[0].data, results[0][0])


def test_dropout_multiplies_by_the_mask_itself(backend):
    """Element by element: relu of an identity shows the mask and nothing else."""
    net = fastrnn.RNN(9, 9, 2, "relu", bias=False, batch_first=True, dropout=0.5)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            weight.copy_(torch.eye(9) if "ih" in name else torch.zeros(9, 9))
    torch.manual_seed(5)
    found = net(torch.ones(4, 6, 9))[0]
    torch.manual_seed(5)
    mask = torch.empty(6, 4, 9).bernoulli_(0.5).div_(0.5)
    assert torch.equal(found, mask.transpose(0, 1))


@parametrize(small(num_layers=2, bidirectional=True))
def test_functions_are_what_the_modules_run(case, backend):
    net = module(case)
    input, hx = data(case)
    function = {"rnn": functional.rnn, "lstm": functional.lstm, "gru": functional.gru}[case.kind.split("_")[0]]
    extra = {"nonlinearity": "relu"} if case.kind == "rnn_relu" else {}
    weights = [weight for layer in net.all_weights for weight in layer]
    found = function(input, hx, weights, True, 2, 0.0, True, True, False, lengths=torch.tensor([3, 1, 2]), **extra)
    torch.testing.assert_close(found, net(input, hx, torch.tensor([3, 1, 2])), rtol=0, atol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch, size", [(1, 1), (3, 17), (17, 129)])
@pytest.mark.parametrize("cell", ["lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"])
def test_cells_against_torch(cell, batch, size, bias, backend):
    states, gates = (2, 4) if cell == "lstm_cell" else (1, 3 if cell == "gru_cell" else 1)
    input = torch.randn(batch, 3, dtype=torch.float64, requires_grad=True)
    hx = [torch.randn(batch, size, dtype=torch.float64, requires_grad=True) for _ in range(states)]
    shapes = [(gates * size, 3), (gates * size, size)] + [(gates * size,)] * 2 * bias
    weights = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    hidden = tuple(hx) if states == 2 else hx[0]
    extra = {"nonlinearity": cell.split("_")[1]} if "rnn" in cell else {}
    name = "rnn_cell" if "rnn" in cell else cell
    found = getattr(functional, name)(input, hidden, *weights, **extra)
    expected = getattr(torch._VF, cell)(input, hidden, *weights)
    torch.testing.assert_close(found, expected)
    grads = [
        torch.autograd.grad(sum(t.square().sum() for t in (r if states == 2 else (r,))), [input, *hx, *weights])
        for r in (found, expected)
    ]
    torch.testing.assert_close(*grads)
    none = getattr(functional, name)(input, None, *weights, **extra)
    zeros = [torch.zeros_like(state) for state in hx]
    torch.testing.assert_close(none, getattr(torch._VF, cell)(input, zeros if states == 2 else zeros[0], *weights))


def test_contradictions(backend):
    weights = [torch.randn(9, 3), torch.randn(9, 3), torch.randn(9), torch.randn(9)]
    input = torch.randn(4, 2, 3)
    for wrong in (
        {"has_biases": False},
        {"num_layers": 3},
        {"bidirectional": True, "has_biases": True},
    ):
        with pytest.raises(ValueError, match="weights should hold"):
            functional.gru(input, None, weights, **wrong)
    with pytest.raises(ValueError, match="both or neither"):
        functional.gru_cell(input[0], None, weights[0], weights[1], weights[2])
    with pytest.raises(ValueError, match="Unknown nonlinearity 'silu'"):
        functional.rnn(input, None, weights, nonlinearity="silu")


@pytest.mark.parametrize(
    "input, hx",
    [
        (torch.randn(4, 2, 5), None),
        (torch.randn(4, 2, 3), torch.randn(1, 1, 3)),
        (torch.randn(4, 2, 3), torch.randn(2, 2, 3)),
        (torch.randn(4, 2, 3), torch.randn(1, 2, 4)),
        (torch.randn(4, 2, 3).double(), None),
        (torch.randn(4, 2, 3), torch.randn(1, 2, 3).double()),
    ],
    ids=["features", "broadcast batch", "layers", "hidden", "dtype", "hidden dtype"],
)
def test_wrong_tensors_do_not_broadcast_or_promote(input, hx, backend):
    weights = [torch.randn(9, 3), torch.randn(9, 3), torch.randn(9), torch.randn(9)]
    with pytest.raises(RuntimeError):
        functional.gru(input, hx, weights)


@parametrize(small(num_layers=2, bidirectional=True) + small(layout="sorted") + small(layout="batch_first", hx=False))
def test_device_without_native_kernels_runs_the_op_of_torch(case, monkeypatch):
    """No such device is at hand, so the choice is what is replaced."""
    monkeypatch.setattr(_backend, "choose", lambda tensor, features: "python" if features else "torch")
    input, hx = data(case)
    found, expected = module(case)(input, hx), module(case, torch.nn)(input, hx)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    if case.layout == "time_major":
        lengths = torch.tensor([3, 1, 2])
        with fastrnn.backend("python"):
            torch.testing.assert_close(module(case)(input, hx, lengths), module(case)(input, hx, lengths))


def test_device_of_a_tensor_decides(monkeypatch):
    class Elsewhere:
        is_cpu = is_meta = is_cuda = False

    assert _backend.choose(Elsewhere(), features=False) == "torch"
    assert _backend.choose(Elsewhere(), features=True) == "python"
    on_cuda = Elsewhere()
    on_cuda.is_cuda = True
    monkeypatch.setattr(_backend, "native_cuda", False)
    assert _backend.choose(on_cuda, features=False) == "torch"
    monkeypatch.setattr(_backend, "native_cuda", True)
    monkeypatch.setattr(_backend, "layer_ops", {})
    assert _backend.choose(on_cuda, features=True) == "native"
    assert _backend.choose(torch.ones(1), features=True) == "native"
    monkeypatch.setattr(_backend, "layer_ops", None)
    assert _backend.choose(torch.ones(1), features=False) == "python"


@pytest.mark.parametrize(
    "low, high", [(-20, -9), (-9, -4), (-4, -2), (-2, -1), (-1, 1), (1, 2), (2, 4), (4, 9), (9, 20)]
)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_activations_piece_by_piece(cell, low, high, backend):
    """A derivative near saturation is tiny: only a piece by itself shows whether it is still exact."""
    size, gates = 17, reference.CELLS[cell].gates
    name = cell.split("_")[0] + "_cell"

    def run(function, dtype):
        input = torch.linspace(low, high, 4001).to(dtype).unsqueeze(1).requires_grad_()
        weights = [torch.ones(gates * size, 1, dtype=dtype), torch.zeros(gates * size, size, dtype=dtype)]
        zeros = torch.zeros(len(input), size, dtype=dtype)
        states = function(input, (zeros, zeros) if cell == "lstm" else zeros, *weights)
        states = states if isinstance(states, tuple) else (states,)
        return [*states, torch.autograd.grad(sum(state[:, 0].sum() for state in states), input)[0]]

    ours = run(getattr(functional, name), torch.float32)
    theirs, oracle = (run(getattr(torch._VF, f"{cell}_cell"), dtype) for dtype in (torch.float32, torch.float64))
    for what, *results in zip(("h", *["c"] * (len(ours) - 2), "gradient"), ours, theirs, oracle, strict=True):
        check(what, *results)


def _lstm(**changes):
    """Arguments of functional.lstm that are right, but for the changes; w_ih, w_hh, b_ih, b_hh by name."""
    shapes = {"w_ih": (12, 2), "w_hh": (12, 3), "b_ih": (12,), "b_hh": (12,)}
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    weights |= {name: changes.pop(name) for name in shapes if name in changes}
    return {"input": torch.randn(4, 5, 2), "hx": None, "weights": list(weights.values())} | changes


def _packed(sizes, **changes):
    return _lstm(**{"input": torch.randn(9, 2), "batch_sizes": torch.tensor(sizes), **changes})


_STATES = torch.zeros(1, 5, 3), torch.zeros(1, 5, 3)
_BAD = {
    "input 1-D": (_lstm(input=torch.randn(2)), RuntimeError, "must have 3 dimensions"),
    "input 2-D": (_lstm(input=torch.randn(4, 2)), RuntimeError, "must have 3 dimensions"),
    "input 4-D": (_lstm(input=torch.randn(1, 4, 5, 2)), RuntimeError, "must have 3 dimensions"),
    "packed input 3-D": (_packed([5, 4], input=torch.randn(3, 3, 2)), RuntimeError, "must have 2 dimensions"),
    "complex": (_lstm(input=torch.randn(4, 5, 2, dtype=torch.cfloat)), RuntimeError, "floating point"),
    "integers": (_lstm(input=torch.ones(4, 5, 2, dtype=torch.long)), RuntimeError, "floating point"),
    "no steps": (_lstm(input=torch.randn(0, 5, 2)), RuntimeError, "larger than 0"),
    "w_ih 1-D": (_lstm(w_ih=torch.randn(12)), RuntimeError, "w_ih and w_hh to be 2-D"),
    "w_ih of few rows": (_lstm(w_ih=torch.randn(9, 2)), RuntimeError, "w_ih size"),
    "w_hh 1-D": (_lstm(w_hh=torch.randn(12)), RuntimeError, "w_ih and w_hh to be 2-D"),
    "w_hh 1-D, packed": (_packed([5, 4], w_hh=torch.randn(12)), RuntimeError, "w_ih and w_hh to be 2-D"),
    "w_hh of another width": (_lstm(w_hh=torch.randn(12, 4)), RuntimeError, "size"),
    "w_hh of another dtype": (_lstm(w_hh=torch.randn(12, 3).double()), RuntimeError, "same dtype"),
    "b_ih that broadcasts": (_lstm(b_ih=torch.randn(1)), RuntimeError, "b_ih size"),
    "b_hh that broadcasts": (_lstm(b_hh=torch.randn(1)), RuntimeError, "b_hh size"),
    "b_hh 2-D": (_lstm(b_hh=torch.randn(1, 12)), RuntimeError, "b_hh to be 1-D"),
    "hx a tensor": (_lstm(hx=torch.zeros(2, 1, 5, 3)), TypeError, r"tuple \(h_0, c_0\)"),
    "hx one state": (_lstm(hx=_STATES[:1]), RuntimeError, "2 initial states"),
    "hx 2-D": (_lstm(hx=(_STATES[0][0], _STATES[1])), RuntimeError, "h0 to be 3-D"),
    "c_0 that broadcasts": (_lstm(hx=(_STATES[0], torch.zeros(1, 1, 3))), RuntimeError, "c0 size"),
    "hx of a packed batch": (_packed([5, 4], hx=(torch.zeros(1, 4, 3),) * 2), RuntimeError, "4"),
    "batch_sizes int32": (_packed([5, 4], batch_sizes=torch.tensor([5, 4]).int()), RuntimeError, "1-D int64"),
    "batch_sizes 2-D": (_packed([[5, 4]]), RuntimeError, "1-D int64"),
    "batch_sizes empty": (_packed([], batch_sizes=torch.tensor([]).long()), RuntimeError, "larger than 0"),
    "batch_sizes increasing": (_packed([4, 5]), RuntimeError, "not increasing"),
    "batch_sizes zero": (_packed([9, 0]), RuntimeError, "positive"),
    "batch_sizes of fewer rows": (_packed([5, 3]), RuntimeError, "add up to 9 rows, got 8"),
    "batch_sizes of more rows": (_packed([5, 5]), RuntimeError, "add up to 9 rows, got 10"),
    "no layers": (_lstm(num_layers=0), ValueError, "num_layers should be at least 1"),
}


@pytest.mark.parametrize("arguments, error, words", _BAD.values(), ids=_BAD)
def test_bad_arguments_are_refused_alike(arguments, error, words, backend):
    with pytest.raises(error, match=words) as caught:
        functional.lstm(**arguments)
    assert caught.type is error


@pytest.mark.parametrize("batch_sizes", [None, torch.tensor([5, 4])])
def test_what_the_bad_arguments_are_changes_of_is_right(batch_sizes, backend):
    functional.lstm(**_lstm() if batch_sizes is None else _packed([5, 4]))


_CELL = {"input": torch.randn(5, 2), "hx": None, "w_ih": torch.randn(3, 2), "w_hh": torch.randn(3, 3)}


@pytest.mark.parametrize(
    "change",
    [
        {"input": torch.randn(2)},
        {"input": torch.randn(1, 5, 2)},
        {"hx": torch.zeros(3)},
        {"w_ih": torch.randn(6)},
        {"w_hh": torch.randn(3)},
        {"w_hh": torch.randn(3, 4)},
        {"b_ih": torch.randn(1), "b_hh": torch.randn(3)},
    ],
    ids=["input 1-D", "input 3-D", "hx 1-D", "w_ih 1-D", "w_hh 1-D", "w_hh of another width", "b_ih"],
)
def test_bad_arguments_of_a_cell_are_refused_alike(change, backend):
    functional.rnn_cell(**_CELL)
    with pytest.raises(RuntimeError) as caught:
        functional.rnn_cell(**_CELL | change)
    assert caught.type is RuntimeError


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_states_of_a_cell_may_be_changed_in_place(name, backend):
    """They are no views, so that truncated backpropagation may cut them off in place."""
    cell = getattr(fastrnn, name)(3, 5)
    for state in tensors(cell(torch.randn(2, 3))):
        assert state._base is None
        state.detach_()
        assert not state.requires_grad
    with torch.no_grad():
        states = tensors(cell(torch.randn(2, 3)))
    factor = torch.ones(2, 5, requires_grad=True)
    for state in states:
        assert state.mul_(factor).requires_grad


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells_without_units_have_gradients(name, backend):
    cell, x = getattr(fastrnn, name)(3, 0), torch.randn(2, 3, requires_grad=True)
    sum(state.sum() for state in tensors(cell(x))).backward()
    assert torch.equal(x.grad, torch.zeros(2, 3))


def test_no_states_are_not_a_pair(backend):
    with pytest.raises(IndexError, match="tuple index out of range"):
        fastrnn.LSTM(3, 5)(torch.randn(7, 2, 3), ())
    with pytest.raises(RuntimeError, match="lstm_cell expects two hidden states"):
        fastrnn.LSTMCell(3, 5)(torch.randn(2, 3), ())


def test_lstm_cell_wants_a_pair(backend):
    with pytest.raises(TypeError, match=r"tuple \(h_0, c_0\)"):
        functional.lstm_cell(torch.randn(5, 2), torch.zeros(2, 5, 3), torch.randn(12, 2), torch.randn(12, 3))
