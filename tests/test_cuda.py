"""The CUDA half, on a GPU where there is one, and on an emulated one anywhere.

The ops of the emulated GPU take the place of the CPU's, so everything above the op is the same code as ever: modules,
autograd, autocast, vmap, and the CPU's own tests. On a GPU the yardstick is cuDNN's error, with TF32 off.
"""

from dataclasses import replace

import emulation
import pytest
import test_features
import torch
from cases import (
    Case,
    data,
    module,
    mostly_slow,
    outputs_and_gradients,
    parametrize,
    row_lengths,
    small,
    table,
    tensors,
)
from test_modules import compare
from test_native import layer_arguments

import fastrnn
from fastrnn import _backend

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def need_cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not _backend.native_cuda:
        pytest.skip("fastrnn is built without CUDA")


@pytest.fixture(scope="session")
def emulated():
    """The emulated ops under their own names."""
    if emulation.missing():
        pytest.skip(emulation.missing())
    return emulation.library()


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request, monkeypatch):
    """Where the tensors are: "cpu", with the emulated GPU's ops in place of the CPU's, or "cuda". Step by step: the
    persistent scans have their own tests."""
    monkeypatch.setenv("FASTRNN_CUDA_PLAN", "stepwise")
    if request.param == "emulated":
        request.getfixturevalue("emulated")
        with emulation.emulated_ops() as calls, fastrnn.backend("native"):
            yield "cpu"
        assert calls, "nothing has run on the emulated GPU"
        return
    need_cuda()
    with torch.backends.cudnn.flags(allow_tf32=False), fastrnn.backend("native"):
        yield "cuda"


# every thirteenth case: flags, sizes and dtypes still meet
@parametrize(table(DTYPES)[::13])
def test_against_torch(case, device):
    compare(case, "one thread", device)


@parametrize(small(steps=200, inputs=3, hidden=5, bidirectional=True))
def test_many_steps(case, device):
    compare(case, "one thread", device)


# wider than a block, more rows than a block has, more blocks than a multiprocessor
@parametrize(small(steps=2, batch=129, inputs=3, hidden=3) + small(steps=2, batch=3, inputs=17, hidden=515))
def test_blocks(case, device):
    compare(case, "one thread", device)


@pytest.mark.parametrize("which", test_features.OPTIONS)
@parametrize(
    [
        replace(case, dtype=dtype)
        for dtype in DTYPES
        for case in small(steps=5, batch=5, inputs=3, hidden=17, num_layers=2, bidirectional=True)
        + small(steps=7, batch=3, inputs=17, hidden=3, layout="batch_first", hx=False)
    ]
)
def test_lengths_and_resets(case, which, device):
    test_features.compare_apart(case, which, "one thread", device)


@pytest.mark.parametrize("which", test_features.OPTIONS)
@parametrize(mostly_slow(small(dtype=torch.float64, steps=4, inputs=2, hidden=2, num_layers=2, bidirectional=True)))
def test_derivatives(case, which, device):
    test_features.check_derivatives(case, which, device)


@pytest.mark.parametrize("what", ["input", "output", "everything"])
@parametrize(small(steps=5, batch=4, hidden=5, bidirectional=True) + small(steps=5, batch=4, layout="batch_first"))
def test_nan_in_padding_reaches_nothing(case, what, device):
    lengths = torch.tensor([5, 0, 2, 4], device=device)
    net = module(case).to(device)
    padding = torch.arange(5, device=device).unsqueeze(1) >= lengths
    padding = (padding.T if case.batch_first else padding).unsqueeze(-1)

    def run(poison):
        input, hx = data(case, device=device)
        input = torch.where(padding, poison if what in ("input", "everything") else 1.0, input.detach())
        results = tensors(net(input.requires_grad_(), hx, lengths))
        gradient = torch.where(padding, poison if what in ("output", "everything") else 1.0, results[0].detach())
        rest = [result.detach() for result in results[1:]]
        sources = [input, *tensors(hx), *net.parameters()]
        return [*results, *torch.autograd.grad(results, sources, [gradient, *rest])]

    for found, expected in zip(run(float("nan")), run(0.5), strict=True):
        assert torch.equal(found, expected)


@parametrize(small(steps=5, batch=3, hidden=129, bidirectional=True))
def test_same_bits_every_run(case, device):
    first, second = (outputs_and_gradients(module(case).to(device), *data(case, device=device)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("features", [False, True], ids=["plain", "lengths and reset"])
@parametrize(mostly_slow(small(bidirectional=True) + small(layout="batch_first", hx=False)))
def test_opcheck(case, features, device):
    op = getattr(torch.ops.fastrnn, f"{case.kind.removesuffix('_proj')}_layer").default
    shape = (case.batch, case.steps) if case.batch_first else (case.steps, case.batch)
    lengths = torch.tensor([3, 0, 2], device=device) if features else None
    reset = torch.eye(3, dtype=torch.bool, device=device).expand(*shape) if features else None
    torch.library.opcheck(op, layer_arguments(case, lengths, reset, grad=True, device=device))


@parametrize(small(steps=5, batch=4, hidden=5, num_layers=2, bidirectional=True))
def test_per_sample_gradients(case, device):
    """The `groups` of the backward op, through vmap."""
    net = module(case).to(device)
    weights = {name: weight.detach() for name, weight in net.named_parameters()}
    input = data(case, device=device)[0].detach()

    def loss(weights, row, lengths):
        return torch.func.functional_call(net, weights, (row.unsqueeze(1), None, lengths.unsqueeze(0)))[0].sin().sum()

    lengths = torch.tensor([5, 0, 3, 1], device=device)
    found = torch.func.vmap(torch.func.grad(loss), (None, 1, 0))(weights, input, lengths)
    for n in range(case.batch):
        expected = torch.func.grad(loss)(weights, input[:, n], lengths[n])
        for name, value in expected.items():
            torch.testing.assert_close(found[name][n], value, rtol=1e-5, atol=1e-6)


FROZEN = {
    "input": lambda name: name == "input",
    "weights": lambda name: "_" in name,
    "recurrent weights": lambda name: "weight_hh" in name,
    "states": lambda name: name in ("h0", "h1"),
    "all but biases": lambda name: "bias" not in name,
}


@pytest.mark.parametrize("frozen", FROZEN)
@parametrize(small(bidirectional=True, hidden=5))
def test_frozen_parts(case, frozen, device):
    """What needs no gradient gets none; the rest gets the same as ever."""
    expected = outputs_and_gradients(module(case).to(device), *data(case, device=device))
    net, (input, hx) = module(case).to(device), data(case, device=device)
    sources = {"input": input} | {f"h{index}": state for index, state in enumerate(tensors(hx))}
    sources |= dict(net.named_parameters())
    for name, tensor in sources.items():
        tensor.requires_grad_(not FROZEN[frozen](name))
    kept = {name: tensor for name, tensor in sources.items() if tensor.requires_grad}
    results = tensors(net(input, hx))
    generator = torch.Generator().manual_seed(11)  # the cotangents of outputs_and_gradients
    cotangents = [torch.randn(r.shape, generator=generator, dtype=torch.float64).bfloat16().to(r) for r in results]
    for name, value in zip(kept, torch.autograd.grad(results, list(kept.values()), cotangents), strict=True):
        torch.testing.assert_close(value, expected[f"grad of {name}"], rtol=0, atol=0)


@parametrize(small(batch=0, bidirectional=True) + small(batch=0, layout="batch_first"))
def test_empty_batch(case, device):
    for name, value in outputs_and_gradients(module(case).to(device), *data(case, device=device)).items():
        assert not value.any(), name


@pytest.mark.parametrize("wrong", [-1, 4])
def test_lengths_out_of_range(wrong, device):
    if device == "cuda":
        pytest.skip("it is an assertion on the device, which ends the process's use of it")
    with pytest.raises(RuntimeError, match="lengths should be between 0 and 3"):
        fastrnn.GRU(3, 5)(torch.randn(3, 2, 3), lengths=torch.tensor([1, wrong]))


def test_other_dtypes_are_refused(emulated):
    input, w_ih, w_hh = (torch.zeros(shape).to(torch.float8_e5m2) for shape in ((2, 2, 3), (5, 3), (5, 5)))
    with pytest.raises(RuntimeError, match="Expected float64, float32, bfloat16 or float16"):
        emulated.rnn_tanh_layer(input, [], [w_ih, w_hh], None, None, None, False, False, False, False)


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells(name, device):
    """A Cell is a layer of one step."""
    ours, theirs = (getattr(library, name)(3, 17, device=device) for library in (fastrnn, torch.nn))
    theirs.load_state_dict(ours.state_dict())
    input = torch.randn(5, 3, device=device)
    torch.testing.assert_close(tensors(ours(input)), tensors(theirs(input)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, device):
    net = fastrnn.LSTM(3, 17, num_layers=2, bidirectional=True, device=device)
    with torch.autocast(device, dtype):
        results = tensors(net.forward_states(torch.randn(5, 3, 3, device=device)))
    assert {result.dtype for result in results} == {dtype}
    sum(result.float().sum() for result in results).backward()
    assert all(weight.grad.dtype == torch.float32 and weight.grad.any() for weight in net.parameters())


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_backward_in_float32_whatever_autocast_says_there(name, device):
    """Sums over so many rows are made of several, by ops that autocast would round."""
    net, input = getattr(fastrnn, name)(17, 33).to(device), torch.randn(129, 17, 17, device=device)
    weights = list(net.parameters())
    loss = net(input)[0].square().sum()
    expected = torch.autograd.grad(loss, weights, retain_graph=True)
    with torch.autocast(device, torch.bfloat16):
        found = torch.autograd.grad(loss, weights)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_convert(device):
    theirs = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.GRU(5, 17, 2, bidirectional=True)).to(device)
    input = torch.randn(7, 3, 3, device=device)
    expected = tensors(theirs(input))
    torch.testing.assert_close(tensors(fastrnn.convert(theirs)(input)), expected)


# --- What only a GPU has --------------------------------------------------------------------------------------------


@pytest.fixture
def cuda():
    need_cuda()
    with fastrnn.backend("native"):
        yield


@pytest.mark.cuda
@parametrize(small(steps=5, batch=3, hidden=17, bidirectional=True) + small(steps=5, batch=3, layout="sorted"))
def test_graph_capture(case, cuda):
    """Forward and backward in a graph, replayed on other numbers."""
    net, (input, _) = module(case).to("cuda"), data(case, device="cuda")
    rows = tensors(input)[0]

    def run():
        return tensors(net(input))[0], *torch.autograd.grad(tensors(net(input))[0].sum(), [rows, *net.parameters()])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        rows.copy_(torch.randn_like(rows))
    graph.replay()
    torch.testing.assert_close(captured, run(), rtol=0, atol=0)


@pytest.mark.cuda
def test_graph_capture_with_lengths_and_resets(cuda):
    """The host reads neither: other ones may be put in between replays."""
    case = Case("lstm", steps=7, batch=5, hidden=17)
    net, (input, _) = module(case).to("cuda"), data(case, device="cuda")
    lengths, reset = row_lengths(case).to("cuda"), torch.rand(7, 5, device="cuda") < 0.2
    with torch.no_grad():
        net(input, None, lengths, reset)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = net(input, None, lengths, reset)
        lengths.copy_(lengths.flip(0))
        reset.copy_(reset.flip(0))
        graph.replay()
        torch.testing.assert_close(captured, net(input, None, lengths, reset), rtol=0, atol=0)


@pytest.mark.cuda
def test_side_stream(cuda):
    """Work goes to the current stream: what is queued there before is waited for, without a word to the host."""
    case = Case("gru", steps=17, batch=17, inputs=129, hidden=129)
    net, (input, _) = module(case).to("cuda"), data(case, device="cuda")
    expected = net(input)[0]
    stream = torch.cuda.Stream()
    late = torch.zeros_like(input)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(50_000_000)
        late.copy_(input)
        found = net(late)[0]
    stream.synchronize()
    assert torch.equal(found, expected)


@parametrize(
    [
        Case("gru", steps=39, batch=14, inputs=3, hidden=5, bidirectional=True),
        Case("lstm", steps=2, batch=257, inputs=3, hidden=513, bidirectional=True),
    ]
)
def test_gradients_in_short_sums(case, device):
    """Of float32: over 546 rows, which are not a multiple of the sums; of weights by one product, and of larger ones by
    several; over 2,052 columns, added to those of the first direction."""
    compare(case, "one thread", device)


@pytest.mark.cuda
@parametrize(
    [
        Case("gru", steps=40, batch=19, inputs=3, hidden=1024),
        Case("lstm", steps=70, batch=256, inputs=17, hidden=768),
    ]
)
def test_weight_gradients_over_many_rows(case, cuda):
    """Sums over 760 and 17,920 rows, which one float32 each would round too often."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        compare(case, "one thread", "cuda")


@pytest.mark.cuda
def test_tf32_as_torch_says(cuda, monkeypatch):
    """Step by step the products are torch's own, and follow its switch. (The persistent scans never use TF32.)"""
    monkeypatch.setenv("FASTRNN_CUDA_PLAN", "stepwise")
    case = Case("lstm", steps=5, batch=129, inputs=129, hidden=129)
    net, (input, hx) = module(case).to("cuda"), data(case, device="cuda")
    oracle = module(case, torch.nn, torch.float64)(*data(case, torch.float64))[0]
    errors = {}
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            errors[allowed] = (net(input, hx)[0].double().cpu() - oracle).abs().max().item()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert errors[False] < 1e-5 < errors[True] < 1e-2


@pytest.mark.cuda
def test_more_than_two_to_the_31_elements(cuda):
    """Indices are 64 bits wide. The last rows are those of a small batch of the same numbers."""
    steps, batch, hidden = 3, 180_001, 1000  # gates: 3 * 180,001 * 4,000 elements
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("less than 40 GB of device memory free")
    net = fastrnn.LSTM(3, hidden, device="cuda")
    input = torch.randn(steps, batch, 3, device="cuda")
    with torch.no_grad():
        found, expected = net(input)[0][:, -17:], net(input[:, -17:])[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
