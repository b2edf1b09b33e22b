"""The cases of tests/cuda_sim/scans.cu, and what must come out."""

import numpy as np
from cuda_programs import Case, from_bf16, to_bf16

FAULTS = [
    "none",
    "no_copy_wait",
    "no_block_barrier",
    "relaxed",
    "not_cooperative",
    "no_mbarrier_wait",
    "one_buffer",
    "no_cluster_barrier",
]  # in the order of scans.cu

SMALL_SCANS = [
    {"entry": "grid_scan", "steps": 3, "batch": 16, "hidden": 32, "blocks": 2},
    {"entry": "cluster_scan", "steps": 4, "batch": 11, "hidden": 32, "blocks": 2},
]
ALL_SCANS = [
    {"entry": "grid_scan", "steps": 6, "batch": 16, "hidden": 128, "blocks": 4},
    {"entry": "grid_scan", "steps": 1, "batch": 16, "hidden": 16, "blocks": 1},
    *SMALL_SCANS,
    {"entry": "cluster_scan", "steps": 1, "batch": 8, "hidden": 16, "blocks": 1},
    {"entry": "cluster_scan", "steps": 9, "batch": 19, "hidden": 128, "blocks": 4},
]


def scan_case(entry: str, steps: int, batch: int, hidden: int, blocks: int, fault: str = "none") -> Case:
    """`blocks` of the grid, or of a cluster."""
    rng = np.random.default_rng(0)
    arrays = {
        "w": to_bf16(rng.standard_normal((hidden, hidden)) * 2 / np.sqrt(hidden)),
        "x": rng.standard_normal((steps, batch, hidden)).astype(np.float32),
        "out": np.zeros((steps, batch, hidden), np.uint16),
    }
    numbers = {"steps": steps, "hidden": hidden, "batch": batch, "fault": FAULTS.index(fault)}
    if entry == "grid_scan":
        arrays["counter"] = np.zeros(1, np.uint32)
    return Case(entry, arrays, {**numbers, "blocks" if entry == "grid_scan" else "cluster": blocks})


def check_scan(case: Case, out: np.ndarray) -> None:
    w, h = from_bf16(case.arrays["w"]).astype(np.float64), np.zeros(case.arrays["x"].shape[1:])
    for t, x in enumerate(case.arrays["x"]):
        exact = np.tanh(x + h @ w.T)
        # one unit in the last place of bfloat16 near one: where a sum differs in its last bit, rounding may
        np.testing.assert_allclose(from_bf16(out[t]), exact, rtol=0, atol=2**-8, err_msg=f"step {t}")
        h = from_bf16(out[t]).astype(np.float64)  # so that this does not add up
