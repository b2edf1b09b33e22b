"""ONNX Runtime and OpenVINO as oracles: code that shares nothing with torch says what a layer's results are.

They know float32 only, so the oracle errs as torch does. How much, is measured against torch.nn in float64 on the full
batch, without fastrnn; ours may then differ from the oracle by what tolerance.py allows to an oracle with an error.
"""

import functools
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from cases import Case, data, module, parametrize, row_lengths, tensors
from tolerance import check, worst

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the benchmarks are no part of the installed package

from bench.cases import PEERS
from bench.peers import peer_runner, recurrent_graph

SIZES = [(3, 3, 17, 17), (17, 1, 3, 129), (1, 17, 129, 3), (129, 3, 1, 3), (17, 17, 3, 1), (17, 17, 17, 17)]
CASES = [
    Case(kind, bidirectional=bidirectional, hx=hx, steps=steps, batch=batch, inputs=inputs, hidden=hidden)
    for kind, bidirectional, hx, (steps, batch, inputs, hidden) in product(
        ("rnn_tanh", "rnn_relu", "lstm", "gru"), (False, True), (True, False), SIZES
    )
]
NAMES = ("Y", "Y_h", "Y_c")


@pytest.fixture(params=PEERS)
def peer(request):
    for package in ("onnx", request.param):
        pytest.importorskip(package, reason=f"the oracle {request.param} needs the package {package}")
    return request.param


def by_peer(peer, case, lengths=None):
    """Output and final states, shaped as torch's."""
    input, hx = data(case)
    inputs = dict(zip(("X", "h0", "c0"), tensors([input, hx]), strict=False))
    if lengths is not None:
        inputs["lengths"] = lengths.int()
    outputs = NAMES[: 3 if case.kind == "lstm" else 2]
    graph = recurrent_graph(module(case, torch.nn), case.steps, case.batch, list(inputs), outputs)
    results = peer_runner(peer, graph, {name: value.detach().numpy() for name, value in inputs.items()})()
    output, *final = (torch.tensor(result) for result in results)
    return [output.transpose(1, 2).flatten(2), *final]


@functools.cache
def relative_error(peer, case):
    """The peer's own, in its worst tensor: of the full batch, against torch.nn in float64."""
    oracle = tensors(module(case, torch.nn, torch.float64)(*data(case, torch.float64)))
    found = worst(dict(enumerate(by_peer(peer, case))), dict(enumerate(oracle)))
    assert found < torch.finfo(torch.float32).eps ** 0.5, f"{peer} keeps fewer than half of the digits: no oracle"
    return found


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@parametrize(CASES)
def test_forward(case, ragged, peer, backend):
    lengths = None
    if ragged:
        lengths = row_lengths(case)
        lengths[case.batch // 2] = case.steps
        if case.batch > 1:
            lengths[0] = 0
    with torch.no_grad():
        ours = tensors(module(case)(*data(case), lengths=lengths))
    own = relative_error(peer, case)
    for name, value, oracle in zip(NAMES, ours, by_peer(peer, case, lengths), strict=False):
        if lengths is not None and name == "Y":
            beyond = torch.arange(case.steps).unsqueeze(1) >= lengths
            assert not value[beyond].any() and not oracle[beyond].any()
        elif lengths is not None:
            # ONNX says nothing of the final state of an empty row, and the peers return zeros: ours is the initial one
            value, oracle = value[:, lengths > 0], oracle[:, lengths > 0]
        allowed = own * oracle.abs().max().item()
        check(name, value, None, oracle.double(), own=allowed, of_oracle=allowed)


@parametrize([replace(case, steps=3, batch=3) for case in CASES[:: 2 * len(SIZES)]])
def test_an_oracle_finds_a_wrong_gate(case, peer, backend):
    """The tests above can fail: one bias, off by a thousandth, is found."""
    net = module(case)
    with torch.no_grad():
        net.bias_hh_l0[-1] += 1e-3
        output = net(*data(case))[0]
    oracle = by_peer(peer, case)[0].double()
    allowed = relative_error(peer, case) * oracle.abs().max().item()
    with pytest.raises(AssertionError, match="output is off by"):
        check("output", output, None, oracle, own=allowed, of_oracle=allowed)
