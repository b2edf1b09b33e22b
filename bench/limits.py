"""What the machine can do at most, measured beside the layers: multiply-adds in registers, and loads of the weights."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping

import torch

from bench.built import build
from bench.cases import Case
from bench.timing import Timing

NAMES = ("limit-multiply-add", "limit-load")  # among the functions timed
ROUNDS = 50_000  # of multiply-adds: some half millisecond, beside which starting a thread is little
BYTES = 16e6  # that a sample of loads reads at least


@functools.cache
def library() -> ctypes.CDLL:
    """The native functions (bench/native/limits.cpp); RuntimeError if they cannot be built."""
    found = ctypes.CDLL(str(next(build("limits").glob("liblimits.*"))))
    found.limits_multiply_add.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int64]
    found.limits_load.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    found.limits_multiply_add.restype = found.limits_load.restype = ctypes.c_double
    return found


class Limits:
    """The least time of a case's work in float32 on this machine, from rates measured in the same rounds.

    Parameters
    ----------
    case, cell, mode
        The work: its operations and the bytes of weights that it reads.
    threads : int
        How many threads do it.
    capability : str
        The instruction set that fastrnn uses: avx512, avx2 or default.
    """

    def __init__(self, case: Case, cell: str, mode: str, threads: int, capability: str) -> None:
        self.flops, self.bytes = case.flops(cell, mode), case.weight_bytes(cell, mode)
        count = max(1024, case.weights(cell))
        weights = torch.randn(count)  # the loads come from where weights of this size lie: a cache, or memory
        times = max(1, round(BYTES / (4 * count)))
        name, native = capability.encode(), library()
        self.functions: Mapping[str, Callable[[], float]] = {
            NAMES[0]: lambda: native.limits_multiply_add(name, threads, ROUNDS),
            NAMES[1]: lambda: native.limits_load(name, threads, weights.data_ptr(), count, times),
        }
        self.amounts = [function() for function in self.functions.values()]

    def rates(self, timings: Mapping[str, Timing]) -> tuple[float, float]:
        """Operations and bytes a second, by the fastest samples."""
        flops, read = (amount / timings[name].minimum for name, amount in zip(NAMES, self.amounts, strict=True))
        return flops, read

    def seconds(self, timings: Mapping[str, Timing]) -> tuple[float, str]:
        """The least time of the work, and what sets it: ``multiply-add`` or ``load``."""
        flops, read = self.rates(timings)
        return max((self.flops / flops, "multiply-add"), (self.bytes / read, "load"))
