"""What a long-running program needs: memory that stays flat, no denormals, threads changed as it runs."""

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import threads

import fastrnn

MEMORY = """
    import os, torch, fastrnn
    torch.set_num_threads(1)

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    nets = [fastrnn.LSTM(8, 24), fastrnn.GRU(8, 24, 2), fastrnn.RNN(8, 24, bidirectional=True)]
    session = fastrnn.StreamingSession(nets[0])
    data = torch.randn(23, 17, 8)

    def call(index):
        with torch.inference_mode():
            nets[index % 3](data[: 1 + index % 23, : 1 + index % 17])
            session.step(data[0, 0])

    for index in range(2000):
        call(index)
    before = resident()
    for index in range(10000):
        call(index)
    print(resident() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the system does not tell")
def test_memory_stays_flat_over_ten_thousand_calls(native):
    """Every T and N in turn: what were kept by shape, or leaked by call, would add up."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1 << 20


def test_calls_of_all_sizes_leave_nothing_to_each_other(native):
    """A thread keeps its scratch memory up to some size: the numbers are those of a thread that has none yet."""
    nets = [fastrnn.LSTM(5, hidden) for hidden in (300, 3, 600, 310, 300)]
    data = torch.randn(7, 17, 5)

    def train(net):
        torch.set_num_threads(1)
        output = net(data)[0]
        return [output.detach(), *torch.autograd.grad(output.square().sum(), list(net.parameters()))]

    with threads(1), ThreadPoolExecutor(1) as one:
        for _ in range(2):
            for net in nets:
                with ThreadPoolExecutor(1) as fresh:
                    expected = fresh.submit(train, net).result()
                for a, b in zip(one.submit(train, net).result(), expected, strict=True):
                    assert torch.equal(a, b)


def decaying(hidden=256):
    """relu(h / 2): after a few steps a state of 1e-36 is a denormal, and stays one for twenty steps more."""
    net = fastrnn.RNN(1, hidden, nonlinearity="relu")
    with torch.no_grad():
        for weight in net.parameters():
            weight.zero_()
        net.weight_hh_l0.copy_(torch.eye(hidden) / 2)
    return net


@pytest.mark.parametrize("count", [1, 2])
def test_denormals_are_flushed_in_the_scan_and_nowhere_else(count, native):
    net = decaying()
    input, hx = torch.zeros(12, 1, 1), torch.full((1, 1, 256), 1e-36)
    small = torch.tensor([1e-38])
    with threads(count), torch.no_grad():
        before = small / 4
        output, h_n = net(input, hx)
        assert torch.equal(small / 4, before) and before > 0  # still a denormal out here
        assert torch.equal(output[:6, 0], torch.stack([hx[0, 0] / 2**k for k in range(1, 7)]))
        assert torch.count_nonzero(h_n) == 0
        assert fastrnn.to_torch(net)(input, hx)[1].min() > 0
    session = fastrnn.StreamingSession(net)
    session.state = hx
    assert torch.count_nonzero(session.chunk(input[:, 0])[-1]) == 0
    assert small / 4 > 0


def test_a_flush_that_the_user_has_set_stays(native):
    if not torch.set_flush_denormal(True):
        pytest.skip("torch cannot set it here")
    try:
        net, session = decaying(8), fastrnn.StreamingSession(decaying(8))
        net(torch.zeros(3, 1, 1))
        session.step(torch.zeros(1))
        assert torch.tensor([1e-38]) / 4 == 0
    finally:
        torch.set_flush_denormal(False)


def test_number_of_threads_changed_as_it_runs(native):
    net = fastrnn.LSTM(64, 256)
    input = torch.randn(9, 3, 64)
    with threads(1), torch.no_grad():
        expected = net(input)[0]
    with torch.no_grad():
        for count in (2, 1, 4, 3, 1, 2):
            with threads(count):
                torch.testing.assert_close(net(input)[0], expected, rtol=1e-5, atol=1e-6)
