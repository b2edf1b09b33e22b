"""The CUDA half without a GPU: its kernels, its host loop and its checks, run by the emulator on CPU tensors.

The ops of the emulated GPU take the place of the CPU's, so that everything above the op is the same code as ever: the
modules, autograd, autocast, vmap, and the tests of the CPU themselves.
"""

import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import test_features
import torch
from cases import data, module, outputs_and_gradients, parametrize, small, table, tensors
from test_modules import compare
from test_native import layer_arguments

import fastrnn
from fastrnn import _backend, reference

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import native as build

OPS = [f"{cell}_layer{suffix}" for cell in reference.CELLS for suffix in ("", "_backward")]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(scope="session")
def library():
    if _backend.native is None:
        pytest.skip(f"the native library is not loaded: {_backend.reason}")
    if build.cuda_headers() is None:
        pytest.skip("CUDA's headers are not found: install the CUDA toolkit, or set CUDA_HOME")
    torch.ops.load_library(build.build_cuda_sim())
    return torch.ops.fastrnn_sim


@pytest.fixture
def emulated(library):
    """The emulated GPU's ops under the names of the CPU's."""
    calls = []

    def implement(op, function):
        def kernel(*arguments):
            calls.append(op)
            return function(*arguments)

        with warnings.catch_warnings():  # that a kernel is replaced is what is wanted here
            warnings.simplefilter("ignore", UserWarning)
            registered.impl(op, kernel, "CPU", allow_override=True)

    registered = torch.library.Library("fastrnn", "IMPL")
    try:
        for op in OPS:
            implement(op, getattr(library, op).default)
        with fastrnn.backend("native"):
            yield calls
        assert calls, "nothing has run on the emulated GPU"
    finally:
        registered._destroy()


# every seventh case: flags, sizes and dtypes still meet
@parametrize(table(DTYPES)[::7])
def test_against_torch(case, emulated):
    compare(case, "one thread")


@parametrize(small(steps=200, inputs=3, hidden=5, bidirectional=True))
def test_many_steps(case, emulated):
    compare(case, "one thread")


@pytest.mark.parametrize("which", test_features.OPTIONS)
@parametrize(
    [
        replace(case, dtype=dtype)
        for dtype in DTYPES
        for case in small(steps=5, batch=5, inputs=3, hidden=17, num_layers=2, bidirectional=True)
        + small(steps=7, batch=3, inputs=17, hidden=3, layout="batch_first", hx=False)
    ]
)
def test_lengths_and_resets(case, which, emulated):
    test_features.compare_apart(case, which, "one thread")


@pytest.mark.parametrize("which", test_features.OPTIONS)
@parametrize(small(dtype=torch.float64, steps=4, inputs=2, hidden=2, num_layers=2, bidirectional=True))
def test_derivatives(case, which, emulated):
    test_features.test_gradcheck(case, which, "emulated")


@pytest.mark.parametrize("what", ["input", "output", "state", "everything"])
@parametrize(small(steps=5, batch=4, hidden=5, bidirectional=True) + small(steps=5, batch=4, layout="batch_first"))
def test_nan_in_padding_reaches_nothing(case, what, emulated):
    lengths = torch.tensor([5, 0, 2, 4])
    net = module(case)

    def run(poison):
        input, hx = data(case)
        padding = torch.arange(5).unsqueeze(1) >= lengths
        padding = (padding.T if case.batch_first else padding).unsqueeze(-1)
        input = torch.where(
            padding, poison if what in ("input", "everything") else 1.0, input.detach()
        ).requires_grad_()
        results = tensors(net(input.requires_grad_(), hx, lengths))
        gradient = torch.where(padding, poison if what in ("output", "everything") else 1.0, results[0].detach())
        rest = [result.detach() for result in results[1:]]
        sources = [input, *tensors(hx), *net.parameters()]
        return [*results, *torch.autograd.grad(results, sources, [gradient, *rest])]

    for found, expected in zip(run(float("nan")), run(0.5), strict=True):
        assert torch.equal(found, expected)


@parametrize(small(steps=5, batch=3, hidden=5, bidirectional=True))
def test_same_bits_every_run(case, emulated):
    first, second = (outputs_and_gradients(module(case), *data(case)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("features", [False, True], ids=["plain", "lengths and reset"])
@parametrize(small(bidirectional=True) + small(layout="batch_first", hx=False))
def test_opcheck(case, features, emulated):
    op = getattr(torch.ops.fastrnn, f"{case.kind.removesuffix('_proj')}_layer").default
    shape = (case.batch, case.steps) if case.batch_first else (case.steps, case.batch)
    lengths = torch.tensor([3, 0, 2]) if features else None
    reset = torch.eye(3, dtype=torch.bool).expand(*shape) if features else None
    torch.library.opcheck(op, layer_arguments(case, lengths, reset, grad=True))


@parametrize(small(steps=5, batch=4, hidden=5, num_layers=2, bidirectional=True))
def test_per_sample_gradients(case, emulated):
    """The `groups` of the backward op, through vmap."""
    net = module(case)
    weights = {name: weight.detach() for name, weight in net.named_parameters()}
    input = data(case)[0].detach()

    def loss(weights, row, lengths):
        return torch.func.functional_call(net, weights, (row.unsqueeze(1), None, lengths.unsqueeze(0)))[0].sin().sum()

    lengths = torch.tensor([5, 0, 3, 1])
    found = torch.func.vmap(torch.func.grad(loss), (None, 1, 0))(weights, input, lengths)
    for n in range(case.batch):
        expected = torch.func.grad(loss)(weights, input[:, n], lengths[n])
        for name, value in expected.items():
            torch.testing.assert_close(found[name][n], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", ["input", "weights", "recurrent weights", "states", "all but biases"])
@parametrize(small(bidirectional=True, hidden=5))
def test_frozen_parts(case, frozen, emulated):
    """What needs no gradient gets none; the rest gets the same as ever."""
    expected = outputs_and_gradients(module(case), *data(case))
    net, (input, hx) = module(case), data(case)
    sources = {"input": input} | {f"h{index}": state for index, state in enumerate(tensors(hx))}
    sources |= dict(net.named_parameters())
    skip = {
        "input": lambda name: name == "input",
        "weights": lambda name: "_" in name,
        "recurrent weights": lambda name: "weight_hh" in name,
        "states": lambda name: name in ("h0", "h1"),
        "all but biases": lambda name: "bias" not in name,
    }[frozen]
    for name, tensor in sources.items():
        tensor.requires_grad_(not skip(name))
    kept = {name: tensor for name, tensor in sources.items() if not skip(name)}
    results = tensors(net(input, hx))
    generator = torch.Generator().manual_seed(11)
    cotangents = [torch.randn(r.shape, generator=generator, dtype=torch.float64) for r in results]
    cotangents = [c.bfloat16().half().to(r.dtype) for c, r in zip(cotangents, results, strict=True)]
    for name, value in zip(kept, torch.autograd.grad(results, list(kept.values()), cotangents), strict=True):
        torch.testing.assert_close(value, expected[f"grad of {name}"], rtol=0, atol=0)


@parametrize(small(batch=0, bidirectional=True) + small(batch=0, layout="batch_first"))
def test_empty_batch(case, emulated):
    for name, value in outputs_and_gradients(module(case), *data(case)).items():
        assert not value.any(), name


@pytest.mark.parametrize("wrong", [-1, 4])
def test_lengths_out_of_range(wrong, emulated):
    with pytest.raises(RuntimeError, match="lengths should be between 0 and 3"):
        fastrnn.GRU(3, 5)(torch.randn(3, 2, 3), lengths=torch.tensor([1, wrong]))


def test_other_dtypes_are_refused(library):
    input, w_ih, w_hh = (torch.zeros(shape).to(torch.float8_e5m2) for shape in ((2, 2, 3), (5, 3), (5, 5)))
    with pytest.raises(RuntimeError, match="Expected float64, float32, bfloat16 or float16"):
        library.rnn_tanh_layer(input, [], [w_ih, w_hh], None, None, None, False, False, False, False)


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells(name, emulated):
    """A Cell is a layer of one step."""
    ours, theirs = getattr(fastrnn, name)(3, 17), getattr(torch.nn, name)(3, 17)
    theirs.load_state_dict(ours.state_dict())
    input = torch.randn(5, 3)
    torch.testing.assert_close(tensors(ours(input)), tensors(theirs(input)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, emulated):
    net = fastrnn.LSTM(3, 17, num_layers=2, bidirectional=True)
    with torch.autocast("cpu", dtype):
        results = tensors(net.forward_states(torch.randn(5, 3, 3)))
    assert {result.dtype for result in results} == {dtype}
    sum(result.float().sum() for result in results).backward()
    assert all(weight.grad.dtype == torch.float32 and weight.grad.any() for weight in net.parameters())
