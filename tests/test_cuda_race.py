"""CUDA kernels, emulated, under ThreadSanitizer: a race between CUDA threads is one between fibers (`make race`).

Barriers, mbarriers, releases and acquires order memory here as CUDA says; shuffles and mma do not, and neither does the
order in which blocks happened to run. A launch of more than about 1,000 threads takes long.
"""

import re

import cuda_programs
import numpy as np
import pytest
from cuda_programs import SIM, Case
from layers import LAYERS, check_layer
from scans import SMALL_SCANS, check_scan, scan_case
from steps import STEPS, check_steps
from test_cuda_sim import BLOCK, CLUSTER, GRID, RESULTS, WRAPPERS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(cuda_programs.no_emulator()), reason=cuda_programs.no_emulator() or "-"),
]

SCANS = [scan_case(**arguments) for arguments in SMALL_SCANS]


def check_wrappers(cases, results):
    assert [result.error for result in results] == [""] * len(cases)  # test_cuda_sim.py looks at the numbers


def check_scans(cases, results):
    for case, result in zip(cases, results, strict=True):
        check_scan(case, result.arrays["out"])


def check_layers(cases, results):
    for case, result in zip(cases, results, strict=True):
        check_steps(case, result.arrays)


def check_persistent(cases, results):
    for case, result in zip(cases, results, strict=True):
        check_layer(case, result.arrays)


def check_faults(cases, results):
    for case, result in zip(cases, results, strict=True):
        np.testing.assert_array_equal(result.arrays["out"], RESULTS[case.entry.removesuffix("_none")])


# The programs: source, cases, and a check of what comes out.
PROGRAMS = [
    (SIM / "wrappers.cu", [case for case, _, _ in WRAPPERS], check_wrappers),
    (SIM / "scans.cu", SCANS, check_scans),
    (SIM / "steps.cu", [case for case in STEPS if case.numbers["units"] < 10], check_layers),
    (SIM / "layers.cu", LAYERS, check_persistent),
    (
        SIM / "faults.cu",
        [Case("block_none", BLOCK), Case("grid_none", GRID), Case("cluster_none", CLUSTER)],
        check_faults,
    ),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("source, cases, check", PROGRAMS, ids=[source.stem for source, _, _ in PROGRAMS])
def test_no_race(source, cases, check, seed, tmp_path):
    results = cuda_programs.run(cuda_programs.emulated(source, "thread"), cases, tmp_path, seed)
    assert results[0].stderr == ""
    check(cases, results)


# What ThreadSanitizer must find, and in which kernel.
RACES = [
    ("faults.cu", Case("no_barrier", BLOCK), "block_rules"),
    ("faults.cu", Case("no_warp_barrier", BLOCK), "block_rules"),
    ("faults.cu", Case("relaxed_flag", GRID), "grid_rules"),
    ("scans.cu", scan_case(**SMALL_SCANS[0], fault="no_block_barrier"), "grid_scan"),
    ("scans.cu", scan_case(**SMALL_SCANS[0], fault="relaxed"), "grid_scan"),
    ("scans.cu", scan_case(**SMALL_SCANS[1], fault="no_block_barrier"), "cluster_scan"),
    ("scans.cu", scan_case(**SMALL_SCANS[1], fault="no_mbarrier_wait"), "cluster_scan"),
    ("scans.cu", scan_case(**SMALL_SCANS[1], fault="one_buffer"), "cluster_scan"),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "source, case, kernel",
    RACES,
    ids=[f"{case.entry}-{case.numbers.get('fault', 0)}" for _, case, _ in RACES],
)
def test_race_is_found(source, case, kernel, seed, tmp_path):
    result = cuda_programs.run(cuda_programs.emulated(SIM / source, "thread"), [case], tmp_path, seed)[0]
    stderr = result.stderr
    if result.error.startswith(
        f"cusim: kernel {kernel}("
    ):  # in some schedules one of the emulator's own rules is first
        return
    assert "WARNING: ThreadSanitizer: data race" in stderr
    assert re.search(rf"#\d+ {kernel}\(.*{source}:\d+", stderr), stderr
    assert re.search(r"block \d,0,0 thread \d+,0,0", stderr)
