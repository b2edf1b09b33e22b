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
    print(fastrnn.build_info()["cpu_capability"])
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
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_rule_on_every_capability(capability, dtype, native):
    """Forward and backward, by the rule of tolerance.py against torch's own 16-bit error."""
    order = ["default", "avx2", "avx512"]
    if capability not in order[: order.index(native.cpu_capability()) + 1]:
        pytest.skip(f"this machine, or FASTRNN_CPU_CAPABILITY, stops at {native.cpu_capability()}")
    done = python(CODE.replace("DTYPE", dtype), FASTRNN_BACKEND="native", FASTRNN_CPU_CAPABILITY=capability)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == capability


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
@pytest.mark.parametrize("name", ["GRU", "GRUCell", "LSTMCell"])
def test_torch_returns_float32_there(name, dtype):
    """What docs/compatibility.md says of torch.nn; where this fails, the difference is gone."""
    with torch.autocast("cpu", dtype):
        results = tensors(getattr(torch.nn, name)(3, 5)(torch.randn(4, 3)))
    assert {result.dtype for result in results} == {torch.float32}
