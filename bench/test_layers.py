"""The layer table as a pytest-benchmark suite: one group per case, cell and mode, torch.nn and fastrnn in each.

It shows distributions and compares saved runs; the implementations run one after the other here, so for a ratio to
rely on use ``python -m bench``.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from bench import layers
from bench.cases import CASES, CELLS, MODES, Case

pytest.importorskip("pytest_benchmark")


@lru_cache(maxsize=1)  # both implementations of a group follow each other
def prepared(case: Case, cell: str, mode: str) -> dict[str, layers.TrainableVariant]:
    """The variants of one row, found to agree."""
    problem = layers.make_problem(case, cell)
    runs = layers.variants(problem)
    layers.check(problem, runs, mode)
    return {run.name: run for run in runs}


# Three rounds: the longest calls take seconds, and pytest-benchmark's five would add up to many minutes.
@pytest.mark.benchmark(min_rounds=3)
@pytest.mark.parametrize("implementation", ["torch", "fastrnn"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layer(benchmark, case: Case, cell: str, mode: str, implementation: str) -> None:
    benchmark.group = f"{case.name} {cell} {mode}"
    run = prepared(case, cell, mode)[implementation]
    with torch.inference_mode(mode == "inference"):
        benchmark(run.forward if mode == "inference" else run.train)
