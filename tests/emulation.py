"""The CUDA half's ops on an emulated GPU, in place of the CPU's: all that stands above the op then runs on them."""

import functools
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastrnn import _backend, reference

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import native as build
from native import cuda_home

OPS = [f"{cell}_layer{suffix}" for cell in reference.CELLS for suffix in ("", "_backward")]


def missing() -> str:
    """Why the ops cannot be emulated here; empty: they can."""
    if _backend.native is None:
        return f"the native library is not loaded: {_backend.reason}"
    return "" if cuda_home() else "no CUDA headers: install the CUDA toolkit, or set CUDA_HOME"


@functools.cache
def library():
    """The emulated ops as `torch.ops.fastrnn_sim`, built if they are not."""
    torch.ops.load_library(build.build_cuda_ops())
    return torch.ops.fastrnn_sim


@contextmanager
def emulated_ops() -> Iterator[list[str]]:
    """Within the block the ops of CPU tensors are the emulated GPU's; gives the list of those that were called."""
    calls: list[str] = []

    def implement(op, function):
        def kernel(*arguments):
            calls.append(op)
            return function(*arguments)

        with warnings.catch_warnings():  # that a kernel is replaced is what is wanted here
            warnings.simplefilter("ignore", UserWarning)
            registered.impl(op, kernel, "CPU", allow_override=True)

    emulated = library()
    registered = torch.library.Library("fastrnn", "IMPL")
    try:
        for op in OPS:
            implement(op, getattr(emulated, op).default)
        yield calls
    finally:
        registered._destroy()
