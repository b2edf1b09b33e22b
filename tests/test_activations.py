"""Sigmoid and tanh of the kernels against mpmath, over all that a float can be, for every instruction set.

They are reached through layers whose weights are zero: the bias of an RNN's unit then is what tanh gets, and that of a
GRU's update gate what sigmoid gets, as h = n + z (h_0 - n) with n = tanh(0) and h_0 = 1.
"""

import math
import os
import subprocess
import sys

import mpmath
import pytest
import torch

from fastrnn import functional

UNITS = 256
# Units in the last place, where the function's value is no denormal: the table of docs/performance.md.
MOST_ULP = {
    ("sigmoid", torch.float32): 2.5,
    ("tanh", torch.float32): 3.0,
    ("sigmoid", torch.float64): 2.5,
    ("tanh", torch.float64): 2.0,
}


def points(dtype):
    """Every binade on both sides of zero, a dense middle, and where an implementation changes its way."""
    info = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(5)
    lowest, highest = round(math.log2(info.tiny)), round(math.log2(info.max)) - 1
    per_binade = 8 if dtype == torch.float32 else 3
    mantissas = 1 + torch.rand(highest - lowest + 1, per_binade, generator=generator, dtype=torch.float64)
    mantissas[:, 0], mantissas[:, 1] = 1, 2 - info.eps
    binades = torch.ldexp(mantissas, torch.arange(lowest, highest + 1)[:, None]).flatten()
    middle = torch.rand(4000, generator=generator, dtype=torch.float64) * 20
    middle[:2000] /= 10
    edges = torch.tensor([0.625, 9.1, 19.1, 87.0, 87.33654, 87.5, 88.0, 88.73, 103.9, 354.0, 708.4, 709.8, 745.2])
    edges = torch.cat([edges * (1 + offset * info.eps) for offset in (-3, -1, 0, 1, 3)])
    magnitudes = torch.cat([binades, middle, edges.double(), torch.tensor([0.0, info.max, info.tiny / 4]).double()])
    return torch.cat([magnitudes, -magnitudes]).to(dtype)


def of_layers(name, x):
    """The kernels' own function of each element."""
    padded = torch.nn.functional.pad(x, (0, -len(x) % UNITS)).view(-1, UNITS)
    gates = 1 if name == "tanh" else 3
    w_ih, w_hh = x.new_zeros(gates * UNITS, 1), x.new_zeros(gates * UNITS, UNITS)
    zeros, result = x.new_zeros(gates * UNITS), []
    for row in padded:
        if name == "tanh":
            output, _ = functional.rnn(x.new_zeros(1, 1, 1), None, [w_ih, w_hh, row, zeros])
        else:
            bias = torch.cat([zeros[:UNITS], row, zeros[:UNITS]])
            output, _ = functional.gru(x.new_zeros(1, 1, 1), x.new_ones(1, 1, UNITS), [w_ih, w_hh, bias, zeros])
        result.append(output.flatten())
    return torch.cat(result)[: len(x)]


CODE = """
import sys, torch
from test_activations import of_layers, points
results = {(name, dtype): of_layers(name, points(dtype))
           for name in ("sigmoid", "tanh") for dtype in (torch.float32, torch.float64)}
torch.save(results, sys.argv[1])
"""


@pytest.fixture(scope="module")
def exact():
    """Of each point, the function's value as an exact number."""
    values = {}
    with mpmath.workdps(40):
        for dtype in (torch.float32, torch.float64):
            numbers = [mpmath.mpf(x) for x in points(dtype).tolist()]
            values["tanh", dtype] = [mpmath.tanh(x) for x in numbers]
            # mpmath would compute e^(1e38) with all of its digits
            values["sigmoid", dtype] = [
                1 / (1 + mpmath.exp(-x)) if abs(x) < 2000 else mpmath.mpf(x > 0) for x in numbers
            ]
    return values


def worst_ulp(found, exact, dtype):
    """The largest error of normal values in units in the last place; others must be next to zero too."""
    info = torch.finfo(dtype)
    digits = 1 - round(math.log2(info.eps))
    worst = 0.0
    with mpmath.workdps(40):
        for ours, value in zip(found.tolist(), exact, strict=True):
            error = abs(mpmath.mpf(ours) - value)
            if abs(value) < info.tiny:
                assert error <= info.tiny
                continue
            unit = mpmath.ldexp(1, int(mpmath.floor(mpmath.log(abs(value), 2))) + 1 - digits)
            worst = max(worst, float(error / unit))
    return worst


@pytest.mark.parametrize(
    "capability", ["avx512", *(pytest.param(n, marks=pytest.mark.slow) for n in ("avx2", "default"))]
)
def test_error_over_the_whole_range(capability, native, exact, tmp_path):
    order = ("default", "avx2", "avx512")
    if order.index(capability) > order.index(native.cpu_capability()):
        pytest.skip(f"this machine, or FASTRNN_CPU_CAPABILITY, stops at {native.cpu_capability()}")
    path = [os.path.dirname(__file__), *sys.path]
    subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "results.pt")],
        env=os.environ | {"FASTRNN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(path)},
        check=True,
        timeout=120,
    )
    results = torch.load(tmp_path / "results.pt")
    for (name, dtype), found in results.items():
        worst = worst_ulp(found, exact[name, dtype], dtype)
        print(f"{capability} {name} {dtype}: {worst:.2f} ulp")
        assert worst <= MOST_ULP[name, dtype], (name, dtype)
        assert (found.abs() <= 1).all()
        assert (found >= (0 if name == "sigmoid" else -1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_finite(dtype, backend):
    infinity = float("inf")
    x = torch.tensor([infinity, -infinity, float("nan"), 0.0, -0.0], dtype=dtype)
    sigmoid, tanh = of_layers("sigmoid", x), of_layers("tanh", x)
    torch.testing.assert_close(sigmoid, torch.tensor([1, 0, float("nan"), 0.5, 0.5], dtype=dtype), equal_nan=True)
    assert sigmoid[1] == 0
    torch.testing.assert_close(tanh, torch.tensor([1, -1, float("nan"), 0, 0], dtype=dtype), equal_nan=True)
