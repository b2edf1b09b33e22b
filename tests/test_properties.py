"""Generated cases: no shape, dtype, layout or feature may crash, or differ between the backends or from torch.nn."""

from dataclasses import replace

import torch
from cases import KINDS, LAYOUTS, Case, data, module, outputs_and_gradients, tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import check, error, worst
from torch.nn.utils.rnn import PackedSequence

import fastrnn

SIZE = st.sampled_from([1, 2, 3, 8, 15, 16, 17, 33])
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SETTINGS = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def cases(layouts, dtypes=DTYPES):
    return st.builds(
        Case,
        kind=st.sampled_from(list(KINDS)),
        layout=st.sampled_from(layouts),
        num_layers=st.integers(1, 3),
        bidirectional=st.booleans(),
        bias=st.booleans(),
        hx=st.booleans(),
        dtype=st.sampled_from(dtypes),
        steps=st.integers(1, 9),
        batch=SIZE,
        inputs=SIZE,
        hidden=SIZE.filter(lambda size: size > 1),
    )


@st.composite
def features(draw, case):
    """Lengths and resets of any integer dtype, in any memory layout, of unbatched input too; or neither."""
    chosen = {}
    batch = 1 if case.layout == "unbatched" else case.batch
    if draw(st.booleans()):
        values = torch.tensor(draw(st.lists(st.integers(0, case.steps), min_size=batch, max_size=batch)))
        values = strided(values.to(draw(st.sampled_from([torch.int64, torch.int32, torch.uint8]))), draw(STRIDES))
        chosen["lengths"] = values[0] if case.layout == "unbatched" else values
    if draw(st.booleans()):
        density, generator = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])), torch.Generator()
        generator.manual_seed(draw(st.integers(0, 1000)))
        flags = torch.rand((batch, case.steps) if case.batch_first else (case.steps, batch), generator=generator)
        flags = strided(flags < density, draw(STRIDES))
        chosen["reset"] = flags[:, 0] if case.layout == "unbatched" else flags
    return chosen


STRIDES = st.sampled_from(["contiguous", "transposed", "every other", "expanded"])


def strided(tensor, how):
    """The same numbers in another memory layout; what lies between them is not a number, or the largest one."""
    with torch.no_grad():
        if how == "transposed" and tensor.dim() > 1:
            return tensor.transpose(0, 1).contiguous().transpose(0, 1)
        if how == "every other":
            between = torch.nan if tensor.is_floating_point() else 1 if tensor.dtype == torch.bool else 100
            wide = torch.full((*tensor.shape, 2), between, dtype=tensor.dtype)
            wide[..., 0] = tensor
            return wide[..., 0]
        return tensor.expand_as(tensor) if how == "expanded" else tensor


def rearranged(case, input, hx, how):
    """The data of a case in another memory layout, as leaves that require grad."""
    new = [
        strided(tensor.detach(), way).requires_grad_() for tensor, way in zip(tensors([input, hx]), how, strict=False)
    ]
    first = input._replace(data=new[0]) if isinstance(input, PackedSequence) else new[0]
    return first, None if hx is None else tuple(new[1:]) if isinstance(hx, tuple) else new[1]


def agree(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def by_rule(case, found, run):
    """``run(case, dtype)`` is what to expect, by the rule of tolerance.py.

    A generated tensor may have one element, and torch's error there be zero by luck: its own error is the largest in
    the tensors of that name, and that of the worst tensor, of this case and of two with a wider input.
    """
    oracle = run(case, torch.float64)
    if case.dtype == torch.float64:
        agree(found, oracle)
        return
    assert found.keys() == oracle.keys()
    alike = [replace(case, inputs=case.inputs + more) for more in range(3)]
    pairs = [(run(other, case.dtype), run(other, torch.float64)) for other in alike]
    relative = max(worst(*pair) for pair in pairs)
    for name, value in found.items():
        own = max(error(theirs[name], exact[name]) for theirs, exact in pairs) if value.numel() else 0.0
        own = max(own, relative * oracle[name].abs().max().item())
        check(name, value, None, oracle[name], dtype=case.dtype, own=own)


@SETTINGS
@given(cases(LAYOUTS), st.tuples(STRIDES, STRIDES, STRIDES))
def test_any_case_agrees_with_torch(backend, case, how):
    found = outputs_and_gradients(module(case), *rearranged(case, *data(case), how))
    by_rule(case, found, lambda case, dtype: outputs_and_gradients(module(case, torch.nn, dtype), *data(case, dtype)))


@SETTINGS
@given(cases(["time_major", "batch_first", "unbatched"]), st.data(), st.tuples(STRIDES, STRIDES, STRIDES))
def test_any_lengths_and_resets_agree_with_the_reference(native, case, draw, how):
    chosen = draw.draw(features(case))
    found = outputs_and_gradients(module(case), *rearranged(case, *data(case), how), **chosen)

    def reference(case, dtype):
        with fastrnn.backend("python"):
            return outputs_and_gradients(module(case, dtype=dtype), *data(case, dtype), **chosen)

    by_rule(case, found, reference)


@SETTINGS
@given(cases(LAYOUTS, dtypes=(torch.float64,)), st.data())
def test_any_states_agree_with_the_reference(native, case, draw):
    chosen = {} if case.layout in ("sorted", "unsorted") else draw.draw(features(case))
    input, hx = data(case)
    net = module(case)

    def run():
        results = tensors(net.forward_states(input, hx, **chosen))
        sources = [tensors(input)[0], *net.parameters()]
        gradients = torch.autograd.grad(results[-1].square().sum(), sources, materialize_grads=True)
        return {str(index): result for index, result in enumerate([*results, *gradients])}

    found = run()
    with fastrnn.backend("python"):
        agree(found, run())
