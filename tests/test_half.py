"""16 bit: storage is bfloat16 or float16, states, gates and sums are float32; and autocast, which leads there."""

import pytest
import torch
from cases import data, module, outputs_and_gradients, parametrize, small, tensors
from test_backend import python
from torch.nn.utils.rnn import pack_sequence

import fastrnn

DTYPES = [torch.bfloat16, torch.float16]
LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")

# Whole cases in a process of their own, because the instruction set is chosen at import; on one thread, for speed.
CODE = """
    import sys, torch, fastrnn
    from cases import small
    from test_features import OPTIONS, compare_apart
    from test_modules import compare
    torch.set_num_threads(1)
    print(fastrnn.build_info()["cpu_capability"], fastrnn.build_info()["cpu_bf16"])
    flags = ({}, {"num_layers": 2, "bidirectional": True}, {"layout": "unsorted", "bias": False, "hx": False})
    sizes = ((3, 3, 17, 17), (17, 1, 3, 129), (1, 17, 129, 3), (5, 17, 1, 33), (1, 1, 129, 17), (1, 7, 17, 129))
    dtype = getattr(torch, "DTYPE")
    for steps, batch, inputs, hidden in sizes:
        for flag in flags:
            shape = {"steps": steps, "batch": batch, "inputs": inputs, "hidden": hidden}
            for case in small(dtype=dtype, **shape, **flag):
                compare(case, "one thread")
    for which in OPTIONS:
        for case in small(dtype=dtype, steps=5, batch=5, hidden=17, num_layers=2, bidirectional=True):
            compare_apart(case, which, "one thread")
"""


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("capability", ["default", pytest.param("avx2", marks=pytest.mark.slow), "avx512"])
def test_rule_on_every_capability(capability, dtype, native):
    """Forward and backward, by the rule of tolerance.py against torch's own 16-bit error."""
    order = ["default", "avx2", "avx512"]
    if capability not in order[: order.index(native.cpu_capability()) + 1]:
        pytest.skip(f"this machine, or FASTRNN_CPU_CAPABILITY, stops at {native.cpu_capability()}")
    variables = {"FASTRNN_BACKEND": "native", "FASTRNN_CPU_CAPABILITY": capability, "FASTRNN_CPU_BF16": "off"}
    done = python(CODE.replace("DTYPE", dtype), **variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [capability, "none"]


@pytest.fixture(params=["emulate", "auto"])
def products(request, native):
    """FASTRNN_CPU_BF16: loops in place of products of bfloat16, and the machine's own instructions for them."""
    if request.param == "auto" and native.cpu_bf16() == "none":
        pytest.skip("this machine has no products of bfloat16")
    return request.param


@pytest.mark.parametrize("threads", [1, 3])
def test_rule_with_products_of_bfloat16(products, threads, native):
    code = CODE.replace("DTYPE", "bfloat16").replace("set_num_threads(1)", f"set_num_threads({threads})")
    # many rows, and rows of operands that would lie a multiple of 256 bytes apart
    code = code.replace("    sizes = (", "    sizes = ((3, 161, 64, 64), ")
    done = python(code, FASTRNN_BACKEND="native", FASTRNN_CPU_BF16=products)
    assert done.returncode == 0, done.stderr
    found = {"emulate": "emulated", "auto": "native"}[products]
    assert done.stdout.split() == [native.cpu_capability(), found]


# An infinite input saturates the gates that it meets, and must not meet the state's part of them.
INFINITE = """
    import torch, fastrnn
    torch.manual_seed(1)
    for name in ("RNN", "LSTM", "GRU"):
        net, input = getattr(fastrnn, name)(17, 129).bfloat16(), torch.randn(3, 17, 17).bfloat16()
        input[1, 3, 5] = torch.inf
        assert "products of bfloat16" in fastrnn.explain(net, input)
        wide = getattr(torch.nn, name)(17, 129).double()
        wide.load_state_dict({key: value.double() for key, value in net.state_dict().items()})
        with torch.no_grad():
            output, expected = net(input)[0], wide(input.double())[0]
        assert expected.isfinite().all()
        assert (output - expected).abs().max() < 0.03, name
"""


def test_infinite_input_with_products_of_bfloat16(products):
    done = python(INFINITE, FASTRNN_BACKEND="native", FASTRNN_CPU_BF16=products)
    assert done.returncode == 0, done.stderr


# What float32 modules do with products of bfloat16, only by torch's leave, with more rows than one product takes.
PRECISION = """
    import torch, fastrnn
    from cases import output_and_gradients_of_squares as results
    assert "products of bfloat16" not in fastrnn.explain(fastrnn.GRU(3, 5), torch.ones(7, 37, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert "products of bfloat16" in fastrnn.explain(fastrnn.GRU(3, 5), torch.ones(7, 37, 3))
    for name in ("RNN", "LSTM", "GRU"):
        torch.manual_seed(1)
        net, input = getattr(fastrnn, name)(17, 129, bidirectional=True), torch.randn(7, 37, 17)

        exact = results(net, input)
        torch.backends.mkldnn.rnn.fp32_precision = "bf16"
        rounded = results(net, input)
        assert "products of bfloat16" in fastrnn.explain(net, input)
        with torch.backends.mkldnn.flags(enabled=False):
            assert "products of bfloat16" not in fastrnn.explain(net, input)
            assert fastrnn.build_info()["cpu_bf16"] == "none"
        assert "products of bfloat16" not in fastrnn.explain(net.double(), input.double())
        found = results(net, input.double())
        torch.backends.mkldnn.rnn.fp32_precision = "ieee"
        for one, other in zip(found, results(net, input.double()), strict=True):
            assert torch.equal(one, other)
        for one, other in zip(exact, results(net.float(), input), strict=True):
            assert torch.equal(one, other)
        twice = torch.finfo(torch.bfloat16).eps
        for one, other in zip(rounded, exact, strict=True):
            error = (one - other).abs().max() / other.abs().max()
            assert 1e-5 < error < twice, (name, error)
"""


def test_products_of_bfloat16_by_leave(native):
    done = python(PRECISION, FASTRNN_BACKEND="native", FASTRNN_CPU_BF16="emulate")
    assert done.returncode == 0, done.stderr


@parametrize([case for d in DTYPES for case in small(steps=200, inputs=17, hidden=33, bidirectional=True, dtype=d)])
def test_states_are_not_rounded_between_steps(case, backend):
    """A layer's results are those of float32 on the same numbers, rounded once: nothing adds up over the steps."""
    found = tensors(module(case).forward_states(*data(case)))
    expected = tensors(module(case, dtype=torch.float32).forward_states(*data(case, torch.float32)))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == case.dtype
        ulps = (one.float() - other).abs() / (other.abs() * torch.finfo(case.dtype).eps + torch.finfo(case.dtype).tiny)
        assert ulps.max() <= 0.51, ulps.max()  # half a unit, and float32's own order of summation


@parametrize([case for d in DTYPES for case in small(num_layers=2, bidirectional=True, dtype=d)])
def test_gradients_have_the_dtype_of_their_tensors(case, backend):
    found = outputs_and_gradients(module(case), *data(case))
    assert {value.dtype for value in found.values()} == {case.dtype}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_autocast_dtype_of_all_six(name, dtype, backend):
    """Results in autocast's dtype, those of the module cast to it; gradients in the parameters' own."""
    net = getattr(fastrnn, name)(3, 5)
    cell = name in CELLS
    input = torch.randn(4, 3) if cell else torch.randn(7, 4, 3)
    state = torch.randn(4, 5) if cell else torch.randn(1, 4, 5)
    hx = (state, state.flip(-1)) if name.startswith("LSTM") else state
    cast = getattr(fastrnn, name)(3, 5, dtype=dtype)
    cast.load_state_dict(net.state_dict())
    for given in (None, hx):
        with torch.autocast("cpu", dtype):
            results = tensors(net(input, given))
            with torch.autocast("cpu", enabled=False):
                assert {result.dtype for result in tensors(net(input, given))} == {torch.float32}
        assert {result.dtype for result in results} == {dtype}
        expected = tensors(
            cast(*torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to(dtype), (input, given)))
        )
        for one, other in zip(results, expected, strict=True):
            assert torch.equal(one, other)
    sum(result.float().sum() for result in results).backward()
    assert all(parameter.grad.dtype == torch.float32 and parameter.grad.any() for parameter in net.parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_autocast_with_every_feature(name, dtype, backend):
    net = getattr(fastrnn, name)(3, 5, num_layers=2, bidirectional=True)
    packed = pack_sequence([torch.randn(2, 3), torch.randn(4, 3)], enforce_sorted=False)
    with torch.autocast("cpu", dtype):
        results = tensors(net.forward_states(torch.randn(4, 2, 3), None, torch.tensor([2, 4]), torch.eye(4, 2).bool()))
        results += tensors(net(packed))
    assert {result.dtype for result in results} == {dtype}


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_autocast_leaves_float64_alone(name, backend):
    net = getattr(fastrnn, name)(3, 5, dtype=torch.float64)
    input = torch.randn(4, 3, dtype=torch.float64)
    expected = tensors(net(input))
    with torch.autocast("cpu", torch.bfloat16):
        found = tensors(net(input))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_backward_in_float32_whatever_autocast_says_there(name, dtype, native):
    """Autocast is on where backward is called; the layer was called without. Also of each row for itself."""
    net, input = getattr(fastrnn, name)(17, 33), torch.randn(17, 3, 17)
    weights = dict(net.named_parameters())

    def loss(weights, row):
        with torch.autocast("cpu", enabled=False):
            return torch.func.functional_call(net, weights, row[:, None])[0].square().sum()

    def gradients():
        every_row = torch.func.vmap(torch.func.grad(loss), (None, 1))(weights, input)
        return [*torch.autograd.grad(output, list(weights.values()), retain_graph=True), *every_row.values()]

    output = net(input)[0].square().sum()
    expected = gradients()
    with torch.autocast("cpu", dtype):
        found = gradients()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["GRU", "GRUCell", "LSTMCell"])
def test_torch_returns_float32_there(name, dtype):
    """What docs/compatibility.md says of torch.nn; where this fails, the difference is gone."""
    with torch.autocast("cpu", dtype):
        results = tensors(getattr(torch.nn, name)(3, 5)(torch.randn(4, 3)))
    assert {result.dtype for result in results} == {torch.float32}
