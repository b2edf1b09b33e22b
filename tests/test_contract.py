"""What makes a drop-in: constructors, errors, attributes, state and serialisation as in torch.nn."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from cases import data, module, parametrize, small
from torch.nn.utils import parametrizations, prune

import fastrnn

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")

CONSTRUCTORS = [
    (("RNN", "LSTM", "GRU", *CELLS), (3, 5), {}),
    (("RNN", "LSTM", "GRU"), (3, 5, 2), {"bias": False, "batch_first": True, "dropout": 0.5, "bidirectional": True}),
    (("RNN", "LSTM", "GRU", *CELLS), (3, 5), {"bias": False, "dtype": torch.float64, "device": "cpu"}),
    (("RNN",), (3, 5, 2, "relu", False, True, 0.1, True), {}),
    (("RNN",), (3, 5), {"nonlinearity": "relu"}),
    (("LSTM",), (3, 5, 2, True, False, 0.0, True, 2), {}),
    (("GRU",), (3, 5, 2, False, True, 0.25, True), {}),
    (("RNNCell",), (3, 5, True, "relu"), {}),
]


def both(name, *args, **kwargs):
    built = []
    for library in (fastrnn, torch.nn):
        torch.manual_seed(2)
        built.append(getattr(library, name)(*args, **kwargs))
    return built


def outcome(function):
    """The type and message of what a call raises, or None."""
    try:
        function()
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize("name, args, kwargs", [(n, a, k) for names, a, k in CONSTRUCTORS for n in names])
def test_same_seed_same_module(name, args, kwargs):
    ours, theirs = both(name, *args, **kwargs)
    assert isinstance(ours, torch.nn.RNNBase | torch.nn.RNNCellBase)
    assert not isinstance(ours, getattr(torch.nn, name))
    assert repr(ours) == repr(theirs)
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in theirs.named_parameters()]
    mine, other = vars(ours).copy(), vars(theirs).copy()
    for key in ("_parameters", "_flat_weights", "_flat_weight_refs"):
        mine.pop(key, None), other.pop(key, None)
    assert mine == other
    for one, two in (ours, theirs), (theirs, ours):
        one.load_state_dict(two.state_dict())
    if name in LAYERS:
        assert [w is p for w, p in zip(ours._flat_weights, ours.parameters(), strict=True)]
        assert [len(layer) for layer in ours.all_weights] == [len(layer) for layer in theirs.all_weights]
        assert ours.flatten_parameters() is None
    assert ours.__constants__ == theirs.__constants__


@pytest.mark.parametrize(
    "name, args, kwargs",
    [
        *((name, (3, 5, 2), {"dropout": bad}) for name in LAYERS for bad in (-0.1, 1.1, True, "0.5")),
        *((name, (3, 5, 2), {flag: 1}) for name in LAYERS for flag in ("bias", "batch_first")),
        *((name, sizes, {}) for name in LAYERS for sizes in ((3.0, 5), (0, 5), (3, 5.0), (3, 0), (3, 5, 0), (3, -1))),
        *((name, (3,), {}) for name in LAYERS + CELLS),
        *((name, (3, 5), {"proj_size": 2}) for name in ("RNN", "GRU")),
        *(("LSTM", (3, 5), {"proj_size": bad}) for bad in (-1, 5, 6)),
        ("RNN", (3, 5), {"nonlinearity": "silu"}),
        ("RNN", (3, 5, 1, "silu"), {}),
    ],
)
def test_constructor_errors(name, args, kwargs):
    ours = outcome(lambda: getattr(fastrnn, name)(*args, **kwargs))
    theirs = outcome(lambda: getattr(torch.nn, name)(*args, **kwargs))
    assert theirs is not None
    assert ours[0] == theirs[0]
    if ours[0] is not TypeError or "of type" in theirs[1]:  # the interpreter's own message names the class
        assert ours == theirs


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_warning(name):
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last recurrent layer"):
        getattr(fastrnn, name)(3, 5, dropout=0.5)


@pytest.mark.parametrize("name", CELLS)
def test_cells_do_not_validate_and_may_be_empty(name, backend):
    ours, theirs = both(name, 3, 0)
    input = torch.randn(2, 3)
    if outcome(lambda: theirs(input)) is None:
        torch.testing.assert_close(ours(input), theirs(input))


def _packed(*sizes, features=3):
    return torch.nn.utils.rnn.pack_sequence([torch.randn(n, features) for n in sizes])


def _pair(*shape):
    return torch.randn(*shape), torch.randn(*shape)


BAD_CALLS = {
    "1-D input": lambda lstm: (torch.randn(3),),
    "4-D input": lambda lstm: (torch.randn(1, 1, 1, 3),),
    "features": lambda lstm: (torch.randn(4, 2, 7),),
    "features, unbatched": lambda lstm: (torch.randn(4, 7),),
    "dtype": lambda lstm: (torch.randn(4, 2, 3).double(),),
    "hidden of an unbatched input": lambda lstm: (torch.randn(4, 3), _state(lstm, 1, 1, 5)),
    "hidden of a batched input": lambda lstm: (torch.randn(4, 2, 3), _state(lstm, 1, 5)),
    "batch of hidden": lambda lstm: (torch.randn(4, 2, 3), _state(lstm, 1, 3, 5)),
    "layers of hidden": lambda lstm: (torch.randn(4, 2, 3), _state(lstm, 2, 2, 5)),
    "size of hidden": lambda lstm: (torch.randn(4, 2, 3), _state(lstm, 1, 2, 6)),
    "size of cell state": lambda lstm: (
        torch.randn(4, 2, 3),
        (torch.randn(1, 2, 5), torch.randn(1, 2, 6)) if lstm else torch.randn(1, 2, 6),
    ),
    "no steps": lambda lstm: (torch.randn(0, 2, 3),),
}
BAD_PACKED_CALLS = {
    "features, packed": lambda: (_packed(4, 2, features=7),),
    "dtype, packed": lambda: (_packed(4, 2).to(torch.float64),),
    "hidden, packed": lambda: (_packed(4, 2), torch.randn(1, 3, 5)),
}


def _state(lstm, *shape):
    return _pair(*shape) if lstm else torch.randn(*shape)


@pytest.mark.parametrize("what", BAD_CALLS)
@pytest.mark.parametrize("name", LAYERS)
def test_call_errors(name, what, backend):
    ours, theirs = both(name, 3, 5)
    arguments = BAD_CALLS[what](name == "LSTM")
    found, expected = outcome(lambda: ours(*arguments)), outcome(lambda: theirs(*arguments))
    assert expected is not None
    assert found[0] == expected[0]
    assert found[1].split("\n")[0].split(" (")[0] == expected[1].split("\n")[0].split(" (")[0]


@pytest.mark.parametrize("what", BAD_PACKED_CALLS)
@pytest.mark.parametrize("name", ("RNN", "GRU"))
def test_packed_call_errors(name, what, backend):
    ours, theirs = both(name, 3, 5)
    arguments = BAD_PACKED_CALLS[what]()
    found, expected = outcome(lambda: ours(*arguments)), outcome(lambda: theirs(*arguments))
    assert expected is not None
    assert found == expected


@pytest.mark.parametrize(
    "arguments",
    [
        (_packed(4, 2, features=7),),
        (_packed(4, 2).to(torch.float64),),
        (_packed(4, 2), _pair(1, 3, 5)),
        (_packed(4, 2), _pair(2, 2, 5)),
    ],
    ids=["features", "dtype", "batch", "layers"],
)
def test_packed_call_errors_of_lstm(arguments, backend):
    """torch.nn.LSTM leaves these to the op, and so do we; the op's words are its own."""
    with pytest.raises(RuntimeError):
        fastrnn.LSTM(3, 5)(*arguments)


@pytest.mark.parametrize("name", CELLS)
def test_cell_call_errors(name, backend):
    ours, theirs = both(name, 3, 5)
    lstm = name == "LSTMCell"
    for arguments in (
        (torch.randn(1, 1, 3),),
        (torch.randn(()),),
        (torch.randn(2, 3), _state(lstm, 1, 2, 5)),
        (torch.randn(2, 4),),
        (torch.randn(2, 3), _state(lstm, 4, 5)),
        (torch.randn(2, 3), _state(lstm, 2, 6)),
        (torch.randn(3), _state(lstm, 6)),
    ):
        found, expected = outcome(lambda: ours(*arguments)), outcome(lambda: theirs(*arguments))  # noqa: B023
        assert expected is not None
        assert (found[0], found[1].split("\n")[0]) == (expected[0], expected[1].split("\n")[0])
    if name == "RNNCell":
        for net in (ours, theirs):
            net.nonlinearity = "silu"
        found, expected = (outcome(lambda net=net: net(torch.randn(2, 3))) for net in (ours, theirs))
        assert found == expected == (RuntimeError, "Unknown nonlinearity: silu")


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("bias", [True, False])
def test_cell_modules(name, bias, backend):
    ours, theirs = both(name, 3, 5, bias)
    batched = (torch.randn(7, 3), _state(name == "LSTMCell", 7, 5))
    single = (torch.randn(3), _state(name == "LSTMCell", 5))
    for arguments in (batched, single, batched[:1], single[:1]):
        torch.testing.assert_close(ours(*arguments), theirs(*arguments))
    if not bias:
        assert ours.bias_ih is None
        assert ours.bias_hh is None


def _save(net):
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def _pickle(net):
    return pickle.loads(pickle.dumps(net))


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickle, _save])
@parametrize(small(num_layers=2, bidirectional=True))
def test_copies(case, copied, backend):
    net = module(case)
    twin = copied(net)
    input, hx = data(case)
    torch.testing.assert_close(twin(input, hx), net(input, hx), rtol=0, atol=0)
    assert type(twin) is type(net)
    assert all(a is b for a, b in zip(twin._flat_weights, twin.parameters(), strict=True))
    with torch.no_grad():
        twin.weight_ih_l0.zero_()
    assert net.weight_ih_l0.any()


def test_old_pickles(backend):
    """From before proj_size, and from before the names were kept in place of the weights."""
    net = fastrnn.GRU(3, 5, 2, bidirectional=True)
    state = net.__getstate__()
    assert "_flat_weight_refs" not in state
    old = {
        key: value for key, value in state.items() if key not in ("proj_size", "_all_weights", "_flat_weights_names")
    }
    old["all_weights"] = [[getattr(net, name) for name in names] for names in net._all_weights]
    twin = fastrnn.GRU.__new__(fastrnn.GRU)
    twin.__setstate__(old)
    assert twin.proj_size == 0
    assert twin._all_weights == net._all_weights
    input = torch.randn(4, 2, 3)
    torch.testing.assert_close(twin(input), net(input), rtol=0, atol=0)


def test_weights_are_looked_up_anew(backend):
    """Assignment, conversion, and a parameter that is no longer one all show in the next call."""
    net = fastrnn.LSTM(3, 5)
    input = torch.randn(4, 2, 3)
    before = net(input)[0]
    net.weight_ih_l0 = torch.nn.Parameter(2 * net.weight_ih_l0.detach())
    assert net._flat_weights[0] is net.weight_ih_l0
    assert not torch.equal(net(input)[0], before)
    assert net.double()(input.double())[0].dtype == torch.float64
    parametrized = parametrizations.weight_norm(fastrnn.GRU(3, 5), "weight_hh_l0")
    twin = torch.nn.GRU(3, 5)
    twin.load_state_dict({name: getattr(parametrized, name).detach() for name in twin.state_dict()})
    torch.testing.assert_close(parametrized(input), twin(input))
    parametrized(input)[0].sum().backward()
    assert parametrized.parametrizations.weight_hh_l0.original0.grad is not None
    pruned = prune.l1_unstructured(fastrnn.GRU(3, 5), "weight_ih_l0", 0.5)
    pruned(input)[0].sum().backward()
    assert not pruned.weight_ih_l0_orig.grad[pruned.weight_ih_l0_mask == 0].any()


def test_no_reference_cycle():
    net = fastrnn.LSTM(3, 5)
    alive = weakref.ref(net)
    gc.collect()
    gc.disable()
    try:
        net(torch.randn(4, 2, 3))
        del net
        assert alive() is None
    finally:
        gc.enable()


def test_meta_device():
    net = fastrnn.LSTM(3, 5, 2, bidirectional=True, device="meta")
    output, (h_n, c_n) = net(torch.empty(4, 2, 3, device="meta"))
    assert (output.shape, h_n.shape, c_n.shape) == ((4, 2, 10), (4, 2, 5), (4, 2, 5))
    assert net.to_empty(device="cpu")(torch.randn(4, 2, 3))[0].shape == (4, 2, 10)


def test_nothing_is_said_in_ordinary_use(backend):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = fastrnn.LSTM(3, 5, 2, dropout=0.5, bidirectional=True, proj_size=2)
        net(torch.randn(4, 2, 3))[0].sum().backward()
