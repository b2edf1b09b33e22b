"""The persistent scans, on a GPU where there is one and on an emulated one anywhere: what they do that a step at a time
does not. The rest of the CUDA half's tests are in test_cuda.py; races and planted faults in test_cuda_race.py.
"""

from dataclasses import replace

import emulation
import pytest
import test_features
import torch
from cases import Case, data, module, outputs_and_gradients, parametrize, row_lengths, small, table, tensors
from test_cuda import need_cuda
from test_modules import compare

import fastrnn

DTYPES = (torch.bfloat16, torch.float16)
KINDS = ("rnn_tanh", "rnn_relu", "lstm", "gru")


class Place:
    """Where a test runs, and what it has seen of the launches."""

    def __init__(self, device, calls):
        self.device, self.calls = device, calls
        self.before = emulation.library().launches() if calls is not None else 0

    def launches_per_call(self):
        """Packing and scan, whatever the number of steps."""
        return (emulation.library().launches() - self.before) / len(self.calls)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.cuda)])
def place(request, monkeypatch):
    monkeypatch.setenv("FASTRNN_CUDA_PLAN", "persistent")
    if request.param == "cuda":
        need_cuda()
        with torch.backends.cudnn.flags(allow_tf32=False), fastrnn.backend("native"):
            yield Place("cuda", None)
        return
    if emulation.missing():
        pytest.skip(emulation.missing())
    with emulation.emulated_ops() as calls, fastrnn.backend("native"):
        here = Place("cpu", calls)
        yield here
        assert calls
        assert here.launches_per_call() == 2


def cases(**changes):
    return [replace(case, **changes) for case in small() if case.kind in KINDS]


def both_types(**changes):
    return [case for dtype in DTYPES for case in cases(dtype=dtype, **changes)]


def swapped(**changes):
    """Every cell, the two dtypes in turn."""
    return [replace(case, dtype=DTYPES[index % 2]) for index, case in enumerate(cases(**changes))]


@parametrize(table(DTYPES, KINDS, ("time_major", "batch_first"))[::5])
def test_against_torch(case, place):
    compare(case, "one thread", place.device)


# more rows of the batch than a cluster takes, units of more than one block, numbers of both that fill no tile
@parametrize(both_types(steps=4, batch=19, inputs=3, hidden=150, bidirectional=True))
def test_clusters(case, place):
    compare(case, "one thread", place.device)


@pytest.mark.parametrize("which", test_features.OPTIONS)
@parametrize(
    swapped(steps=5, batch=11, inputs=3, hidden=20, num_layers=2, bidirectional=True)
    + swapped(steps=7, batch=3, inputs=17, hidden=140, layout="batch_first", hx=False)
)
def test_lengths_and_resets(case, which, place):
    test_features.compare_apart(case, which, "one thread", place.device)


def alternatives(case, training, backward, device="h200"):
    """How many plans there are for a case."""
    cell = case.kind
    return len(
        fastrnn._C.cuda_plans(
            cell,
            steps=case.steps,
            batch=case.batch,
            hidden_size=case.hidden,
            directions=case.directions,
            training=training,
            backward=backward,
            device=device,
        )
    )


# 5 clusters, 1 to 16, two widths of tile or batch, two exchanges
@pytest.mark.parametrize("index", range(0, 24))
@parametrize([Case("lstm", steps=4, batch=9, hidden=130), Case("gru", steps=3, batch=17, hidden=136)])
def test_every_plan(case, index, place, monkeypatch):
    """The K-th of the alternatives, in every call; where there are fewer, that is a step at a time."""
    case = replace(case, dtype=DTYPES[index % 2])
    counts = [alternatives(case, True, backward) for backward in (False, True)]
    if index >= min(counts):
        place.calls is not None and place.calls.clear()
        pytest.skip(f"there are {counts} plans")
    monkeypatch.setenv("FASTRNN_CUDA_PLAN", f"persistent:{index}")
    compare(case, "one thread", place.device)
