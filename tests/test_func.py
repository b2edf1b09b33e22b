"""torch.func and forward-mode AD over modules, on the native ops, against the same functions of the reference."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vmap
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map

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


def per_sample(net):
    """A loss of parameters, input, initial state, lengths and reset, each of which may be batched."""

    def function(parameters, input, hx, lengths, reset):
        results = functional_call(net, parameters, (input, hx, lengths, reset))
        return sum(
            (t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in tree_leaves(results)
        )

    return function


ALL_CELLS = {**CELLS, "rnn_relu": lambda *sizes, **flags: fastrnn.RNN(*sizes, nonlinearity="relu", **flags)}


def everything(cell, flags, copies=3):
    """A module, its parameters and those of an ensemble; input, states, lengths and resets, each for all copies."""
    torch.manual_seed(0)
    nets = [ALL_CELLS[cell](INPUTS, HIDDEN, dtype=torch.float64, **flags) for _ in range(copies)]
    weights = {name: value.detach() for name, value in stack_module_state(nets)[0].items()}
    rows = flags.get("num_layers", 1) * (2 if flags.get("bidirectional") else 1)
    states = [torch.randn(copies, rows, BATCH, size, dtype=torch.float64) for size in (HIDDEN, HIDDEN)]
    if cell == "lstm_proj":
        states[0] = states[0][..., :2]
    hx = tuple(states) if cell.startswith("lstm") else states[0]
    x = inputs(flags, copies)
    lengths = torch.tensor([[4, 0, 2], [2, 0, 4], [1, 2, 3]])
    reset = torch.rand(copies, *x.shape[1:3]) < 0.3
    parameters = {name: value[0] for name, value in weights.items()}
    return nets[0], parameters, weights, x, hx, lengths, reset


@pytest.mark.parametrize("cell", ALL_CELLS)
@matrix
def test_vmap_over_any_of_the_arguments(cell, flags):
    net, parameters, weights, x, hx, lengths, reset = everything(cell, flags)
    loss = per_sample(net)
    gradient = grad(loss, argnums=(0, 1, 2))
    one_state = tree_map(lambda state: state[0], hx)
    single = parameters, x[0], one_state, lengths[0], reset[0]
    batched = weights, x, hx, lengths, reset
    choices = [  # which of weights, input, states, lengths, reset
        (True, False, False, True, True),
        (True, True, True, True, True),
        (False, False, False, True, False),
        (False, False, False, False, True),
        (False, False, True, False, False),
        (False, True, False, True, False),
    ]
    for choice in choices:
        arguments = [many if wanted else one for many, one, wanted in zip(batched, single, choice, strict=True)]
        found = vmap(gradient, in_dims=tuple(0 if wanted else None for wanted in choice))(*arguments)
        expected = [
            gradient(
                *(
                    tree_map(lambda t, i=i: t[i], argument) if wanted else argument
                    for argument, wanted in zip(arguments, choice, strict=True)
                )
            )
            for i in range(3)
        ]
        assert_close(found, tree_map(lambda *parts: torch.stack(parts), *expected), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cell", ALL_CELLS)
@matrix
def test_vmap_nested_chunked_and_over_other_dims(cell, flags):
    net, parameters, weights, x, hx, lengths, reset = everything(cell, flags)
    hx = tree_map(lambda state: state[0], hx)
    gradient = grad(per_sample(net), argnums=(0, 1))
    inner = (None, 0, None, 0, None)
    both(lambda: vmap(vmap(gradient, in_dims=inner), in_dims=(0, None, None, None, 0))(weights, x, hx, lengths, reset))
    deep = vmap(vmap(gradient, in_dims=inner), in_dims=(None, 0, None, 0, 0))
    both(
        lambda: vmap(deep, in_dims=(None, -1, None, None, None))(
            parameters,
            torch.stack([torch.stack([x, x.cos()]), torch.stack([x.sin(), -x])], -1),
            hx,
            torch.stack([lengths, lengths.flip(1)]),
            reset[:2],
        )
    )
    whole = vmap(gradient, in_dims=inner)(parameters, x, hx, lengths, reset[0])
    for size in (1, 2):
        chunked = vmap(gradient, in_dims=inner, chunk_size=size)(parameters, x, hx, lengths, reset[0])
        assert_close(chunked, whole, rtol=1e-12, atol=1e-12)
    w = weights["weight_hh_l0"]  # one of the weights alone, and a dimension that is not the first
    both(
        lambda: vmap(lambda w, x: per_sample(net)({**parameters, "weight_hh_l0": w}, x, hx, lengths[0], None), (1, -1))(
            w.movedim(0, 1), x.movedim(0, -1)
        )
    )


@pytest.mark.parametrize("cell", ALL_CELLS)
@pytest.mark.parametrize(
    "flags",
    [STACKS[0], *(pytest.param(flags, marks=pytest.mark.slow) for flags in STACKS[1:])],
    ids=["one", "stacked", "both_ways"],
)
def test_derivatives_of_derivatives_with_features(cell, flags):
    net, parameters, _, x, hx, lengths, reset = everything(cell, flags)
    hx = tree_map(lambda state: state[0], hx)
    loss = per_sample(net)

    def along(scale):  # a curve through everything that has a derivative
        moved = tree_map(lambda t: t + (scale - 1) * t.cos(), (parameters, x[0], hx))
        return loss(*moved, lengths[0], reset[0])

    one = torch.ones((), dtype=torch.float64)
    for first, second in ((jacfwd, jacfwd), (jacfwd, jacrev), (jacrev, jacfwd), (jacrev, jacrev)):
        both(lambda first=first, second=second: first(second(along))(one))
    both(lambda: jacfwd(jacfwd(jacrev(along)))(one))
    both(lambda: vmap(lambda t: jvp(lambda x: loss(parameters, x, hx, lengths[0], reset[0]), (x[0],), (t,))[1])(x))
    both(lambda: vmap(jacfwd(lambda x, n: loss(parameters, x, hx, n, reset[0])))(x, lengths))
    both(lambda: linearize(lambda x: loss(parameters, x, hx, lengths[0], reset[0]), x[0])[1](x[1]))


@pytest.mark.parametrize("batch_first", [False, True])
def test_dropout_under_vmap(batch_first):
    """The masks are vmap's ``randomness``; nobody draws without being told how."""
    net = fastrnn.LSTM(INPUTS, 17, 2, dropout=0.5, batch_first=batch_first)
    x = torch.randn(STEPS, BATCH, INPUTS).expand(3, STEPS, BATCH, INPUTS)
    same = vmap(lambda x: net(x)[0], randomness="same")(x)
    assert torch.equal(same[0], same[1])
    different = vmap(lambda x: net(x)[0], randomness="different")(x)
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: net(x)[0])(x)
    net.eval()
    assert_close(vmap(lambda x: net(x)[0])(x)[2], net(x[2])[0])


def test_bad_lengths_under_vmap(backend):
    net, x = fastrnn.GRU(INPUTS, HIDDEN), torch.randn(STEPS, 2, INPUTS)
    with pytest.raises(RuntimeError, match="lengths should be between 0 and 4, got 9"):
        vmap(lambda lengths: net(x, None, lengths)[0])(torch.tensor([[1, 2], [3, 9]]))
    with pytest.raises(ValueError, match=r"lengths should have the shape \(N,\) = \(2,\), got: \(3,\)"):
        vmap(lambda lengths: net(x, None, lengths)[0])(torch.tensor([[1, 2, 3], [3, 2, 1]]))


@pytest.mark.parametrize("cell", [fastrnn.RNNCell, fastrnn.LSTMCell, fastrnn.GRUCell])
def test_ensembles_of_cells_and_their_hessians(cell):
    torch.manual_seed(0)
    nets = [cell(INPUTS, HIDDEN, dtype=torch.float64) for _ in range(3)]
    weights = {name: value.detach() for name, value in stack_module_state(nets)[0].items()}
    x, h = torch.randn(3, BATCH, INPUTS, dtype=torch.float64), torch.randn(3, BATCH, HIDDEN, dtype=torch.float64)

    def loss(parameters, x, h):
        hx = (h, h.cos()) if cell is fastrnn.LSTMCell else h
        return sum(state.square().sum() for state in tree_leaves(functional_call(nets[0], parameters, (x, hx))))

    gradient = grad(loss, argnums=(0, 1, 2))
    both(lambda: vmap(gradient, in_dims=(0, None, 0))(weights, x[0], h))
    both(lambda: vmap(gradient)(weights, x, h))
    both(lambda: vmap(hessian(loss, argnums=1), in_dims=(None, 0, None))(dict(nets[0].named_parameters()), x, h[0]))
    both(lambda: hessian(loss)({name: value[0] for name, value in weights.items()}, x[0], h[0]))
    both(lambda: jacfwd(lambda h: loss(dict(nets[0].named_parameters()), x[0], h))(h[0]))


@pytest.mark.parametrize("cell", [fastrnn.RNN, fastrnn.LSTM, fastrnn.GRU])
def test_lengths_and_batch_sizes_are_checked_where_tangents_flow(cell):
    net, x = cell(2, 3), torch.randn(5, 2, 2)
    lengths = torch.tensor([5, 9])
    for run in (
        lambda: jvp(lambda x: net(x, lengths=lengths)[0], (x,), (x,)),
        lambda: hessian(lambda x: net(x, lengths=lengths)[0].sum())(x),
        lambda: vmap(lambda x: jvp(lambda x: net(x, lengths=lengths)[0], (x,), (x,))[1])(torch.stack([x, x])),
    ):
        with pytest.raises(RuntimeError, match="lengths should be between 0 and 5, got 9 at index 1"):
            run()
    rows = torch.randn(5, 2)
    packed = torch.nn.utils.rnn.PackedSequence(rows, torch.tensor([2, 2, 1]))
    expected = net(packed)[0].data
    for sizes, words in (([2, 1, 2], "not increasing"), ([2, 2], "add up to 5 rows, got 4")):
        with pytest.raises(RuntimeError, match=words):
            jvp(lambda x, s=sizes: net(packed._replace(data=x, batch_sizes=torch.tensor(s)))[0].data, (rows,), (rows,))
    assert_close(jvp(lambda x: net(packed._replace(data=x))[0].data, (rows,), (rows,))[0], expected)


@pytest.mark.parametrize("cell", [fastrnn.RNN, fastrnn.LSTM, fastrnn.GRU])
def test_tangents_under_autocast(cell):
    """Of the primal's dtype, and as near to those of float32 as one rounding of arguments and results allows."""
    net, x, tangent = cell(17, 33), torch.randn(9, 3, 17), torch.randn(9, 3, 17)
    rounded = cell(17, 33)
    rounded.load_state_dict({name: weight.bfloat16().float() for name, weight in net.state_dict().items()})
    expected = jvp(lambda x: rounded(x)[0], (x.bfloat16().float(),), (tangent.bfloat16().float(),))
    with torch.autocast("cpu", torch.bfloat16):
        found = jvp(lambda x: net(x)[0], (x,), (tangent,))
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert_close(one.float(), other, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("flags", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
def test_batched_gradients_of_autograd(cell, flags):
    """``is_grads_batched`` and ``vectorize=True`` have a vmap of their own, older than torch.func's."""
    ours, theirs = (getattr(library, cell)(2, 3, **flags) for library in (fastrnn, torch.nn))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 2, 2, requires_grad=True)
    found, expected = [], []
    for net, results in ((ours, found), (theirs, expected)):
        torch.manual_seed(0)
        output, hidden = net(x)
        outputs = [output, *tree_leaves(hidden)]
        grads = [torch.randn(5, *out.shape) for out in outputs]
        results += torch.autograd.grad(outputs, [x, *net.parameters()], grads, is_grads_batched=True)
        run = lambda x, net=net: net(x)[0].square().sum()  # noqa: E731
        results.append(torch.autograd.functional.jacobian(lambda x, net=net: net(x)[0], x, vectorize=True))
        results.append(torch.autograd.functional.hessian(run, x, vectorize=True))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", [fastrnn.RNN, fastrnn.LSTM, fastrnn.GRU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_that_are_negative_views_or_zeros_without_memory(cell, dtype):
    net, x = cell(3, 5, dtype=dtype), torch.randn(7, 2, 3, dtype=dtype, requires_grad=True)
    output, hidden = net(x)
    results = [output, *tree_leaves(hidden)]
    for result in results:
        grad = torch.randn_like(result)
        expected = torch.autograd.grad(result, x, -grad, retain_graph=True)
        found = torch.autograd.grad(result, x, torch._neg_view(grad), retain_graph=True)
        assert torch.equal(found[0], expected[0])
        nothing = torch._efficientzerotensor(result.shape, dtype=dtype)
        assert not torch.autograd.grad(result, x, nothing, retain_graph=True)[0].any()


def test_padding_has_no_gradient_whatever_the_weights():
    """Of each row for itself too, where the gradients of padding are multiplied along with the others."""
    net, x = fastrnn.RNN(3, 5), torch.randn(7, 4, 3)
    lengths = torch.tensor([7, 3, 1, 0])
    weights = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    weights["weight_ih_l0"][0, 0] = float("inf")

    def loss(x, lengths):
        return functional_call(net, weights, (x, None, lengths))[0].square().sum()

    single = vmap(grad(lambda row, length: loss(row[:, None], length[None])), (1, 0), 1)(x, lengths)
    padding = torch.arange(7)[:, None] >= lengths
    for found in (grad(loss)(x, lengths), single):
        assert found[~padding].isnan().any()
        assert not found[padding].any()
