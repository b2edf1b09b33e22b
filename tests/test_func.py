"""torch.func and forward-mode AD over modules, on the native ops, against the same functions of the reference."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.testing import assert_close

import fastrnn

CELLS = {
    "rnn_tanh": fastrnn.RNN,
    "lstm": fastrnn.LSTM,
    "lstm_proj": lambda *sizes, **flags: fastrnn.LSTM(*sizes, proj_size=2, **flags),
    "gru": fastrnn.GRU,
}
STACKS = [{}, {"num_layers": 2, "bidirectional": True}, {"bidirectional": True, "bias": False, "batch_first": True}]
STEPS, BATCH, INPUTS, HIDDEN = 4, 3, 2, 3


@pytest.fixture(autouse=True)
def _native():
    if fastrnn._backend.native is None:
        pytest.skip("the native library is not loaded, and what is tested here are its rules")


def build(cell, flags, seed=0):
    torch.manual_seed(seed)
    net = CELLS[cell](INPUTS, HIDDEN, dtype=torch.float64, **flags)
    return net, {name: value.detach() for name, value in net.named_parameters()}


def inputs(flags, *lead, batch=BATCH):
    shape = (batch, STEPS) if flags.get("batch_first") else (STEPS, batch)
    return torch.randn(*lead, *shape, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def scalar(net, **options):
    """Of parameters and input: a weighted sum of everything that the module returns."""

    def function(parameters, input):
        output, hidden = functional_call(net, parameters, (input,), options)
        hidden = hidden if isinstance(hidden, tuple) else (hidden,)
        return sum(
            (t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in (output, *hidden)
        )

    return function


def both(function):
    """Compare a function's result on the native ops with that on the reference."""
    native = function()
    with fastrnn.backend("python"):
        expected = function()
    assert_close(native, expected, rtol=1e-9, atol=1e-11)


def options(flags, which):
    lengths = torch.tensor([4, 0, 2])
    reset = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    reset[0, 0] = reset[2, 2] = reset[3, 0] = True
    reset = reset.T.contiguous() if flags.get("batch_first") else reset
    return {"plain": {}, "features": {"lengths": lengths, "reset": reset}}[which]


matrix = pytest.mark.parametrize("flags", STACKS, ids=["one", "stacked", "both_ways"])
cells = pytest.mark.parametrize("cell", CELLS)
features = pytest.mark.parametrize("which", ["plain", "features"])


@cells
@matrix
@features
def test_grad_and_vmap_over_inputs(cell, flags, which):
    net, parameters = build(cell, flags)
    loss = scalar(net, **options(flags, which))
    x = inputs(flags, 5)
    both(lambda: grad(loss, argnums=(0, 1))(parameters, x[0]))
    both(lambda: vmap(loss, in_dims=(None, 0))(parameters, x))
    both(lambda: vmap(loss, in_dims=(None, 2))(parameters, x.movedim(0, 2)))
    both(lambda: vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0))(parameters, x))
    both(lambda: grad(lambda p: vmap(loss, in_dims=(None, 0))(p, x).sum())(parameters))


@cells
@matrix
@features
def test_per_sample_gradients_are_those_of_single_calls(cell, flags, which):
    net, parameters = build(cell, flags)
    loss = scalar(net, **options(flags, which))
    x = inputs(flags, 4)
    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(len(x)):
        assert_close({name: value[i] for name, value in found.items()}, grad(loss)(parameters, x[i]))


@cells
@matrix
def test_ensemble(cell, flags):
    nets = [build(cell, flags, seed)[0] for seed in range(3)]
    parameters, _ = stack_module_state(nets)
    parameters = {name: value.detach() for name, value in parameters.items()}
    loss = scalar(nets[0])
    x = inputs(flags)
    found = vmap(loss, in_dims=(0, None))(parameters, x)
    assert_close(found, torch.stack([scalar(net)(dict(net.named_parameters()), x) for net in nets]).detach())
    both(lambda: vmap(grad(loss), in_dims=(0, None))(parameters, x))
    both(lambda: vmap(vmap(grad(loss), in_dims=(None, 0)), in_dims=(0, None))(parameters, inputs(flags, 2)))


@cells
@matrix
@features
def test_jacobians_and_tangents(cell, flags, which):
    net, parameters = build(cell, flags)
    loss = scalar(net, **options(flags, which))
    x = inputs(flags)

    def output(x):
        return functional_call(net, parameters, (x,), options(flags, which))[0]

    both(lambda: jacrev(output)(x))
    both(lambda: jacfwd(output)(x))
    both(lambda: jvp(output, (x,), (x.cos(),)))
    both(lambda: jvp(lambda p: loss(p, x), (parameters,), ({k: v.sin() for k, v in parameters.items()},)))
    both(lambda: jvp(grad(loss, argnums=1), (parameters, x), ({k: v.sin() for k, v in parameters.items()}, x.cos())))
    assert_close(jacrev(output)(x), jacfwd(output)(x))


@cells
def test_hessian(cell):
    net, parameters = build(cell, {})
    x = inputs({})[:2, :1]
    loss = scalar(net)

    def of_recurrent_weights(w):
        return loss({**parameters, "weight_hh_l0": w}, x)

    w = parameters["weight_hh_l0"]
    both(lambda: hessian(of_recurrent_weights)(w))
    both(lambda: jacrev(jacrev(of_recurrent_weights))(w))
    assert_close(hessian(of_recurrent_weights)(w), jacrev(jacrev(of_recurrent_weights))(w))


@cells
@matrix
def test_forward_ad(cell, flags):
    net, _ = build(cell, flags)
    x = inputs(flags)

    def tangent():
        with forward_ad.dual_level():
            output, _ = net(forward_ad.make_dual(x, x.sin()))
            return forward_ad.unpack_dual(output).tangent

    assert tangent() is not None
    both(tangent)


@pytest.mark.parametrize("cell", [fastrnn.RNNCell, fastrnn.LSTMCell, fastrnn.GRUCell])
def test_cells(cell):
    torch.manual_seed(0)
    net = cell(INPUTS, HIDDEN, dtype=torch.float64)
    parameters = {name: value.detach() for name, value in net.named_parameters()}

    def loss(parameters, x):
        state = functional_call(net, parameters, (x,))
        return (state[0] if isinstance(state, tuple) else state).square().sum()

    x = torch.randn(5, BATCH, INPUTS, dtype=torch.float64)
    both(lambda: vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0))(parameters, x))
    both(lambda: hessian(loss, argnums=1)(parameters, x[0]))


def test_packed_rows_are_refused_or_right_under_vmap():
    net, parameters = build("gru", {})
    packed = torch.nn.utils.rnn.pack_padded_sequence(inputs({}), torch.tensor([4, 2, 1]))

    def loss(parameters, data):
        batch = torch.nn.utils.rnn.PackedSequence(data, packed.batch_sizes)
        return functional_call(net, parameters, (batch,))[0].data.square().sum()

    data = torch.stack([packed.data, packed.data.cos()])
    both(lambda: vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0))(parameters, data))


def test_vmap_over_nothing():
    net = fastrnn.GRU(INPUTS, HIDDEN)
    with pytest.raises(ValueError, match="vmap over a dimension of size 0"):
        vmap(lambda input: net(input)[0])(torch.randn(0, STEPS, BATCH, INPUTS))
