"""Layers of a stack beside one another: the same numbers as one after another, and only where nothing else is asked."""

from dataclasses import replace

import pytest
import torch
from cases import KINDS, Case, data, module, parametrize, small, tensors, threads
from recording import Dispatches
from test_call import Logged
from tolerance import check
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import profile

import fastrnn
from fastrnn import _backend

pytestmark = pytest.mark.usefixtures("native")

# Several rows and one, in each dtype; inputs multiplied along with the states (N = 17) and some steps ahead of them.
CASES = [
    *small(num_layers=2, steps=129, batch=3, inputs=17, hidden=33),
    *small(num_layers=3, steps=257, batch=1, inputs=33, hidden=65, hx=False),
    *small(num_layers=2, steps=257, batch=17, inputs=33, hidden=33, bias=False),
    *small(num_layers=4, steps=129, batch=3, inputs=33, hidden=33, layout="batch_first"),
    *small(num_layers=2, steps=129, batch=7, inputs=33, hidden=33, layout="sorted"),
    *small(num_layers=2, steps=129, batch=3, inputs=33, hidden=33, layout="unsorted", hx=False),
    *small(num_layers=2, steps=129, inputs=17, hidden=65, layout="unbatched"),
    *small(num_layers=2, steps=129, batch=3, inputs=17, hidden=33, dtype=torch.float64),
    *(
        case
        for dtype in (torch.bfloat16, torch.float16)
        for batch in (1, 17)
        for case in small(num_layers=2, steps=129, batch=batch, inputs=33, hidden=33, dtype=dtype)
    ),
]


def at_once(function, *arguments, **options):
    """The results, and whether the layers ran beside one another."""
    with profile() as events:
        results = function(*arguments, **options)
    names = [event.name for event in events.events()]
    return results, any(name.startswith("fastrnn::") and name.endswith("_layers") for name in names)


def outputs(case, library=fastrnn, dtype=None, **options):
    with torch.no_grad():
        return tensors(module(case, library, dtype)(*data(case, dtype), **options))


def stack(**options):
    return fastrnn.LSTM(33, 33, 2, **options), torch.randn(129, 3, 33)


@parametrize(CASES)
def test_against_torch(case):
    with threads(2):
        ours, beside = at_once(outputs, case)
        assert beside
        assert "one call for all layers, beside one another" in explained(case)
    own = torch.float32 if case.dtype == torch.float64 else case.dtype
    theirs, oracle = outputs(case, torch.nn, own), outputs(case, torch.nn, torch.float64)
    for index, value in enumerate(ours):
        check(f"output {index}", value, theirs[index], oracle[index], dtype=case.dtype)


def explained(case):
    with torch.no_grad():
        return fastrnn.explain(module(case), *data(case))


@pytest.mark.parametrize("batch_first", [False, True])
@parametrize(small(num_layers=3, steps=129, batch=7, inputs=17, hidden=33))
def test_lengths_and_resets(case, batch_first):
    """As one after another, on one thread; rows without a step among them."""
    case = replace(case, layout="batch_first" if batch_first else "time_major")
    lengths = torch.tensor([129, 0, 17, 1, 128, 0, 129])
    reset = torch.rand(129, 7) < 0.1
    options = {"lengths": lengths, "reset": reset.T if batch_first else reset}
    expected = outputs(case, **options)
    with threads(2):
        found, beside = at_once(outputs, case, **options)
    assert beside
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    padding = torch.arange(129)[:, None] >= lengths
    assert not found[0][padding.T if batch_first else padding].any()


@parametrize(small(num_layers=4, steps=67, batch=3, inputs=33, hidden=33))
def test_bitwise_repeatable(case):
    """Whichever thread is late, and whatever was in the memory before."""
    with threads(2):
        first = outputs(case)
        for _ in range(50):
            for ours, before in zip(outputs(case), first, strict=True):
                assert torch.equal(ours, before)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_more_threads_than_cores(count):
    net, input = stack()
    with torch.no_grad():
        expected = net(input)[0]
        with threads(count):
            torch.testing.assert_close(net(input)[0], expected)


def test_not_a_number_is_kept():
    """In one row, from one step on, in every layer."""
    net, input = stack()
    input[64, 1] = float("nan")
    with torch.no_grad(), threads(2):
        output, beside = at_once(lambda: net(input)[0])
    assert beside
    nan = output.isnan()
    assert nan[64:, 1].all()
    assert not nan[:64].any()
    assert not nan[:, [0, 2]].any()


def test_views_that_do_not_lie_in_order():
    net, input = stack()
    wide = torch.randn(33, 3, 129)
    wide.permute(2, 1, 0).copy_(input)
    hx = tuple(torch.randn(3, 2, 33).transpose(0, 1) for _ in range(2))
    with torch.no_grad(), threads(2):
        expected, (h_n, c_n) = net(input, tuple(state.contiguous() for state in hx))
        (found, states), beside = at_once(net, wide.permute(2, 1, 0), hx)
    assert beside
    for ours, theirs in zip((found, *states), (expected, h_n, c_n), strict=True):
        assert torch.equal(ours, theirs)


@parametrize(
    [
        *small(num_layers=4, steps=129, batch=3, inputs=17, hidden=33),
        *small(num_layers=2, steps=129, batch=17, inputs=33, hidden=33, dtype=torch.bfloat16),
    ]
)
def test_weights_that_do_not_lie_in_order(case):
    """Their copies have to last as long as the layers do."""
    net, (input, hx) = module(case), data(case)
    with torch.no_grad(), threads(2):
        expected = tensors(net(input, hx))
        for name, weight in list(net.named_parameters()):
            view = weight.repeat_interleave(3, -1)[..., ::3]
            assert not view.is_contiguous()
            setattr(net, name, torch.nn.Parameter(view, requires_grad=False))
        found, beside = at_once(net, input, hx)
    assert beside
    for ours, theirs in zip(tensors(found), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("batch", [3, 129])
def test_lengths_that_are_all_of_the_steps(batch):
    """They change neither the way that is taken nor a bit of the results."""
    net = fastrnn.LSTM(65, 65, 2).requires_grad_(False)
    input, lengths = torch.randn(129, batch, 65), torch.full((batch,), 129)
    with threads(2):
        (plain, _), beside = at_once(net, input)
        (found, _), with_lengths = at_once(net, input, lengths=lengths)
    assert with_lengths == beside
    assert torch.equal(found, plain)


def test_gradients_are_wanted():
    net, input = stack()
    expected = torch.autograd.grad(net(input)[0].square().sum(), list(net.parameters()))
    with threads(2):
        (output, _), beside = at_once(net, input)
        assert not beside
        found = torch.autograd.grad(output.square().sum(), list(net.parameters()))
    torch.testing.assert_close(found, expected)


def test_nobody_wants_the_gradients():
    """No parameter requires one, or a mode says so."""
    net, input = stack()
    with threads(2):
        with torch.inference_mode():
            assert at_once(net, input)[1]
        net.requires_grad_(False)
        assert at_once(net, input)[1]
        assert not at_once(net, input.requires_grad_())[1]


def test_one_after_another():
    """Where two threads have something better to do, or someone else has to have each layer."""
    net, input = stack()
    with torch.no_grad(), threads(2):
        assert at_once(net, input)[1]
        assert not at_once(fastrnn.LSTM(33, 33, 2, bidirectional=True), input)[1]
        assert not at_once(fastrnn.LSTM(33, 33, 1), input)[1]
        assert not at_once(stack(dropout=0.5)[0], input)[1]
        assert at_once(stack(dropout=0.5)[0].eval(), input)[1]
        assert not at_once(net, input[:3])[1]
        with torch.autocast("cpu", torch.bfloat16):
            (output, _), beside = at_once(net, input)
            assert not beside
            assert output.dtype == torch.bfloat16
        with Dispatches() as dispatches:
            assert not at_once(net, input)[1]
        assert sum("lstm_layer" in name for name in dispatches.names) == 2
        assert isinstance(net(input.as_subclass(Logged))[0], Logged)
        with fastrnn.backend("python"):
            assert not at_once(net, input)[1]
    with torch.no_grad():
        assert not at_once(net, input)[1]  # one thread


def test_what_explain_says_of_them():
    net, input = stack()
    net.requires_grad_(False)
    hx = torch.zeros(2, 3, 33), torch.zeros(2, 3, 33, requires_grad=True)
    with threads(2):
        assert "all layers" in fastrnn.explain(net, input)
        found = fastrnn.explain(net, input, hx)
        assert "one call per layer" in found
        assert "backward" in found
        assert "one call per layer" in fastrnn.explain(net, input.as_subclass(Logged))
        with torch.device("cpu"):
            assert "one call per layer" in fastrnn.explain(net, input)
        with Dispatches():
            assert "one call per layer" in fastrnn.explain(net, input)


def test_transforms_see_the_layers():
    net, input = stack()
    net.requires_grad_(False)
    tangent = torch.randn_like(input)
    expected = torch.func.jvp(lambda x: net(x)[0], (input,), (tangent,))
    batched = torch.stack([net(x)[0] for x in (input, tangent)])
    with threads(2):
        found, beside = at_once(torch.func.jvp, lambda x: net(x)[0], (input,), (tangent,))
        assert not beside
        torch.testing.assert_close(found, expected)
        found, beside = at_once(torch.func.vmap(lambda x: net(x)[0]), torch.stack([input, tangent]))
        assert not beside
        torch.testing.assert_close(found, batched)


def test_sizes_are_not_asked_of_what_has_none():
    """A function made functional is a tensor of no class of its own, whose sizes are symbols."""
    net, input = stack()
    weights = [weight.detach() for weight in net.parameters()]

    def run(input, *weights):
        return fastrnn.functional.lstm(input, None, list(weights), num_layers=2)[0]

    expected = run(input, *weights)
    with threads(2):
        graph = make_fx(torch.func.functionalize(run), tracing_mode="symbolic")(input, *weights)
        assert sum("lstm_layer" in str(node.target) for node in graph.graph.nodes) == 2
        torch.testing.assert_close(graph(input, *weights), expected)


@pytest.mark.parametrize("kind", list(KINDS))
def test_steps_of_all_layers(kind):
    """Asked for, they come from one layer after another."""
    case = Case(kind, num_layers=2, steps=129, inputs=33, hidden=33)
    net, (input, hx) = module(case), data(case)
    with torch.no_grad():
        expected = net.forward_states(input, hx)
        with threads(2):
            found, beside = at_once(net.forward_states, input, hx)
    assert not beside
    for ours, theirs in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(ours, theirs)


def _wide(hidden):
    return [weight.detach() for weight in fastrnn.LSTM(33, hidden).parameters()]


WRONG = {
    "shape of a weight": lambda a: a["weights"].__setitem__(5, torch.randn(132, 32)),
    "dtype of a weight": lambda a: a["weights"].__setitem__(4, torch.randn(132, 33).double()),
    "bias of another layer": lambda a: a["weights"].__setitem__(7, torch.randn(131)),
    "units of another layer": lambda a: a.update(hx=None, weights=[*a["weights"][:4], *_wide(129)]),
    "too few weights": lambda a: a["weights"].pop(),
    "shape of a state": lambda a: a.update(hx=[torch.randn(2, 3, 33), torch.randn(2, 3, 32)]),
    "states of too few layers": lambda a: a.update(hx=[torch.randn(1, 3, 33), torch.randn(1, 3, 33)]),
    "batch of the states": lambda a: a.update(hx=[torch.randn(2, 4, 33), torch.randn(2, 4, 33)]),
    "width of the input": lambda a: a.update(input=torch.randn(129, 3, 32)),
    "dimensions of the input": lambda a: a.update(input=torch.randn(129, 33)),
    "length beyond T": lambda a: a.update(lengths=torch.tensor([129, 130, 1])),
    "batch sizes": lambda a: a.update(input=torch.randn(387, 33), batch_sizes=torch.tensor([3] * 128 + [4])),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_errors_are_those_of_one_after_another(what):
    torch.manual_seed(0)
    net, input = stack()
    arguments = {
        "input": input,
        "hx": [torch.randn(2, 3, 33) for _ in range(2)],
        "weights": [weight.detach() for weight in net.parameters()],
        "num_layers": 2,
    }
    WRONG[what](arguments)
    with pytest.raises((RuntimeError, ValueError)) as in_turn:
        fastrnn.functional.lstm(**arguments)
    with threads(2), pytest.raises((RuntimeError, ValueError)) as beside:
        fastrnn.functional.lstm(**arguments)
    assert type(beside.value) is type(in_turn.value)
    assert str(beside.value).splitlines()[0] == str(in_turn.value).splitlines()[0]


def test_the_binding_declines():
    net, input = stack()
    weights = [weight.detach() for weight in net.parameters()]
    run = _backend.native.stacks["lstm"]
    with threads(2):
        assert len(run(2, input, [], weights, None, None, None, False)) == 3
        assert run(1, input, [], weights[:4], None, None, None, False) is None
        assert run(0, input, [], weights, None, None, None, False) is None
        assert run(2, input, [], [], None, None, None, False) is None
        assert run(2, input.to("meta"), [], weights, None, None, None, False) is None
        assert run(2, input, [], "weights", None, None, None, False) is None
