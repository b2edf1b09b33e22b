"""forward_states against torch.nn stepped by hand: the states of every layer, direction and step, and gradients."""

import functools
from dataclasses import replace

import pytest
import torch
from cases import data, module, outputs_and_gradients, parametrize, small, tensors, threads
from tolerance import check, worst

SIZES = [{"steps": 7, "batch": 3, "inputs": 3, "hidden": 17}, {"steps": 3, "batch": 17, "inputs": 17, "hidden": 3}]
FLAGS = [
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 3, "bias": False},
    {"bidirectional": True, "layout": "batch_first", "hx": False},
]
CASES = [case for flags in FLAGS for size in SIZES for case in small(**flags, **size)]
OPTIONS = ("plain", "lengths", "reset", "both")


class Ours:
    """forward_states in the place of forward."""

    def __init__(self, case):
        self.net = module(case)
        self.named_parameters = self.net.named_parameters

    def __call__(self, *args, **kwargs):
        return self.net.forward_states(*args, **kwargs)


class Stepped:
    """torch.nn, one layer, direction and step at a time; in between the states are selected as the features say."""

    def __init__(self, case, dtype):
        self.case, self.net = case, module(case, torch.nn, dtype)
        self.named_parameters = self.net.named_parameters
        self.op = getattr(torch._VF, case.kind.removesuffix("_proj"))

    def __call__(self, input, hx, lengths=None, reset=None):
        case = self.case
        if case.batch_first:
            input, reset = input.transpose(0, 1), None if reset is None else reset.transpose(0, 1)
        lengths = torch.full((case.batch,), case.steps) if lengths is None else lengths
        reset = torch.zeros(case.steps, case.batch, dtype=torch.bool) if reset is None else reset
        sizes = [case.proj or case.hidden, case.hidden][: 2 if case.kind.startswith("lstm") else 1]
        initial = tensors(hx) or [input.new_zeros(len(self.net.all_weights), case.batch, size) for size in sizes]
        finals, steps = [], []
        for layer in range(case.num_layers):
            for direction in range(case.directions):
                row = layer * case.directions + direction
                weights, entering = self.net.all_weights[row], [state[row] for state in initial]
                final, visited = self.scan(input, entering, weights, direction == 1, lengths, reset)
                finals.append(final)
                steps.append(visited)
            input = torch.cat([visited[0] for visited in steps[-case.directions :]], -1)
        states = [torch.stack(state) for state in zip(*steps, strict=True)]  # [L*D, T, N, H]
        if case.batch_first:
            input, states = input.transpose(0, 1), [state.transpose(1, 2) for state in states]
        return [input, *(torch.stack(final) for final in zip(*finals, strict=True)), *states]

    def scan(self, input, initial, weights, reverse, lengths, reset):
        """The final states, and those of every step."""
        steps, states, visited = len(input), initial, {}
        for t in reversed(range(steps)) if reverse else range(steps):
            boundary = t + 1 if reverse else t  # the step whose reset stops what enters t
            dropped = reset[boundary] & (boundary < lengths) if boundary < steps else torch.zeros_like(lengths).bool()
            entering = [torch.where(dropped.unsqueeze(-1), 0.0, state) for state in states]
            left = self.step(input[t], entering, weights)
            valid = (t < lengths).unsqueeze(-1)
            states = [torch.where(valid, new, old) for new, old in zip(left, states, strict=True)]
            visited[t] = [torch.where(valid, new, 0.0) for new in left]
        return states, [torch.stack(state) for state in zip(*(visited[t] for t in range(steps)), strict=True)]

    def step(self, x, states, weights):
        hx = [state.unsqueeze(0) for state in states]
        hx = hx if self.case.kind.startswith("lstm") else hx[0]
        _, *left = self.op(x.unsqueeze(0), hx, weights, self.case.bias, 1, 0.0, False, False, False)
        return [state.squeeze(0) for state in left]


def options(case, which):
    generator = torch.Generator().manual_seed(case.steps + case.batch)
    lengths = torch.randint(0, case.steps + 1, (case.batch,), generator=generator)
    lengths[0], lengths[-1] = case.steps, 0
    shape = (case.batch, case.steps) if case.batch_first else (case.steps, case.batch)
    reset = torch.rand(shape, generator=generator) < 0.3
    return {
        "plain": {},
        "lengths": {"lengths": lengths},
        "reset": {"reset": reset},
        "both": {"lengths": lengths, "reset": reset},
    }[which]


@functools.cache
def stepped(case, dtype, which):
    return outputs_and_gradients(Stepped(case, dtype), *data(case, dtype), **options(case, which))


@functools.cache
def relative_error(case):
    """Of torch.nn stepped by hand, in its worst tensor: a sum over steps and rows that cancels may round luckily."""
    dtype = torch.float32 if case.dtype == torch.float64 else case.dtype
    return max(worst(stepped(case, dtype, which), stepped(case, torch.float64, which)) for which in OPTIONS)


@pytest.mark.parametrize("which", OPTIONS)
@parametrize(CASES + [replace(case, dtype=d) for case in CASES[::7] for d in (torch.float64, torch.bfloat16)])
def test_every_state_and_its_gradient(case, which, backend):
    """A random projection of all results is differentiated, so the state of each layer, direction and step counts."""
    with threads(2 if backend == "native" else 1):
        ours = outputs_and_gradients(Ours(case), *data(case), **options(case, which))
    oracle = stepped(case, torch.float64, which)
    assert ours.keys() == oracle.keys()
    for name, value in ours.items():
        own = relative_error(case) * oracle[name].abs().max().item()
        check(name, value, None, oracle[name], dtype=case.dtype, own=own)


@parametrize(small(num_layers=2, bidirectional=True, steps=5))
def test_one_state_at_a_time(case, backend):
    """A state by itself has a gradient too, where nothing arrives at the other results."""
    input, hx = data(case)
    net, other = module(case), Stepped(case, torch.float32)
    found, expected = net.forward_states(input, hx), other(input, hx)
    for which in range(1, 1 + len(tensors(hx))):
        for row in range(2 * case.num_layers):
            ours, theirs = (
                torch.autograd.grad(
                    result[row].sum(), [input, *source.parameters()], retain_graph=True, allow_unused=True
                )
                for result, source in ((tensors(found)[-which], net), (expected[-which], other.net))
            )
            for grad, wanted in zip(ours, theirs, strict=True):
                wanted = torch.zeros_like(grad) if wanted is None and grad is not None else wanted
                torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)
