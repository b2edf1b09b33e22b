"""float32 multiplied in parts of bfloat16: two by torch's leave (TF32), three for all of its digits."""

import pytest
from test_backend import python


@pytest.fixture(params=["emulate", "auto"])
def products(request, native):
    """FASTRNN_CPU_BF16: loops in place of a matrix unit, and the machine's own."""
    if request.param == "auto" and native.cpu_parts() == "none":
        pytest.skip("this machine has no matrix unit for bfloat16, or FASTRNN_CPU_BF16 forbids it")
    return request.param


# Whole cases, as in test_half.py: several tiles of rows and of k, rows in tiles of less than 16, an input within the
# products and one ahead of them, packed rows, both directions, a projection, lengths and resets.
RULE = """
    import torch, fastrnn
    from cases import data, module, small
    from test_features import OPTIONS, compare_apart
    from test_modules import compare
    torch.set_num_threads(1)
    shapes = (
        {"steps": 5, "batch": 29, "inputs": 17, "hidden": 65},
        {"steps": 4, "batch": 16, "inputs": 1, "hidden": 129, "layout": "unsorted"},
        {"steps": 7, "batch": 47, "inputs": 65, "hidden": 64, "bidirectional": True, "num_layers": 2, "bias": False},
        {"steps": 5, "batch": 61, "inputs": 259, "hidden": 67, "layout": "sorted", "hx": False},
        {"steps": 4, "batch": 16, "inputs": 321, "hidden": 193},
    )
    for shape in shapes:
        for case in small(**shape):
            words = fastrnn.explain(module(case), *data(case))
            assert words.count("bf16x3") >= 2 * case.num_layers, case
            if case.inputs == 321 and not case.kind.startswith("rnn"):
                assert "multiplied along" not in words, "its weights should be more than half of L2"
            compare(case, "BACKEND")
    for which in OPTIONS:
        for case in small(steps=5, batch=29, inputs=3, hidden=65, bidirectional=True, layout="batch_first"):
            assert fastrnn.explain(module(case), *data(case)).count("bf16x3") == 2
            compare_apart(case, which, "BACKEND")
"""


# with the backend "native", compare() runs on two threads
@pytest.mark.parametrize("backend", ["one thread", pytest.param("native", marks=pytest.mark.slow)])
def test_rule_in_three_parts(products, backend, native):
    code = RULE.replace("BACKEND", backend)
    done = python(code, FASTRNN_BACKEND="native", FASTRNN_CPU_BF16=products, FASTRNN_CPU_FLOAT32="bf16x3")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_rule_on_narrow_vectors(narrow_vectors, native):
    """Nothing has a matrix unit beside these, but the scans' side of it must be right with any width."""
    code = RULE.replace("BACKEND", "one thread")
    variables = {"FASTRNN_CPU_BF16": "emulate", "FASTRNN_CPU_CAPABILITY": narrow_vectors}
    done = python(code, FASTRNN_BACKEND="native", FASTRNN_CPU_FLOAT32="bf16x3", **variables)
    assert done.returncode == 0, done.stderr


# The switches, and what two parts err by: less than TF32's 11 bits would.
PRECISION = """
    import torch, fastrnn
    from cases import output_and_gradients_of_squares as results
    rnn = torch.backends.mkldnn.rnn

    for name in ("RNN", "LSTM", "GRU"):
        torch.manual_seed(1)
        net, input = getattr(fastrnn, name)(97, 129, bidirectional=True), torch.randn(9, 37, 97)
        rnn.fp32_precision = "none"
        exact = results(net, input)
        assert "bf16x" not in fastrnn.explain(net, input)
        rnn.fp32_precision = "tf32"
        assert fastrnn.explain(net, input).count("bf16x2") == 2  # forward and backward
        with torch.backends.mkldnn.flags(enabled=False):
            assert fastrnn.explain(net, input).count("bf16x2") == 2
        assert "bf16x" not in fastrnn.explain(net, input[:, :11])
        assert "bf16x" not in fastrnn.explain(net.double(), input.double())
        assert "bf16x" not in fastrnn.explain(net.bfloat16(), input.bfloat16())
        assert "products of bfloat16" in fastrnn.explain(net, input.bfloat16())
        torch.manual_seed(1)
        net = getattr(fastrnn, name)(97, 129, bidirectional=True)
        for one, other in zip(results(net, input), exact, strict=True):
            error = (one - other).abs().max() / other.abs().max()
            assert 1e-6 < error < 2**-14, (name, error)
        rnn.fp32_precision = "none"
        torch.backends.fp32_precision = "tf32"  # of everything that says nothing else
        assert fastrnn.explain(net, input).count("bf16x2") == 2
        torch.backends.fp32_precision = "none"
        rnn.fp32_precision = "ieee"
        assert "bf16x" not in fastrnn.explain(net, input)
        for one, other in zip(results(net, input), exact, strict=True):
            assert torch.equal(one, other)
"""


def test_two_parts_by_leave(products, native):
    done = python(PRECISION, FASTRNN_BACKEND="native", FASTRNN_CPU_BF16=products)
    assert done.returncode == 0, done.stderr


def test_memory_of_padding(products, native):
    """What lay where the gradients of padding go is neither in them nor taken for a NaN of the parts."""
    code = """
        import torch, fastrnn
        torch.backends.mkldnn.rnn.fp32_precision = "tf32"
        net, input = fastrnn.LSTM(97, 129), torch.randn(9, 37, 97, requires_grad=True)
        lengths = torch.arange(37) % 9 + 1
        assert fastrnn.explain(net, input).count("bf16x2") == 2
        for _ in range(3):
            grads = torch.autograd.grad(net(input, lengths=lengths)[0].square().sum(), [input, *net.parameters()])
            assert (grads[0][torch.arange(9)[:, None] >= lengths] == 0).all()
            first = globals().setdefault("first", [grad.clone() for grad in grads])
            assert all(torch.equal(one, other) for one, other in zip(grads, first, strict=True))
            del grads
            for _ in range(9):
                torch.full_like(input, torch.nan)
    """
    done = python(code, FASTRNN_BACKEND="native", FASTRNN_CPU_BF16=products)
    assert done.returncode == 0, done.stderr


def test_precision_where_there_is_no_unit(native):
    code = """
        import torch, fastrnn
        torch.backends.mkldnn.rnn.fp32_precision = "tf32"
        assert fastrnn.build_info()["cpu_parts"] == "none"
        assert "bf16x" not in fastrnn.explain(fastrnn.LSTM(65, 65), torch.ones(5, 17, 65))
    """
    done = python(code, FASTRNN_BACKEND="native", FASTRNN_CPU_BF16="off", FASTRNN_CPU_FLOAT32="bf16x3")
    assert done.returncode == 0, done.stderr


# Parts of infinity are NaN: where one enters or arises, results are those of float32, bit by bit.
SPECIAL = """
    import torch, fastrnn
    rnn = torch.backends.mkldnn.rnn

    def results(net, input, weight):
        net.zero_grad()
        input = input.clone().requires_grad_()
        output, state = net(input)
        (output * weight).sum().backward()
        return [output.detach(), input.grad, *[p.grad.clone() for p in net.parameters()]]

    all_ones = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # a NaN, too
    nets = [fastrnn.RNN(17, 65), fastrnn.RNN(17, 65, nonlinearity="relu"), fastrnn.LSTM(17, 65), fastrnn.GRU(17, 65)]
    for net in nets:
        for value, where in ((torch.inf, "input"), (-torch.inf, "input"), (torch.nan, "input"), (3.4e38, "input"),
                             (all_ones, "input"), (all_ones, "grad"),
                             (torch.inf, "weight"), (torch.nan, "grad"), (torch.inf, "grad")):
            torch.manual_seed(2)
            input, weight = torch.randn(5, 19, 17), torch.randn(5, 19, 65)
            with torch.no_grad():
                for p in net.parameters():
                    p.uniform_(-0.1, 0.1)
                if where == "weight":
                    net.weight_ih_l0[3, 5] = value
            if where == "input":
                input[1, 3, 5] = value
            if where == "grad":
                weight[2, 4, 6] = value
            rnn.fp32_precision = "ieee"
            expected = results(net, input, weight)
            rnn.fp32_precision = "tf32"
            assert "bf16x2" in fastrnn.explain(net, input)
            found = results(net, input, weight)
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one.isnan(), other.isnan()), (type(net), value, where)
                assert torch.equal(one.isinf(), other.isinf()), (type(net), value, where)
            if where != "grad":  # the forward pass was repeated as a whole
                assert torch.equal(found[0].nan_to_num(), expected[0].nan_to_num())
"""


def test_infinity_and_nan(products, native):
    done = python(SPECIAL, FASTRNN_BACKEND="native", FASTRNN_CPU_BF16=products)
    assert done.returncode == 0, done.stderr


def test_value_that_is_not_one(native):
    done = python("import fastrnn", FASTRNN_BACKEND="native", FASTRNN_CPU_FLOAT32="bf16x9")
    assert "ValueError: FASTRNN_CPU_FLOAT32 should be one of fma or bf16x3, got: 'bf16x9'" in done.stderr
