"""The shapes of `gpu_check.py`: the grids of FlashRNN, haste and DeepBench, and tiny ones for the emulated GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.cases import GATES

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One row of the table: a layer of one direction."""

    grid: str
    cell: str
    dtype: str
    batch: int
    steps: int
    input_size: int
    hidden_size: int
    mode: str  # forward, or training: forward and backward

    @property
    def name(self) -> str:
        """What --only selects."""
        sizes = f"N{self.batch}-T{self.steps}-I{self.input_size}-H{self.hidden_size}"
        return f"{self.grid}/{self.cell}-{self.dtype}-{sizes}-{self.mode}"


def cases() -> list[Case]:
    """The grids of FlashRNN, haste and DeepBench, the most telling shapes of each first."""

    def square(grid: str, cell: str, dtype: str, batch: int, steps: int, size: int) -> list[Case]:
        return [Case(grid, cell, dtype, batch, steps, size, size, mode) for mode in ("forward", "training")]

    def flash(cell: str, batch: int, steps: int = 1024) -> list[Case]:
        return square("flashrnn", cell, "bf16", batch, steps, 768)

    def haste(cell: str, batch: int, size: int, inputs: int) -> list[Case]:
        return [Case("haste", cell, "fp32", batch, 50, inputs, size, mode) for mode in ("forward", "training")]

    first = [
        *flash("lstm", 16),
        *square("small", "lstm", "bf16", 8, 256, 256),
        *square("small", "gru", "bf16", 8, 256, 256),
        *square("small", "lstm", "bf16", 8, 256, 512),
        *haste("lstm", 32, 512, 128),
        *haste("gru", 32, 512, 128),
        *square("deepbench", "gru", "bf16", 32, 375, 1536),
        *square("deepbench", "lstm", "bf16", 32, 25, 2048),
        *square("deepbench", "rnn", "bf16", 32, 50, 1760),
        *square("fastrnns", "lstm", "fp32", 64, 100, 512),
        *[case for batch in (1, 2, 4) for case in square("deepbench", "lstm", "bf16", batch, 25, 1024)[:1]],
        *[case for batch in (1, 2, 4) for case in square("deepbench", "gru", "bf16", batch, 187, 1536)[:1]],
    ]
    rest = [
        *flash("gru", 16),
        *(case for batch in (2, 8, 32, 64, 128, 256) for case in flash("lstm", batch)),
        *(case for n in (1, 16, 64, 128) for h in (128, 256, 1024) for case in haste("lstm", n, h, 128)),
        *(case for n in (1, 16, 64, 128) for h in (128, 256, 1024) for case in haste("gru", n, h, 128)),
        *(case for cell in ("lstm", "gru", "rnn") for case in square("small", cell, "fp16", 16, 256, 384)),
        *(case for n in (16, 64, 128) for case in square("deepbench", "lstm", "bf16", n, 25, 1024)),
        *(case for n in (16, 64) for case in square("deepbench", "lstm", "bf16", n, 150, 256)),
        *(case for n in (32, 64) for case in square("deepbench", "gru", "bf16", n, 256, 1024)),
        *(case for h, t in ((2816, 187), (2560, 187)) for case in square("deepbench", "gru", "bf16", 32, t, h)),
        *(case for n in (16, 64) for case in square("deepbench", "rnn", "bf16", n, 50, 2048)),
        *(case for t in (256, 512, 2048) for case in flash("lstm", 16, t)),
        *(case for h in (512, 768, 1536, 2048) for case in haste("lstm", 32, h, 256)),
    ]  # fmt: skip
    return list(dict.fromkeys([*first, *rest]))


def tiny_cases() -> list[Case]:
    """What the emulated GPU can do in a second."""
    return [
        Case("tiny", cell, dtype, 3, 4, 5, 7, mode)
        for cell, dtype, mode in (("lstm", "bf16", "forward"), ("gru", "fp32", "training"), ("rnn", "fp16", "training"))
    ]


def floor_microseconds(case: Case) -> float:
    """The least time of a forward step on an H200 with the weights on the chip (docs/cuda.md has the derivation).

    The larger of the matrix units' time and that of reading h on every multiprocessor, and one exchange between them.
    """
    flops = 2.0 * GATES[case.cell] * case.hidden_size**2 * case.batch
    rate = {"bf16": 790e12, "fp16": 790e12, "fp32": 60e12}[case.dtype]
    bytes_of_h = DTYPES[case.dtype].itemsize * case.batch * case.hidden_size
    return 1e6 * max(flops / rate, bytes_of_h / (64 * 1.9e9)) + 0.3
