"""Streaming sessions: their numbers, step by step, against torch.nn's, for every type of weights."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import KINDS, Case, tensors
from tolerance import check

import fastrnn
from fastrnn import StreamingSession

STEPS = 6


def build(kind, inputs=5, hidden=17, layers=1, dtype=torch.float32, **options):
    case = Case(kind, num_layers=layers, inputs=inputs, hidden=hidden, dtype=dtype)
    name, kinds_own = KINDS[kind]
    sizes = {"proj_size": case.proj} if case.proj else {}
    torch.manual_seed(hidden + layers)
    return getattr(fastrnn, name)(inputs, hidden, layers, **kinds_own, **sizes, **options).to(dtype)


def oracle(net, dtype=torch.float64):
    """torch.nn's module with the same weights, and none of them shared."""
    return copy.deepcopy(fastrnn.to_torch(net)).to(dtype)


def run_both(net, session, x, state):
    """The outputs of all steps: the session's, torch.nn's in float64, torch.nn's own."""
    exact, theirs = oracle(net), oracle(net, x.dtype)
    if state is not None:
        session.state = state
    found = torch.stack([session.step(row) for row in x])
    as_double = None if state is None else torch.utils._pytree.tree_map(torch.Tensor.double, state)
    with torch.no_grad():
        return found, exact(x.double(), as_double)[0], theirs(x, state)[0]


SIZES = [(3, 1), (1, 3), (129, 17), (17, 129), (64, 64)]


@pytest.mark.parametrize("batch", [1, 2, 3, 17])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers(kind, batch, backend):
    """Odd sizes on both sides of every vector and block, one layer and a stack, from zeros and from a given state."""
    for inputs, hidden in SIZES:
        hidden = max(hidden, 2) if kind == "lstm_proj" else hidden  # a projection is narrower
        for layers, with_state in ((1, False), (3, True)):
            net = build(kind, inputs, hidden, layers)
            x = torch.randn(STEPS, batch, inputs)
            state = None
            if with_state:
                with torch.no_grad():
                    state = net(torch.randn(2, batch, inputs))[1]
            found, exact, theirs = run_both(net, StreamingSession(net, batch), x, state)
            check(f"{kind} {inputs} {hidden} {layers}", found, theirs, exact)


@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm", "gru"])
def test_numbers_of_large_weights(kind, native):
    """Of more than 1 MiB, which lie in another order."""
    net = build(kind, 33, 529)
    x = torch.randn(STEPS, 2, 33)
    found, exact, theirs = run_both(net, StreamingSession(net, 2), x, None)
    check(kind, found, theirs, exact)
    assert torch.equal(StreamingSession(net, 2).chunk(x), found)


@pytest.mark.parametrize("kind", KINDS)
def test_without_biases_and_with_weights_of_another_seed(kind, backend):
    net = build(kind, 9, 33, 2, bias=False)
    found, exact, theirs = run_both(net, StreamingSession(net, 2), torch.randn(STEPS, 2, 9), None)
    check("output", found, theirs, exact)


@pytest.mark.parametrize("kind", KINDS)
def test_float64(kind, backend):
    net = build(kind, 9, 33, 2, dtype=torch.float64)
    session = StreamingSession(net, 3)
    x = torch.randn(STEPS, 3, 9, dtype=torch.float64)
    found = torch.stack([session.step(row) for row in x])
    with torch.no_grad():
        expected = oracle(net, x.dtype)(x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    assert found.dtype == tensors(session.state)[0].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half(kind, dtype, backend):
    """Computed in float32 from the same weights: only what goes out is rounded."""
    net = build(kind, 9, 33, 2, dtype=dtype)
    session = StreamingSession(net, 2)
    x = torch.randn(STEPS, 2, 9).to(dtype)
    found = torch.stack([session.step(row) for row in x])
    with torch.no_grad():
        exact = oracle(net)(x.double())[0]
    assert found.dtype == dtype
    bound = torch.finfo(dtype).eps / 2 * exact.abs().max() + 1e-5
    assert (found.double() - exact).abs().max() <= bound
    assert tensors(session.state)[0].dtype == torch.float32


# --- Rounded weights --------------------------------------------------------------------------------------------------


def with_weights(net, change):
    """A copy in float64 whose matrices have been changed."""
    exact = oracle(net)
    with torch.no_grad():
        for weight in exact.parameters():
            if weight.dim() == 2:
                weight.copy_(change(weight.float()))
    return exact


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_weights(kind, backend):
    """Exactly a session whose weights have been rounded: the rule of float32 holds."""
    net = build(kind, 129, 33, 2)
    session = StreamingSession(net, 3, torch.bfloat16)
    assert session.weight_dtype == torch.bfloat16
    x = torch.randn(STEPS, 3, 129)
    exact = with_weights(net, lambda weight: weight.bfloat16().double())
    theirs = oracle(net, torch.float32)
    theirs.load_state_dict(exact.state_dict())
    found = torch.stack([session.step(row) for row in x])
    with torch.no_grad():
        check("output", found, theirs(x)[0], exact(x.double())[0])


def quantised(values, dim):
    """Values as 8-bit integers times a scale for each row: float32 arithmetic, as the session's own."""
    largest = values.float().abs().amax(dim, keepdim=True)
    inverse = torch.where(largest > 0, 127 / largest, 0)
    return (values.float() * inverse).round().clamp(-127, 127).double() * (largest / 127).double()


def rounding(values, dim):
    """Half a step of the scale of each row."""
    return values.abs().amax(dim, keepdim=True).double() / 254


# How far the output can be off where every pre-activation is off by at most 1: from the derivatives of the cell, with
# |gates| <= 1, sigmoid' <= 1/4, tanh' <= 1.
def output_error(kind, pre, c, q):
    if kind.startswith("rnn"):
        return pre[..., 0, :]
    if kind == "gru":
        r, z, n, h = pre[..., 0, :], pre[..., 1, :], pre[..., 2, :], pre[..., 3, :]
        return z / 4 * 2 + n + h + r / 4 * q.abs()
    i, f, g, o = (pre[..., gate, :] for gate in range(4))
    return o / 4 + f / 4 * c.abs() + i / 4 + g


@pytest.mark.parametrize("inputs, hidden", [(40, 33), (129, 64), (3, 5)])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lstm_proj"])
def test_int8_weights_within_the_bound_of_their_rounding(kind, inputs, hidden, native):
    """Each step from the session's own state: |w x - w' x'| <= |w - w'| |x'| + |w| |x - x'|, through the cell."""
    net = build(kind, inputs, hidden)
    session = StreamingSession(net, 2, torch.int8)
    exact = oracle(net)
    w_ih, w_hh = net.weight_ih_l0.detach().double(), net.weight_hh_l0.detach().double()
    gates = w_ih.shape[0] // hidden
    for _ in range(STEPS):
        x = torch.randn(2, inputs)
        state = session.state
        h = (state[0] if kind == "lstm" else state)[0].double()
        found = session.step(x).double()
        with torch.no_grad():
            expected = exact(x[None].double(), torch.utils._pytree.tree_map(torch.Tensor.double, state))[0][0]

        def error(w, values):
            weights_off = rounding(w, 1)[:, 0] * quantised(values, 1).abs().sum(1, keepdim=True)
            values_off = rounding(values, 1) * w.abs().sum(1)
            return (weights_off + values_off).unflatten(-1, (gates, hidden))

        from_x, from_h = error(w_ih, x.double()), error(w_hh, h)
        if kind == "gru":
            pre = torch.cat([from_x[:, :2] + from_h[:, :2], from_x[:, 2:], from_h[:, 2:]], 1)
            q = h @ w_hh[2 * hidden :].T + net.bias_hh_l0.detach().double()[2 * hidden :]
            bound = output_error(kind, pre, None, q)
        else:
            bound = output_error(kind, from_x + from_h, state[1][0].double() if kind == "lstm" else None, None)
        assert ((found - expected).abs() <= bound + 1e-6).all()


@pytest.mark.parametrize("inputs, hidden", [(40, 33), (129, 64), (3, 5)])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lstm_proj"])
def test_int8_is_what_it_is_said_to_be(kind, inputs, hidden, native):
    """Sums of integers are exact: float64 arithmetic on the quantised numbers gives the same to float32's rounding."""
    net = build(kind, inputs, hidden)
    session = StreamingSession(net, 3, torch.int8)
    exact = with_weights(net, lambda weight: quantised(weight, 1))
    w_hh = exact.weight_hh_l0.detach()
    for _ in range(STEPS):
        x = torch.randn(3, inputs)
        state = session.state
        h = (state[0] if kind == "lstm" else state)[0].double()
        found = session.step(x)
        # the product takes the quantised h, the cell of a GRU h itself: what they differ by goes through the biases
        with torch.no_grad():
            reference = torch.nn.GRUCell(inputs, hidden) if kind == "gru" else None
            w_ih = exact.weight_ih_l0
            gate_x = quantised(x, 1) @ w_ih.T + exact.bias_ih_l0
            gate_h = quantised(h, 1) @ w_hh.T + exact.bias_hh_l0
            if reference is not None:
                (rx, zx, nx), (rh, zh, nh) = gate_x.chunk(3, 1), gate_h.chunk(3, 1)
                r, z = torch.sigmoid(rx + rh), torch.sigmoid(zx + zh)
                n = torch.tanh(nx + r * nh)
                expected = n + z * (h - n)
            elif kind == "lstm":
                i, f, g, o = (gate_x + gate_h).chunk(4, 1)
                c = torch.sigmoid(f) * state[1][0].double() + torch.sigmoid(i) * torch.tanh(g)
                expected = torch.sigmoid(o) * torch.tanh(c)
            else:
                expected = torch.tanh(gate_x + gate_h) if kind == "rnn_tanh" else torch.relu(gate_x + gate_h)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_int8_stack_stays_near(kind, backend):
    """Over layers and steps rounding errors pass through the state; they stay small beside the output."""
    net = build(kind, 40, 64, 2)
    session = StreamingSession(net, 1, torch.int8)
    x = torch.randn(50, 1, 40)
    with torch.no_grad():
        expected = oracle(net, x.dtype)(x)[0]
    found = session.chunk(x)
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


def test_int8_of_zeros_and_of_what_is_not_finite(native):
    net = build("lstm", 5, 17)
    session = StreamingSession(net, 2, torch.int8)
    x = torch.zeros(2, 5)
    x[1, 3] = float("nan")
    found = session.step(x)
    assert torch.isfinite(found[0]).all() and torch.isnan(found[1]).all()
    session.reset(torch.tensor([False, True]))
    assert torch.isfinite(session.step(torch.zeros(2, 5))).all()
    x[1, 3] = float("inf")
    assert torch.isnan(session.step(x)[1]).all()


@pytest.mark.parametrize("weight_dtype", [None, torch.bfloat16])
def test_infinite_input_saturates_as_in_the_module(weight_dtype, backend):
    """Beyond the last unit and the last feature lie zeros, which an infinite value must not turn into NaN."""
    net = build("lstm", 5, 17, 2)
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(weight.bfloat16())
    session = StreamingSession(net, 1, weight_dtype)
    x = torch.tensor([float("inf"), 0.0, 1.0, 2.0, 3.0])
    with torch.no_grad():
        expected = net(x[None])[0][0]
    found = session.step(x)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert torch.isfinite(found).all()
    assert torch.isfinite(session.step(torch.ones(5))).all()


# --- Every instruction set of this machine ----------------------------------------------------------------------------


SELECTED = "not python and (numbers or bfloat16 or int8 or float64 or infinite or chunk)"


@pytest.mark.parametrize("capability", [pytest.param("avx2", marks=pytest.mark.slow), "default"])
def test_other_instruction_sets(capability, native):
    """The tests of the numbers again, where the library is told to use less than the machine has."""
    order = ("default", "avx2", "avx512")
    if order.index(capability) >= order.index(native.cpu_capability()):
        pytest.skip(f"this machine, or FASTRNN_CPU_CAPABILITY, stops at {native.cpu_capability()}")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("FASTRNN_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", SELECTED],
        env=inherited
        | {"FASTRNN_CPU_CAPABILITY": capability, "FASTRNN_BACKEND": "native", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_int8_says_where_the_machine_has_no_int8_dot(native):
    """Run for other instruction sets too, of which only AVX-512 may have it."""
    said = "multiplied without the int8 dot product that this machine lacks"
    assert native.cpu_capability() == "avx512" or not native.has_int8_dot()
    for weight_dtype in (None, torch.int8):
        session = StreamingSession(build("gru"), weight_dtype=weight_dtype)
        assert (said in repr(session)) == (weight_dtype == torch.int8 and not native.has_int8_dot())
