"""Lengths, resets and per-step states, against torch.nn run on every row and segment apart."""

from dataclasses import replace

import pytest
import torch
from cases import Case, data, module, mostly_slow, outputs_and_gradients, parametrize, small, tensors, threads
from tolerance import check, worst

import fastrnn

FLAGS = [
    {},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "bias": False},
    {"bidirectional": True, "layout": "batch_first"},
    {"num_layers": 2, "bidirectional": True, "hx": False},
]
SIZES = [{"steps": 17, "batch": 17, "inputs": 3, "hidden": 17}, {"steps": 3, "batch": 3, "inputs": 17, "hidden": 129}]
TABLE = [case for flags in FLAGS for size in SIZES for case in small(**flags, **size)]
OPTIONS = ("lengths", "reset", "both")


def options(case, which):
    """Lengths with 0 and T among them; resets at the first and the last step, and in padding."""
    generator = torch.Generator().manual_seed(case.steps)
    lengths = torch.randint(0, case.steps + 1, (case.batch,), generator=generator)
    lengths[0], lengths[-1] = case.steps, 0
    shape = (case.batch, case.steps) if case.batch_first else (case.steps, case.batch)
    reset = torch.rand(shape, generator=generator) < 0.3
    time_major = reset.transpose(0, 1) if case.batch_first else reset
    time_major[0, 0] = time_major[-1, 0] = True
    time_major[0, 1] = False
    chosen = {"lengths": lengths, "reset": reset}
    return chosen if which == "both" else {which: chosen[which]}


class Apart:
    """torch.nn on every segment of every row by itself."""

    def __init__(self, case, dtype, device="cpu"):
        self.case, self.net = case, module(case, torch.nn, dtype).to(device)

    def named_parameters(self):
        return self.net.named_parameters()

    def __call__(self, input, hx, lengths=None, reset=None):
        case = self.case
        if case.batch_first:
            input, reset = input.transpose(0, 1), None if reset is None else reset.transpose(0, 1)
        lengths = torch.full((case.batch,), case.steps) if lengths is None else lengths
        reset = torch.zeros(case.steps, case.batch, dtype=torch.bool) if reset is None else reset
        if hx is None:
            sizes = [case.proj or case.hidden, case.hidden][: 2 if case.kind.startswith("lstm") else 1]
            states = [input.new_zeros(case.num_layers * case.directions, case.batch, size) for size in sizes]
        else:
            states = list(hx) if isinstance(hx, tuple) else [hx]
        rows = [
            self.row(input[:, n], [state[:, n] for state in states], int(lengths[n]), reset[:, n])
            for n in range(case.batch)
        ]
        output = torch.stack([row[0] for row in rows], 0 if case.batch_first else 1)
        return output, *(torch.stack(state, 1) for state in zip(*(row[1] for row in rows), strict=True))

    def row(self, input, states, length, reset):
        width = (self.case.proj or self.case.hidden) * self.case.directions
        padding = input.new_zeros(self.case.steps - length, width)
        if length == 0:
            return padding, states
        starts = sorted({0, *torch.nonzero(reset[:length]).flatten().tolist()})
        reverse = torch.arange(len(states[0])).unsqueeze(1) % self.case.directions == 1
        outputs, finals = [], []
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            forward_kept = start == 0 and not bool(reset[0])
            kept = torch.where(reverse, end == length, forward_kept)
            entering = tuple(torch.where(kept.to(state.device), state, 0.0) for state in states)
            segment = input[start:end]
            segment = segment.unsqueeze(0 if self.case.batch_first else 1)
            output, final = self.net(segment, _hidden(self.case, [state.unsqueeze(1) for state in entering]))
            outputs.append(output.reshape(end - start, -1))
            finals.append([state.squeeze(1) for state in (final if isinstance(final, tuple) else (final,))])
        ends = [
            torch.where(reverse.to(first.device), first, last)
            for first, last in zip(finals[0], finals[-1], strict=True)
        ]
        return torch.cat([*outputs, padding]), ends


def _hidden(case, states):
    return tuple(states) if case.kind.startswith("lstm") else states[0]


def compare_apart(case, which, backend, device="cpu"):
    chosen = options(case, which)
    there = {name: value.to(device) for name, value in chosen.items()}
    with threads(2 if backend == "native" else 1):
        ours = outputs_and_gradients(module(case).to(device), *data(case, device=device), **there)
    own = torch.float32 if case.dtype == torch.float64 else case.dtype
    theirs = outputs_and_gradients(Apart(case, own, device), *data(case, own, device), **chosen)
    oracle = outputs_and_gradients(Apart(case, torch.float64), *data(case, torch.float64), **chosen)
    own = worst(theirs, oracle)  # torch sums a weight's gradient segment by segment here, we over the whole batch
    for name, value in ours.items():
        largest = oracle[name].abs().max().item()
        check(name, value, theirs[name], oracle[name], dtype=case.dtype, own=own * largest)


@pytest.mark.parametrize("which", OPTIONS)
@parametrize(mostly_slow(TABLE + [replace(case, dtype=torch.float64) for case in TABLE[5:15]]))
def test_against_segments_apart(case, which, backend):
    compare_apart(case, which, backend)


@pytest.mark.parametrize("which", OPTIONS)
@parametrize([replace(case, dtype=dtype) for case in TABLE[::7] for dtype in (torch.bfloat16, torch.float16)])
def test_against_segments_apart_16_bit(case, which, backend):
    compare_apart(case, which, backend)


@pytest.mark.parametrize("which", OPTIONS)
@parametrize(
    [
        Case("lstm", "batch_first", bidirectional=True, steps=65, batch=65, hidden=65),
        pytest.param(Case("gru", bidirectional=True, steps=65, batch=65, hidden=65), marks=pytest.mark.slow),
        Case("rnn_tanh", steps=129, batch=65, hidden=129),
    ]
)
def test_segments_apart_in_windows(case, which, native):
    """On one thread, rows enough for the gate gradients to be multiplied some steps at a time."""
    compare_apart(case, which, "one thread")


def check_derivatives(case, which, device="cpu"):
    """First and second, against finite differences."""
    net = module(case).to(device)
    input, hx = data(case, device=device)
    states, parameters, names = tensors(hx), list(net.parameters()), list(dict(net.named_parameters()))
    if case.kind == "rnn_relu":  # keep away from the kink
        input, *states = (tensor.detach().abs().requires_grad_() for tensor in (input, *states))
        for parameter in parameters:
            parameter.data.abs_()
    chosen = {name: value.to(device) for name, value in options(case, which).items()}

    def function(input, *rest):
        weights = dict(zip(names, rest[len(states) :], strict=True))
        arguments = (input, _hidden(case, rest[: len(states)]))
        return tuple(tensors(torch.func.functional_call(net, weights, arguments, chosen)))

    arguments = (input, *states, *parameters)
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


@pytest.mark.parametrize("which", OPTIONS)
@parametrize(
    mostly_slow(
        small(dtype=torch.float64, steps=4, inputs=2, hidden=2, num_layers=2, bidirectional=True)
        + small(dtype=torch.float64, steps=4, inputs=2, hidden=2, layout="batch_first")
    )
)
def test_gradcheck(case, which, backend):
    check_derivatives(case, which)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=["nan", "inf"])
@parametrize(small(num_layers=2, bidirectional=True, steps=5, batch=17) + small(layout="batch_first", batch=17))
def test_padding_reaches_nothing(case, poison, backend):
    chosen = options(case, "both")
    valid = torch.arange(case.steps).unsqueeze(1) < chosen["lengths"]
    valid = (valid.T if case.batch_first else valid).unsqueeze(-1)
    input, hx = data(case)
    clean = torch.where(valid, input, 0.0).detach().requires_grad_()
    poisoned = torch.where(valid, input, poison).detach().requires_grad_()
    expected = outputs_and_gradients(module(case), clean, hx, **chosen)
    found = outputs_and_gradients(module(case), poisoned, hx, **chosen)
    for name, value in found.items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, expected[name]), name
    assert not found["grad of input"].masked_select(~valid).any()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=["nan", "inf"])
@parametrize(small(num_layers=2, bidirectional=True))
def test_state_of_an_empty_row_reaches_only_itself(case, poison, backend):
    lengths = torch.tensor([0, 2, 3])
    input, hx = data(case)
    states = [state.detach().clone() for state in (hx if isinstance(hx, tuple) else (hx,))]
    expected = outputs_and_gradients(module(case), input, _hidden_leaf(case, states), lengths=lengths)
    for state in states:
        state[:, 0] = poison
    found = outputs_and_gradients(module(case), input, _hidden_leaf(case, states), lengths=lengths)
    for name, value in found.items():
        if name in ("output[1]", "output[2]"):
            assert torch.equal(value[:, 1:], expected[name][:, 1:]), name
            assert not torch.isfinite(value[:, 0]).any(), name  # h_n is h_0
        else:
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=["nan", "inf"])
@parametrize(small(num_layers=2))
def test_dropped_initial_state_reaches_nothing(case, poison, backend):
    reset = torch.zeros(case.steps, case.batch, dtype=torch.bool)
    reset[0] = True
    input, hx = data(case)
    states = [torch.full_like(state, poison) for state in (hx if isinstance(hx, tuple) else (hx,))]
    found = outputs_and_gradients(module(case), input, _hidden_leaf(case, states), reset=reset)
    zeros = [torch.zeros_like(state) for state in states]
    expected = outputs_and_gradients(module(case), input, _hidden_leaf(case, zeros), reset=reset)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
        assert not name.startswith("grad of h") or not value.any(), name


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=["nan", "inf"])
@parametrize(small(num_layers=2, bidirectional=True))
def test_dropped_rows_of_an_initial_state_reach_nothing(case, poison, backend):
    """Some rows drop what enters the forward direction; what enters the reverse one, and the other rows, is kept."""
    reset = torch.zeros(case.steps, case.batch, dtype=torch.bool)
    reset[0, 1:] = True
    input, hx = data(case)
    dropped = (torch.arange(2 * case.num_layers) % 2 == 0).unsqueeze(1) & reset[0]  # [L*D, N]
    runs = []
    for value in (poison, 0.0):
        states = [torch.where(dropped.unsqueeze(-1), value, state.detach()) for state in tensors(hx)]
        runs.append(outputs_and_gradients(module(case), input, _hidden_leaf(case, states), reset=reset))
    found, expected = runs
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
        if name.startswith("grad of h"):
            assert not value[dropped].any(), name
            assert value[~dropped].any(), name


@parametrize(small(num_layers=2, bidirectional=True, steps=5))
def test_reset_of_the_first_step(case, backend):
    """It discards the initial state of the forward direction; that of the reverse one enters at the last step."""
    reset = torch.zeros(case.steps, case.batch, dtype=torch.bool)
    reset[0] = True
    input, hx = data(case)
    found = outputs_and_gradients(module(case), input, hx, reset=reset)
    for index in range(len(tensors(hx))):
        gradient = found[f"grad of h{index}"]
        assert not gradient[0::2].any()
        for layer in (1, 3):
            assert gradient[layer].any()
        changed = [other.detach().clone() for other in tensors(hx)]
        changed[index][0::2] += 1
        again = outputs_and_gradients(module(case), input, _hidden_leaf(case, changed), reset=reset)
        for name, value in again.items():
            assert torch.equal(value, found[name]), name
        changed[index][1::2] += 1
        output = module(case)(input, _hidden_leaf(case, changed), reset=reset)[0]
        assert not torch.equal(output[-1], found["output[0]"][-1])


@parametrize(
    small(num_layers=2, bidirectional=True, steps=7, batch=17) + small(layout="batch_first", steps=7, batch=17)
)
def test_reset_beyond_a_length_is_ignored(case, backend):
    chosen = options(case, "both")
    valid = torch.arange(case.steps).unsqueeze(1) < chosen["lengths"]
    valid = valid.T if case.batch_first else valid
    expected = outputs_and_gradients(module(case), *data(case), **chosen | {"reset": chosen["reset"] & valid})
    for reset in (chosen["reset"], chosen["reset"] | ~valid):
        found = outputs_and_gradients(module(case), *data(case), **chosen | {"reset": reset})
        for name, value in found.items():
            assert torch.equal(value, expected[name]), name


@parametrize(small(num_layers=2, bidirectional=True, steps=5) + small(layout="batch_first", hx=False))
def test_length_zero(case, backend):
    """Nothing is visited: the initial states come out, and what leads back to them is the identity."""
    for lengths in (torch.zeros(case.batch, dtype=torch.int64), torch.tensor([0, case.steps, 0])):
        input, hx = data(case)
        found = outputs_and_gradients(module(case), input, hx, lengths=lengths)
        empty = lengths == 0
        output, gradient = (found[name].transpose(0, 1 - case.batch_first) for name in ("output[0]", "grad of input"))
        assert not output[empty].any()
        assert not gradient[empty].any()
        initial = tensors(hx) or [torch.zeros(())] * 2
        for index, final in enumerate(value for name, value in found.items() if name in ("output[1]", "output[2]")):
            assert torch.equal(final[:, empty], initial[index].expand_as(final)[:, empty])
        if hx is not None:
            finals = tensors(module(case)(input, hx, lengths)[1])
            gradients = torch.autograd.grad([final.sum() for final in finals], tensors(hx))
            assert all((gradient[:, empty] == 1).all() for gradient in gradients)
        if empty.all():
            assert not any(value.any() for name, value in found.items() if "weight" in name or "bias" in name)


@parametrize(small(num_layers=2, steps=5) + small(bidirectional=True, steps=5))
def test_reset_stops_what_came_before(case, backend):
    """NaN in the first segment reaches no output of the second, and the reverse direction carries none back."""
    reset = torch.zeros(case.steps, case.batch, dtype=torch.bool)
    reset[2] = True
    input, hx = data(case)
    expected = module(case)(input, hx, reset=reset)[0]
    for poisoned, clean in ((slice(0, 2), slice(2, None)), (slice(2, None), slice(0, 2))):
        dirty = input.detach().clone()
        dirty[poisoned] = torch.nan
        dirty.requires_grad_()
        found = module(case)(dirty, hx, reset=reset)[0]
        assert torch.equal(found[clean], expected[clean])
        (grad,) = torch.autograd.grad(found[clean].sum(), dirty)
        (wanted,) = torch.autograd.grad(expected[clean].sum(), input, retain_graph=True)
        assert torch.equal(grad[clean], wanted[clean])


def _hidden_leaf(case, states):
    return _hidden(case, [state.detach().clone().requires_grad_() for state in states])


@parametrize(small(num_layers=2, bidirectional=True))
def test_full_lengths_and_no_reset_change_nothing(case, backend):
    net = module(case)
    input, hx = data(case)
    expected = net(input, hx)
    full = torch.full((case.batch,), case.steps, dtype=torch.int32)
    torch.testing.assert_close(net(input, hx, full), expected, rtol=0, atol=0)
    never = torch.zeros(case.steps, case.batch, dtype=torch.bool)
    torch.testing.assert_close(net(input, hx, None, never), expected, rtol=0, atol=0)


@parametrize(small(num_layers=2, bidirectional=True, steps=5))
def test_unbatched(case, backend):
    net = module(case)
    input, hx = data(case)
    states = tuple(state[:, :1] for state in hx) if isinstance(hx, tuple) else hx[:, :1]
    reset = torch.tensor([False, True, False, True, False])
    expected = net(input[:, :1], states, torch.tensor([4]), reset.unsqueeze(1))
    alone = tuple(state[:, 0] for state in states) if isinstance(states, tuple) else states[:, 0]
    output, hidden = net(input[:, 0], alone, torch.tensor(4), reset)
    torch.testing.assert_close(output, expected[0][:, 0], rtol=0, atol=0)
    for found, wanted in zip(_all(hidden), _all(expected[1]), strict=True):
        torch.testing.assert_close(found, wanted[:, 0], rtol=0, atol=0)


def _all(hidden):
    return hidden if isinstance(hidden, tuple) else (hidden,)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_integer_lengths(dtype, backend):
    net, input = fastrnn.GRU(3, 3), torch.randn(4, 3, 3)
    expected = net(input, lengths=torch.tensor([0, 4, 2]))
    torch.testing.assert_close(net(input, lengths=torch.tensor([0, 4, 2], dtype=dtype)), expected, rtol=0, atol=0)


BAD = [
    ({"lengths": torch.tensor([1, 2])}, ValueError, r"lengths should have the shape \(N,\) = \(3,\), got: \(2,\)"),
    ({"lengths": torch.ones(3, 1, dtype=torch.int64)}, ValueError, "lengths should have the shape"),
    ({"lengths": torch.tensor([1.0, 2.0, 3.0])}, TypeError, "lengths should be a Tensor of integers, got: torch.float"),
    ({"lengths": torch.tensor([True, True, False])}, TypeError, "lengths should be a Tensor of integers, got: torch.b"),
    ({"lengths": [1, 2, 3]}, TypeError, "lengths should be a Tensor of integers, got: list"),
    ({"lengths": torch.tensor([1, 2, 5])}, RuntimeError, "lengths should be between 0 and 4, got 5 at index 2"),
    ({"lengths": torch.tensor([1, -1, 2])}, RuntimeError, "lengths should be between 0 and 4, got -1 at index 1"),
    ({"reset": torch.zeros(3, 4, dtype=torch.bool)}, ValueError, r"reset should have the shape \(T, N\) = \(4, 3\)"),
    ({"reset": torch.zeros(4, dtype=torch.bool)}, ValueError, "reset should have the shape"),
    ({"reset": torch.zeros(4, 3)}, TypeError, "reset should be a Tensor of bool, got: torch.float32"),
    ({"reset": torch.zeros(4, 3, dtype=torch.uint8)}, TypeError, "reset should be a Tensor of bool, got: torch.uint8"),
    ({"reset": True}, TypeError, "reset should be a Tensor of bool, got: bool"),
]


@pytest.mark.parametrize("arguments, error, message", BAD)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_bad_features(name, arguments, error, message, backend):
    with pytest.raises(error, match=message):
        getattr(fastrnn, name)(3, 3)(torch.randn(4, 3, 3), **arguments)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_features_on_another_device(name, backend):
    """The meta device, which every machine has: numbers that are not there, and an input that has none either."""
    net, input = getattr(fastrnn, name)(3, 3), torch.randn(4, 3, 3)
    lengths = torch.ones(3, dtype=torch.int64, device="meta")
    reset = torch.zeros(4, 3, dtype=torch.bool, device="meta")
    with pytest.raises(ValueError, match=r"lengths should be on the device of input \(cpu\)"):
        net(input, lengths=lengths)
    with pytest.raises(ValueError, match=r"reset should be on the device of input \(cpu\)"):
        net(input, reset=reset)
    net, input = net.to("meta"), input.to("meta")
    assert net(input, None, lengths, reset)[0].shape == (4, 3, 3)
    for lengths in (torch.tensor([4, 0, 2]), torch.tensor([4, 0, 2], dtype=torch.uint8)):
        assert net(input, lengths=lengths, reset=torch.zeros(4, 3, dtype=torch.bool))[0].is_meta
    with pytest.raises(RuntimeError, match="lengths should be between 0 and 4, got 5 at index 2"):
        net(input, lengths=torch.tensor([4, 0, 5]))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_bad_features_of_other_layouts(name, backend):
    net = getattr(fastrnn, name)(3, 3, batch_first=True)
    with pytest.raises(ValueError, match=r"reset should have the shape \(N, T\) = \(3, 4\), got: \(4, 3\)"):
        net(torch.randn(3, 4, 3), reset=torch.zeros(4, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"lengths should have the shape \(\) for unbatched input, got: \(1,\)"):
        net(torch.randn(4, 3), lengths=torch.tensor([3]))
    with pytest.raises(TypeError, match="lengths should be a Tensor of integers, got: int"):
        net(torch.randn(4, 3), lengths=3)
    with pytest.raises(ValueError, match=r"reset should have the shape \(T,\) = \(4,\) for unbatched"):
        net(torch.randn(4, 3), reset=torch.zeros(3, dtype=torch.bool))
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    with pytest.raises(ValueError, match="lengths should not be given with a PackedSequence"):
        net(packed, lengths=torch.tensor([4, 2]))
    with pytest.raises(ValueError, match=r"reset should not be given with a PackedSequence.*lengths"):
        net(packed, reset=torch.zeros(4, 2, dtype=torch.bool))


@parametrize(small(num_layers=2, steps=5) + small(bidirectional=True, steps=5))
def test_states_of_every_step(case, backend):
    """At step t: what a run over the steps up to t ends with; for the reverse direction, the steps from t."""
    net = module(case)
    input, hx = data(case)
    found = net.forward_states(input, hx)
    torch.testing.assert_close(tuple(found[:2]), net(input, hx), rtol=0, atol=0)
    reverse = torch.arange(case.num_layers * case.directions).reshape(-1, 1, 1) % case.directions == 1
    for t in range(case.steps):
        ends = [net(part, hx)[1] for part in (input[: t + 1], input[t:])]
        for states, before, after in zip(found[2:], *map(_all, ends), strict=True):
            torch.testing.assert_close(states[:, t], torch.where(reverse, after, before))
    expected = sum((_all(net(input[: t + 1], hx)[1])[-1] if case.directions == 1 else 0) for t in range(case.steps))
    if case.directions == 1:  # the gradient of the last state (c for the LSTM) at every step
        wanted = torch.autograd.grad(expected.square().sum(), [input, *net.parameters()], allow_unused=True)
        got = torch.autograd.grad(found[-1].sum(1).square().sum(), [input, *net.parameters()], allow_unused=True)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@parametrize([replace(case, layout=name) for case in small(steps=5) for name in ("batch_first", "unbatched", "sorted")])
def test_states_follow_the_layout(case, backend):
    net = module(case)
    input, hx = data(case)
    found = net.forward_states(input, hx)
    output = found.output.data if case.layout == "sorted" else found.output
    torch.testing.assert_close(found.h[-1], output, rtol=0, atol=0)
    assert found._fields == (("output", "state", "h", "c") if case.kind.startswith("lstm") else ("output", "h_n", "h"))
    for states in found[2:]:
        assert states.shape[:-1] == (1, *output.shape[:-1])


@parametrize(small(num_layers=2, bidirectional=True, steps=5))
def test_states_are_zero_beyond_a_length(case, backend):
    input, hx = data(case)
    found = module(case).forward_states(input, hx, lengths=torch.tensor([5, 0, 2]))
    for states in found[2:]:
        assert not states[:, :, 1].any()
        assert not states[:, 2:, 2].any()
        assert states[:, :2, 2].any()
