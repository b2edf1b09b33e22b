"""Outputs and gradients of the modules against torch.nn, by the rule of tolerance.py."""

import pytest
import torch
from cases import Case, data, module, mostly_slow, outputs_and_gradients, parametrize, small, table, threads
from tolerance import check

import fastrnn

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def compare(case, backend, device="cpu"):
    with threads(2 if backend == "native" else 1):
        ours = outputs_and_gradients(module(case).to(device), *data(case, device=device))
    own = torch.float32 if case.dtype == torch.float64 else case.dtype
    theirs = outputs_and_gradients(module(case, torch.nn, own).to(device), *data(case, own, device))
    oracle = outputs_and_gradients(module(case, torch.nn, torch.float64), *data(case, torch.float64))
    assert ours.keys() == oracle.keys()
    for name, value in ours.items():
        check(name, value, theirs[name], oracle[name], dtype=case.dtype)


@parametrize(table())
def test_against_torch(case, backend):
    compare(case, backend)


@parametrize(mostly_slow(table(dtypes=(torch.bfloat16, torch.float16), layouts=("time_major", "unsorted"))))
def test_against_torch_16_bit(case, backend):
    compare(case, backend)


@parametrize(small(steps=1000, batch=1, hidden=17) + small(steps=1000, batch=1, hidden=17, dtype=torch.float64))
def test_long_sequence(case, backend):
    compare(case, backend)


@parametrize([Case("lstm", steps=5, batch=129, inputs=17, hidden=33), Case("gru", steps=2, batch=33, hidden=257)])
def test_large(case, backend):
    compare(case, backend)


# The block of weights that a tile reads is more than 256 KiB, so that the scans sum it up in several chunks: with many
# rows the forward scan, which then multiplies the input too, and with many units both, where vectors are wide.
CHUNKS = [
    *(Case(kind, batch=65, inputs=3001, hidden=33) for kind in ("rnn_tanh", "lstm", "gru")),
    Case("lstm", batch=9, hidden=1201),
    *(Case(kind, batch=9, inputs=1531, hidden=601) for kind in ("rnn_tanh", "lstm", "gru")),
    Case("lstm", hidden=1201),
    Case("gru", layout="unsorted", batch=17, hidden=1201, dtype=torch.float64, bidirectional=True),
]


# Rows enough for the gate gradients to be multiplied some steps at a time, in two to twelve windows.
WINDOWS = [case for case in small(steps=129, batch=129, inputs=17, hidden=65) if not case.proj] + [
    Case("rnn_tanh", "sorted", steps=257, batch=129, inputs=67, hidden=65, hx=False),
    Case("lstm", "unsorted", bidirectional=True, steps=129, batch=129, hidden=65, bias=False),
    Case("lstm", num_layers=2, bidirectional=True, steps=65, batch=129, hidden=67),
    Case("gru", "unsorted", bidirectional=True, steps=129, batch=131, hidden=65),
    Case("gru", "batch_first", steps=4097, batch=1, hidden=129),
]


@pytest.mark.parametrize("threads", ["one thread", pytest.param("native", marks=pytest.mark.slow)])  # compare(): 1, 2
@parametrize(WINDOWS)
def test_windows_of_steps(case, threads, native):
    compare(case, threads)
    sizes = (case.steps, case.batch, case.inputs, case.hidden, 0, case.directions)
    plan = native.plan(case.kind, *sizes, str(case.dtype).removeprefix("torch."), True, 1, False)
    assert 0 < plan["backward_window"] <= case.steps // 2


class InPieces(torch.nn.GRU):
    """Five steps at a time: the sum over all rows of a weight's gradient errs by more than ours on some machines."""

    def forward(self, input, hx):
        outputs = []
        for piece in input.split(5):
            output, hx = super().forward(piece, hx)
            outputs.append(output)
        return torch.cat(outputs), hx


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_windows_of_steps_in_float64(count, native):
    case = Case("gru", steps=65, batch=129, inputs=65, hidden=33, dtype=torch.float64)
    exact = InPieces(case.inputs, case.hidden, dtype=torch.float64)
    exact.load_state_dict(module(case, torch.nn, torch.float64).state_dict())
    oracle = outputs_and_gradients(exact, *data(case))
    theirs = outputs_and_gradients(module(case, torch.nn, torch.float32), *data(case, torch.float32))
    with threads(count):
        ours = outputs_and_gradients(module(case), *data(case))
    for name, value in ours.items():
        check(name, value, theirs[name], oracle[name])
    plan = native.plan("gru", 65, 129, 65, 33, 0, 1, "float64", True, 1, False)
    assert 0 < plan["backward_window"] <= case.steps // 2


@parametrize(CHUNKS)
def test_chunks_of_weights(case, native):
    compare(case, native)
    net, (input, hx) = module(case), data(case)
    expected = net(input, hx)
    with torch.no_grad():  # nothing saved: the scan may multiply the input itself
        torch.testing.assert_close(net(input, hx), expected)


# Few rows, and few steps or weights beyond any L2: nothing is packed.
AS_THEY_LIE = [
    *small(steps=3, batch=3, hidden=17, layout="unsorted", bidirectional=True),
    *small(steps=2, batch=1, hidden=129, dtype=torch.bfloat16),
    *(Case(kind, steps=5, inputs=17, hidden=1201) for kind in ("rnn_tanh", "lstm", "gru")),
    *(Case("lstm_proj", steps=7, batch=1, inputs=17, hidden=1201, dtype=dtype) for dtype in DTYPES),
]


@parametrize(AS_THEY_LIE)
def test_weights_as_they_lie(case, native):
    assert "read as they lie" in fastrnn.explain(module(case), *data(case))
    compare(case, native)


@parametrize(small(num_layers=2, bidirectional=True, steps=7, hidden=17))
def test_bitwise_repeatable(case, backend):
    first, second = (outputs_and_gradients(module(case), *data(case)) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@parametrize(small(num_layers=2, bidirectional=True) + small(layout="batch_first"))
def test_non_contiguous(case, backend):
    net = module(case)
    input, hx = data(case)
    expected = net(input, hx)

    def strided(tensor):
        wide = torch.full((*tensor.shape, 2), torch.nan)
        wide[..., 0] = tensor.detach()
        assert not wide[..., 0].is_contiguous()
        return wide[..., 0]

    hx = tuple(map(strided, hx)) if isinstance(hx, tuple) else strided(hx)
    torch.testing.assert_close(net(strided(input), hx), expected, rtol=0, atol=0)
    transposed = input.detach().transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(net(transposed, hx)[0], expected[0], rtol=0, atol=0)


@parametrize(small(num_layers=2, bidirectional=True, batch=0))
def test_empty_batch(case, backend):
    found = outputs_and_gradients(module(case), *data(case))
    expected = outputs_and_gradients(module(case, torch.nn), *data(case))
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@parametrize(small(steps=0))
def test_no_steps(case, backend):
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        module(case)(*data(case))


@parametrize(small(num_layers=2))
def test_retained_graph(case, backend):
    net = module(case)
    input, hx = data(case)
    loss = net(input, hx)[0].square().sum()
    first = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(net.parameters()))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, list(net.parameters()))


@parametrize(small(num_layers=2, bidirectional=True))
def test_partial_requires_grad(case, backend):
    """What is frozen gets no gradient, and the rest gets the one that it had."""
    net = module(case)
    input, hx = data(case)
    net(input, hx)[0].square().sum().backward()
    full = {name: parameter.grad for name, parameter in net.named_parameters()}
    input_grad = input.grad
    for kept in ("weight_ih_l0", "bias_hh_l1", "weight_hh_l0_reverse", "input"):
        net.zero_grad()
        net.requires_grad_(False)
        if kept != "input":
            net.get_parameter(kept).requires_grad_()
        source = data(case)[0].detach().requires_grad_(kept == "input")
        states = torch.utils._pytree.tree_map(torch.Tensor.detach, hx)
        net(source, states)[0].square().sum().backward()
        for name, parameter in net.named_parameters():
            assert (parameter.grad is not None) == (name == kept)
            if name == kept:
                torch.testing.assert_close(parameter.grad, full[name])
        if kept == "input":
            torch.testing.assert_close(source.grad, input_grad)


@parametrize(small(num_layers=2, bidirectional=True))
def test_without_grad(case, backend):
    net = module(case)
    input, hx = data(case)
    expected = net(input, hx)
    with torch.no_grad():
        torch.testing.assert_close(net(input, hx), expected, rtol=0, atol=0)
    with torch.inference_mode():
        found = net(input, hx)
        assert found[0].is_inference()
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@parametrize(small(dtype=torch.float64, steps=3, batch=2, inputs=2, hidden=2, bidirectional=True))
def test_gradcheck(case, backend):
    net = module(case)
    input, hx = data(case)
    states = hx if isinstance(hx, tuple) else (hx,)
    parameters = list(net.parameters())
    names = [name for name, _ in net.named_parameters()]
    if "relu" in case.kind:  # keep away from the kink
        for parameter in parameters:
            parameter.data.abs_()
        input = input.detach().abs().requires_grad_()

    def function(input, *rest):
        states, weights = rest[: len(rest) - len(names)], rest[len(rest) - len(names) :]
        hx = states if case.kind.startswith("lstm") else states[0]
        output, hidden = torch.func.functional_call(net, dict(zip(names, weights, strict=True)), (input, hx))
        return (output, *hidden) if isinstance(hidden, tuple) else (output, hidden)

    arguments = (input, *states, *parameters)
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


@parametrize(small())
def test_functional_call_uses_the_given_weights(case, backend):
    net = module(case)
    input, hx = data(case)
    doubled = {name: 2 * parameter.detach() for name, parameter in net.named_parameters()}
    found = torch.func.functional_call(net, doubled, (input, hx))
    other = module(case)
    other.load_state_dict(doubled)
    torch.testing.assert_close(found, other(input, hx), rtol=0, atol=0)
    half = {name: parameter.double() for name, parameter in doubled.items()}
    with pytest.raises(ValueError, match="does not match weight dtype"):
        torch.func.functional_call(net, half, (input, hx))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@parametrize(small(num_layers=2))
def test_autocast(case, dtype, backend):
    net = module(case)
    input, hx = data(case)
    with torch.autocast("cpu", dtype):
        output, hidden = net(input, hx)
        output.sum().backward()
    for tensor in (output, *(hidden if isinstance(hidden, tuple) else (hidden,))):
        assert tensor.dtype == dtype
    assert input.grad.dtype == torch.float32
    torch.testing.assert_close(output.float(), net(input, hx)[0], rtol=0, atol=0.05)


def test_module_reads_hidden_and_output_independently(backend):
    """An in-place change of one result is not a change of another."""
    net = fastrnn.GRU(3, 3)
    output, hidden = net(torch.randn(1, 2, 3))
    before = hidden.clone()
    output.detach().zero_()
    assert torch.equal(hidden, before)
