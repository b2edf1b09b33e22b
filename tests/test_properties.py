"""Generated cases: no shape, layout or feature may crash, or differ between the backends or from torch.nn."""

import torch
from cases import KINDS, Case, data, module, outputs_and_gradients
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SIZE = st.sampled_from([1, 2, 3, 8, 15, 16, 17, 33])
SETTINGS = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def cases(layouts):
    return st.builds(
        Case,
        kind=st.sampled_from(list(KINDS)),
        layout=st.sampled_from(layouts),
        num_layers=st.integers(1, 3),
        bidirectional=st.booleans(),
        bias=st.booleans(),
        hx=st.booleans(),
        dtype=st.just(torch.float64),
        steps=st.integers(1, 9),
        batch=SIZE,
        inputs=SIZE,
        hidden=SIZE.filter(lambda size: size > 1),
    )


def agree(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@SETTINGS
@given(cases(["time_major", "batch_first", "sorted", "unsorted", "unbatched"]))
def test_any_case_agrees_with_torch(backend, case):
    agree(outputs_and_gradients(module(case), *data(case)), outputs_and_gradients(module(case, torch.nn), *data(case)))


@SETTINGS
@given(cases(["time_major", "batch_first"]), st.data(), st.booleans(), st.booleans())
def test_any_lengths_and_resets_agree_with_the_reference(native, case, draw, ragged, restarted):
    import fastrnn

    chosen = {}
    if ragged:
        values = draw.draw(st.lists(st.integers(0, case.steps), min_size=case.batch, max_size=case.batch))
        chosen["lengths"] = torch.tensor(values)
    if restarted:
        count = case.batch * case.steps
        flags = torch.tensor(draw.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
        chosen["reset"] = flags.reshape((case.batch, case.steps) if case.batch_first else (case.steps, case.batch))
    found = outputs_and_gradients(module(case), *data(case), **chosen)
    with fastrnn.backend("python"):
        expected = outputs_and_gradients(module(case), *data(case), **chosen)
    agree(found, expected)
