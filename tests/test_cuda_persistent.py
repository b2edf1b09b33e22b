"""The persistent scans, on a GPU where there is one and on an emulated one anywhere: what they do that a step at a time
does not. The rest of the CUDA half's tests are in test_cuda.py; races and planted faults in test_cuda_race.py.
"""

from dataclasses import replace
from pathlib import Path

import emulation
import pytest
import test_features
import torch
from cases import Case, data, module, outputs_and_gradients, parametrize, small, table, tensors
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
        self.launches = 2

    def launches_per_call(self):
        """The scan, whatever the number of steps; for one block or clusters the packing of the weights before it; of
        a packed batch its layout too."""
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
        assert here.launches - 1 <= here.launches_per_call() <= here.launches


def cases(**changes):
    return [replace(case, **changes) for case in small() if case.kind in KINDS]


def swapped(**changes):
    """Every cell, the two dtypes in turn."""
    return [replace(case, dtype=DTYPES[index % 2]) for index, case in enumerate(cases(**changes))]


@parametrize(table(DTYPES, KINDS, ("time_major", "batch_first"))[::11])
def test_against_torch(case, place):
    compare(case, "one thread", place.device)


# Each step has rows of its own, one after another. The second direction begins at each row's end, and a slice of the
# batch ends before the others.
@parametrize(
    table(DTYPES, KINDS, ("sorted", "unsorted"))[::11]
    + swapped(layout="sorted", steps=5, batch=11, inputs=3, hidden=20, num_layers=2, bidirectional=True)
    + swapped(layout="unsorted", steps=17, batch=19, inputs=3, hidden=130, bidirectional=True, hx=False)
)
def test_packed(case, place):
    place.launches = 3
    compare(case, "one thread", place.device)


@parametrize([Case("lstm", layout="sorted", steps=600, batch=3, hidden=5, dtype=torch.bfloat16, bidirectional=True)])
def test_packed_with_many_steps(case, place):
    """More numbers than the arguments of one kernel hold."""
    place.launches = 4
    compare(case, "one thread", place.device)


# more rows of the batch than a cluster takes, units of more than one block, numbers of both that fill no tile
@parametrize(swapped(steps=4, batch=11, inputs=3, hidden=150, bidirectional=True))
def test_clusters(case, place):
    compare(case, "one thread", place.device)


@pytest.mark.parametrize("which", test_features.OPTIONS)
@parametrize(
    swapped(steps=5, batch=11, inputs=3, hidden=20, num_layers=2, bidirectional=True)
    + swapped(steps=7, batch=3, inputs=17, hidden=140, layout="batch_first", hx=False)
)
def test_lengths_and_resets(case, which, place):
    test_features.compare_apart(case, which, "one thread", place.device)


def plans(case, backward, device):
    shape = (case.kind, case.steps, case.batch, case.hidden, case.directions, case.dtype.itemsize)
    return fastrnn._C.cuda_plans(*shape, training=True, backward=backward, device=device)[:-1]


@pytest.fixture
def take(place, monkeypatch):
    """Makes a call take the one plan forward and the other backward: they are rows of a table of tuned plans."""
    emulated = place.device == "cpu"
    device = "h200" if emulated else "cuda"
    library = emulation.library() if emulated else fastrnn._C

    def choose(case, forward, backward):
        known, numbers = fastrnn._C.cuda_device(device), f"{case.batch},{case.hidden},{case.directions}"
        rows = [fastrnn._C.TUNED_HEADER]
        for scan, plan in (("training", forward), ("backward", backward)):
            choice = ",".join(str(plan[name]) for name in ("tier", "exchange", "cluster", "rows", "row_tiles"))
            key = f"{known['capability']},{known['multiprocessors']},{case.kind},{case.dtype.itemsize},{scan}"
            rows.append(f"{key},{numbers},{choice}")
        library.set_tuned_plans("\n".join(rows))
        monkeypatch.setenv("FASTRNN_CUDA_PLAN", "auto")

    choose.device = device
    yield choose
    library.set_tuned_plans("")


# Clusters of 1 to 16 blocks, some without units, every tile, and the whole GPU: the K-th plan forward, and the K-th
# backward.
PLANS = 12


@pytest.mark.parametrize("index", [pytest.param(k, marks=[pytest.mark.slow] if k % 4 else []) for k in range(PLANS)])
@parametrize([Case("lstm", steps=4, batch=9, hidden=130), Case("gru", steps=3, batch=17, hidden=136)])
def test_every_plan(case, index, place, take):
    case = replace(case, dtype=DTYPES[index % 2])
    listed = [plans(case, backward, take.device) for backward in (False, True)]
    assert max(map(len, listed)) <= PLANS
    take(case, *(some[index % len(some)] for some in listed))
    compare(case, "one thread", place.device)


@pytest.mark.slow
def test_every_backward_plan_of_an_rnn(place, take):
    """It has tiles that other cells have not."""
    case = Case("rnn_tanh", steps=3, batch=17, hidden=136, dtype=torch.float16)
    forward, *_ = plans(case, False, take.device)
    listed = plans(case, True, take.device)
    assert (8, 8) in {(plan["rows"], plan["row_tiles"]) for plan in listed}
    for plan in listed:
        take(case, forward, plan)
        compare(case, "one thread", place.device)


# The whole GPU: teams with one slice of the batch and with several, places of a ring that are used again, both
# directions, rows that end at different steps.
@parametrize(
    [
        replace(case, dtype=dtype)
        for dtype in (torch.bfloat16, torch.float32)
        for case in (
            Case("lstm", steps=150, batch=3, hidden=20),
            Case("gru", steps=5, batch=19, hidden=40, bidirectional=True),
            Case("rnn_tanh", steps=3, batch=17, hidden=33),
            Case("rnn_relu", steps=3, batch=1, hidden=129, hx=False, bias=False),
            Case("gru", steps=5, batch=11, hidden=20, layout="unsorted", bidirectional=True),
            Case("lstm", steps=3, batch=270, hidden=64, layout="batch_first"),
        )
    ]
)
def test_whole_gpu(case, place, take):
    place.launches = 1 if case.layout in ("time_major", "batch_first") else 2
    listed = [[plan for plan in plans(case, way, take.device) if plan["tier"] == "grid"] for way in (False, True)]
    assert all(listed)
    for index in range(max(map(len, listed))):
        take(case, *(some[index % len(some)] for some in listed))
        compare(case, "one thread", place.device)


@pytest.mark.parametrize("which", test_features.OPTIONS)
@parametrize([Case("lstm", steps=7, batch=11, hidden=20, bidirectional=True), Case("gru", steps=7, batch=3, hidden=40)])
def test_whole_gpu_lengths_and_resets(case, which, place):
    """float32 has no other tier."""
    test_features.compare_apart(case, which, "one thread", place.device)


# Tiles and clusters as they are meant to be used; steps enough for both buffers and both phases of their barriers.
@pytest.mark.slow
@parametrize(
    [
        Case("lstm", steps=5, batch=8, inputs=3, hidden=256, dtype=torch.bfloat16, bidirectional=True),
        Case("lstm", steps=3, batch=17, inputs=3, hidden=512, dtype=torch.float16),
        Case("gru", steps=3, batch=8, inputs=3, hidden=500, dtype=torch.bfloat16),
        Case("rnn_tanh", steps=5, batch=33, inputs=3, hidden=768, dtype=torch.float16),
        Case("lstm", steps=3, batch=9, inputs=3, hidden=768, dtype=torch.bfloat16),
        Case("gru", steps=4, batch=3, inputs=3, hidden=765, dtype=torch.float16),
        Case("lstm", steps=3, batch=1, inputs=3, hidden=521, dtype=torch.float16, bidirectional=True),
        Case("gru", steps=3, batch=59, inputs=3, hidden=639, dtype=torch.bfloat16),
        Case("lstm", steps=2, batch=2, inputs=3, hidden=1030, dtype=torch.bfloat16),
        Case("gru", steps=2, batch=2, inputs=3, hidden=513, dtype=torch.float32),
    ]
)
def test_real_sizes(case, place):
    compare(case, "one thread", place.device)


@pytest.mark.parametrize("what", ["input", "output"])
@parametrize(swapped(steps=5, batch=4, hidden=20, bidirectional=True))
def test_nan_in_padding_reaches_nothing(case, what, place):
    lengths = torch.tensor([5, 0, 2, 4], device=place.device)
    net = module(case).to(place.device)
    padding = (torch.arange(5, device=place.device).unsqueeze(1) >= lengths).unsqueeze(-1)

    def run(poison):
        input, hx = data(case, device=place.device)
        input = torch.where(padding, poison if what == "input" else 1.0, input.detach())
        results = tensors(net(input.requires_grad_(), hx, lengths))
        gradient = torch.where(padding, poison if what == "output" else 1.0, results[0].detach())
        sources = [input, *tensors(hx), *net.parameters()]
        return [*results, *torch.autograd.grad(results, sources, [gradient, *(r.detach() for r in results[1:])])]

    for found, expected in zip(run(float("nan")), run(0.5), strict=True):
        assert torch.equal(found, expected)


@parametrize(swapped(steps=4, batch=3, hidden=100))
def test_same_bits(case, place, monkeypatch):
    """In every run, and however blocks exchange their parts."""
    found = []
    for seed in range(4):
        monkeypatch.setenv("CUSIM_SEED", str(seed))
        found.append(outputs_and_gradients(module(case).to(place.device), *data(case, device=place.device)))
    for name, value in found[0].items():
        assert all(torch.equal(value, other[name]) for other in found[1:]), name


def test_batch_rows_do_not_meet(place):
    """A row gives the same bits alone and in any batch: padding within a tile is not seen."""
    case = Case("lstm", steps=5, batch=19, hidden=20, dtype=torch.bfloat16)
    net, (input, _) = module(case).to(place.device), data(case, device=place.device)
    with torch.no_grad():
        whole = net(input)[0]
        for rows in (slice(0, 1), slice(5, 12), slice(8, 19)):
            torch.testing.assert_close(net(input[:, rows])[0], whole[:, rows], rtol=0, atol=0)


@parametrize(swapped(steps=4, batch=3, hidden=20, hx=False))
def test_nan_of_a_row_stays_in_it(case, place):
    """Rows of the batch share a product of matrices, and nothing else."""
    net, (input, _) = module(case).to(place.device), data(case, device=place.device)
    with torch.no_grad():
        clean = net(input)[0]
        input = input.detach().clone()
        input[1, 1] = float("nan")
        found = net(input)[0]
    assert found[1:, 1].isnan().all()
    torch.testing.assert_close(found[:, [0, 2]], clean[:, [0, 2]], rtol=0, atol=0)


@parametrize(
    [
        Case("lstm", hidden=20, dtype=torch.float64),
        Case("lstm_proj", hidden=20, dtype=torch.bfloat16),
        Case("lstm", steps=3, hidden=2200, dtype=torch.bfloat16),
    ]
)
def test_what_no_tier_holds_goes_step_by_step(case, monkeypatch):
    if emulation.missing():
        pytest.skip(emulation.missing())
    monkeypatch.setenv("FASTRNN_CUDA_PLAN", "persistent")
    with emulation.emulated_ops() as calls, fastrnn.backend("native"), torch.no_grad():
        here = Place("cpu", calls)
        module(case)(*data(case))
        assert here.launches_per_call() >= case.steps


def test_auto(monkeypatch):
    """Without a wish the model decides: here for an H200, whose capability is the one that auto trusts."""
    if emulation.missing():
        pytest.skip(emulation.missing())
    case = Case("lstm", steps=9, batch=3, hidden=20, dtype=torch.bfloat16)
    launches = {}
    for wish in ("auto", "stepwise", "persistent"):
        monkeypatch.setenv("FASTRNN_CUDA_PLAN", wish)
        with emulation.emulated_ops() as calls, fastrnn.backend("native"), torch.no_grad():
            here = Place("cpu", calls)
            module(case)(*data(case))
            launches[wish] = here.launches_per_call()
    assert launches == {"auto": 2, "stepwise": 9, "persistent": 2}


def test_wrong_wish(monkeypatch):
    if emulation.missing():
        pytest.skip(emulation.missing())
    monkeypatch.setenv("FASTRNN_CUDA_PLAN", "fast")
    case = Case("gru", dtype=torch.bfloat16)
    with (
        emulation.emulated_ops(),
        fastrnn.backend("native"),
        pytest.raises(ValueError, match="persistent:K, got 'fast'"),
    ):
        module(case)(*data(case))


def test_documented_predictions():
    """The table of docs/cuda.md is what the plan says today."""
    if fastrnn._backend.native is None:
        pytest.skip("the native library is not loaded")
    from bench import cuda_plans

    text = (Path(__file__).parent.parent / "docs" / "cuda.md").read_text(encoding="utf-8")
    assert "\n".join(cuda_plans.table("h200")) in text, "update it: python -m bench.cuda_plans"
