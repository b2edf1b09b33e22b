"""The reference's own derivatives, which the native backend reaches for second derivatives and tangents."""

from dataclasses import replace

import pytest
import torch
from cases import Case, data, module, parametrize, small, tensors

from fastrnn import reference

CASES = small(dtype=torch.float64, steps=3, batch=4, inputs=2, hidden=2, bidirectional=True)
NAMES = {"lstm_proj": "lstm"}


def problem(case, features):
    """Arguments of the reference for a case, and cotangents of its outputs."""
    input, hx = data(case)
    weights = [weight for layer in module(case).all_weights for weight in layer]
    lengths = torch.tensor([3, 0, 2, 1]) if features else None
    reset = torch.zeros(3, 4, dtype=torch.bool) if features else None
    if features:
        reset[1, 0] = reset[0, 2] = True
    rest = (lengths, reset, None, case.bidirectional, case.batch_first)
    cell = NAMES.get(case.kind, case.kind)
    outputs = reference.layer(cell, input, tensors(hx), weights, *rest, True)
    return cell, input, tensors(hx), weights, rest, outputs, [torch.randn_like(output) for output in outputs]


@pytest.mark.parametrize("features", [False, True], ids=["plain", "lengths and reset"])
@parametrize(CASES)
def test_backward_is_the_gradient(case, features):
    cell, input, hx, weights, rest, outputs, cotangents = problem(case, features)
    cotangents[1] = None
    primals = [input, *hx, *weights]
    pairs = [
        (output, cotangent) for output, cotangent in zip(outputs, cotangents, strict=True) if cotangent is not None
    ]
    ys, vs = zip(*pairs, strict=True)
    expected = torch.autograd.grad(ys, primals, vs)
    with torch.no_grad():
        found = reference.layer_backward(cell, cotangents, input, hx, weights, *rest, [True] * len(primals), 0)
    torch.testing.assert_close(found, list(expected))
    assert not any(grad.requires_grad for grad in found)


@parametrize(CASES)
def test_mask(case):
    cell, input, hx, weights, rest, _, cotangents = problem(case, False)
    mask = [index % 2 == 0 for index in range(1 + len(hx) + len(weights))]
    found = reference.layer_backward(cell, cotangents, input, hx, weights, *rest, mask, 0)
    full = reference.layer_backward(cell, cotangents, input, hx, weights, *rest, [True] * len(mask), 0)
    for kept, grad, whole in zip(mask, found, full, strict=True):
        torch.testing.assert_close(grad, whole if kept else torch.empty(0, dtype=torch.float64))


@parametrize(CASES + [replace(case, layout="batch_first") for case in CASES])
def test_groups_are_the_gradients_of_the_blocks(case):
    cell, input, hx, weights, rest, _, cotangents = problem(case, False)
    mask = [True] * (1 + len(hx) + len(weights))
    found = reference.layer_backward(cell, cotangents, input, hx, weights, *rest, mask, 2)
    batch_dim = 0 if case.batch_first else 1

    def block(tensors, index, first):
        return [tensor.chunk(2, batch_dim if i in first else 1)[index] for i, tensor in enumerate(tensors)]

    sequences = {0, len(cotangents) - 1} if cell == "lstm" else {0}
    for index in range(2):
        part = reference.layer_backward(
            cell,
            block(cotangents, index, sequences),
            input.chunk(2, batch_dim)[index],
            block(hx, index, ()),
            weights,
            *rest,
            mask,
            0,
        )
        for got, wanted in zip(found[1 + len(hx) :], part[1 + len(hx) :], strict=True):
            torch.testing.assert_close(got[index], wanted)
        torch.testing.assert_close(found[0].chunk(2, batch_dim)[index], part[0])


@pytest.mark.parametrize("groups", [0, 2])
@parametrize([case for case in CASES if case.kind != "rnn_relu"])
def test_double_backward_is_the_gradient_of_backward(case, groups):
    cell, input, hx, weights, rest, _, cotangents = problem(case, groups == 0)
    cotangents = [cotangent.requires_grad_() for cotangent in cotangents]
    primals = [input, *hx, *weights]
    mask = [True] * len(primals)
    mask[1] = False
    grads = reference.layer_backward(cell, cotangents, input, hx, weights, *rest, mask, groups)
    incoming = [torch.randn_like(grad) for grad in grads]
    incoming[2] = None
    pairs = [(g, v) for g, v, kept in zip(grads, incoming, mask, strict=True) if kept and v is not None]
    sources = [*cotangents, *primals]
    ys, vs = zip(*pairs, strict=True)
    expected = torch.autograd.grad(ys, sources, vs, materialize_grads=True)
    need = [True] * len(sources)
    need[-1] = False
    with torch.no_grad():
        found = reference.layer_double_backward(
            cell, incoming, cotangents, input, hx, weights, *rest, mask, groups, need
        )
    torch.testing.assert_close(found[:-1], list(expected[:-1]))
    assert found[-1].shape == (0,)


def test_nothing_incoming_gives_zeros():
    case = Case("gru", dtype=torch.float64)
    cell, input, hx, weights, rest, outputs, _ = problem(replace(case, batch=4), False)
    count = 1 + len(hx) + len(weights)
    found = reference.layer_backward(cell, [None] * 2, input, hx, weights, *rest, [True] * count, 0)
    assert not any(grad.any() for grad in found)
    need = [False, False] + [True] * count
    found = reference.layer_double_backward(
        cell, [None] * count, outputs[:2], input, hx, weights, *rest, [True] * count, 0, need
    )
    assert [grad.shape for grad in found[2:]] == [tensor.shape for tensor in (input, *hx, *weights)]
    assert not any(grad.any() for grad in found)


@parametrize([case for case in CASES if case.kind != "rnn_relu"])
def test_forward_mode_and_torch_func(case):
    cell, input, hx, weights, rest, _, cotangents = problem(case, True)

    def loss(input, weight):
        outputs = reference.layer(cell, input, hx, [weight, *weights[1:]], *rest, False)
        return sum((output * cotangent).sum() for output, cotangent in zip(outputs, cotangents, strict=False))

    arguments = (input.detach(), weights[0].detach())
    tangents = tuple(torch.randn_like(argument) for argument in arguments)
    _, along = torch.func.jvp(loss, arguments, tangents)
    gradients = torch.func.grad(loss, argnums=(0, 1))(*arguments)
    expected = sum((gradient * tangent).sum() for gradient, tangent in zip(gradients, tangents, strict=True))
    torch.testing.assert_close(along, expected)

    def through_backward(input):
        grads = reference.layer_backward(
            cell, cotangents, input, hx, weights, *rest, [True] * (1 + len(hx) + len(weights)), 0
        )
        return sum(grad.square().sum() for grad in grads)

    wanted = torch.autograd.grad(through_backward(input), input)[0]
    torch.testing.assert_close(torch.func.grad(through_backward)(input.detach()), wanted)
    many = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(torch.stack([arguments[0]] * 3), arguments[1])
    torch.testing.assert_close(many, torch.stack([gradients[0]] * 3))
