"""How parameters begin: recurrent_init and forget_bias; without them, exactly as in torch.nn."""

import copy
import pickle

import pytest
import torch

import fastrnn

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}


def build(name, *args, seed=3, **options):
    torch.manual_seed(seed)
    return getattr(fastrnn, name)(3, 5, *args, **options)


def plain(name, *args, **options):
    torch.manual_seed(3)
    return getattr(torch.nn, name)(3, 5, *args, **options)


def orthonormal(gate):
    wide = gate.double()
    rows, columns = wide.shape
    product = wide.T @ wide if rows >= columns else wide @ wide.T
    torch.testing.assert_close(product, torch.eye(min(rows, columns)).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name, options",
    [
        *((name, {"num_layers": 2, "bidirectional": True}) for name in LAYERS),
        ("LSTM", {"proj_size": 2}),
        *((name, {"bias": False}) for name in CELLS),
        ("RNN", {"nonlinearity": "relu"}),
    ],
)
def test_orthogonal_recurrent_weights(name, options):
    net, other = build(name, **options, recurrent_init="orthogonal"), plain(name, **options)
    before = dict(other.named_parameters())
    seen = 0
    for key, parameter in net.named_parameters():
        if key.startswith("weight_hh"):
            gates = parameter.detach().split(5)
            assert len(gates) == GATES[name.removesuffix("Cell")]
            for gate in gates:
                orthonormal(gate)
            assert all(not torch.equal(gate, gates[0]) for gate in gates[1:])
            seen += 1
        else:  # the same seed still gives torch's own numbers
            assert torch.equal(parameter, before[key]), key
    assert seen == options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)


@pytest.mark.parametrize("name, options", [("LSTM", {"num_layers": 2, "bidirectional": True}), ("LSTMCell", {})])
def test_forget_bias(name, options):
    net, other = build(name, **options, forget_bias=1), plain(name, **options)
    before = dict(other.named_parameters())
    parameters = dict(net.named_parameters())
    forget = torch.arange(20).reshape(4, 5)[1]  # i, f, g, o
    for key, parameter in parameters.items():
        if "bias_ih" in key:
            both = parameter + parameters[key.replace("bias_ih", "bias_hh")]
            assert torch.equal(both[forget], torch.ones(5)), key
        kept = torch.ones(len(parameter), dtype=torch.bool)
        kept[forget] = "bias" not in key
        assert torch.equal(parameter[kept], before[key][kept]), key


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_defaults_are_those_of_torch(name):
    net, other = build(name, recurrent_init="uniform"), plain(name)
    state = torch.get_rng_state()
    for key, parameter in net.named_parameters():
        assert torch.equal(parameter, other.get_parameter(key)), key
    build(name)
    assert torch.equal(torch.get_rng_state(), state)
    assert vars(net).keys() == vars(other).keys()
    assert repr(net) == repr(other)


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_options_are_kept(name, backend):
    net = build(name, recurrent_init="orthogonal", forget_bias=-2)
    assert repr(net) == f"{name}(3, 5, recurrent_init=orthogonal, forget_bias=-2.0)"
    assert net.state_dict().keys() == plain(name).state_dict().keys()
    original = {key: value.clone() for key, value in net.state_dict().items()}
    there = fastrnn.to_torch(net)
    assert type(there) is getattr(torch.nn, name)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), fastrnn.convert(there)):
        assert repr(twin) == repr(net)
        torch.manual_seed(3)
        twin.reset_parameters()
        assert all(torch.equal(value, original[key]) for key, value in twin.state_dict().items())
    twin.load_state_dict(plain(name).state_dict())  # what is loaded counts, not how it began
    input = torch.randn(7, 3)
    torch.testing.assert_close(twin(input), plain(name)(input))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes_and_devices(dtype):
    net = build("LSTM", recurrent_init="orthogonal", forget_bias=1, dtype=dtype)
    assert net.weight_hh_l0.dtype == dtype
    half = dtype != torch.float64
    product = net.weight_hh_l0.detach()[:5].double() @ net.weight_hh_l0.detach()[:5].double().T
    torch.testing.assert_close(product, torch.eye(5).double(), rtol=0, atol=3e-2 if half else 1e-12)
    state = torch.get_rng_state()
    empty = torch.nn.utils.skip_init(fastrnn.LSTM, 3, 5, recurrent_init="orthogonal", dtype=dtype)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn
    torch.manual_seed(3)
    empty.forget_bias = 1.0
    empty.reset_parameters()
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in empty.state_dict().items())


def test_no_hidden_units():
    assert fastrnn.GRUCell(3, 0, recurrent_init="orthogonal").weight_hh.shape == (0, 0)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_bad_options(name):
    cls = getattr(fastrnn, name)
    with pytest.raises(ValueError, match="recurrent_init should be 'uniform' or 'orthogonal', got: 'identity'"):
        cls(3, 5, recurrent_init="identity")
    if "LSTM" in name:
        for bad, kind in (("1", "str"), (True, "bool"), (torch.ones(()), "Tensor")):
            with pytest.raises(TypeError, match=f"forget_bias should be a number or None, got: {kind}"):
                cls(3, 5, forget_bias=bad)
        with pytest.raises(ValueError, match="forget_bias needs bias=True"):
            cls(3, 5, bias=False, forget_bias=1.0)
    else:
        error = TypeError if "Cell" in name else ValueError
        with pytest.raises(error, match="forget_bias"):
            cls(3, 5, forget_bias=1.0)


def test_parametrized_weights_are_not_reset_in_silence():
    net = torch.nn.utils.parametrizations.weight_norm(build("GRU", recurrent_init="orthogonal"), "weight_hh_l0")
    with pytest.raises(RuntimeError, match="cannot initialise weight_hh_l0: it is parametrized or pruned"):
        net.reset_parameters()
