"""The stage `tune` of `gpu_check.py`: which alternative of the plan is the fastest for each scan, as data for the plan.

A scan is one of the shapes of the grids, forward for inference, forward for training, or backward. Stepwise and the
alternatives near the model's best are timed in turn, as calls of the layer's op alone. What gives wrong results, or
an error, is recorded and out of the race. The best go to `cuda_plans.csv` among the results, in the format of
fastrnn/cuda_plans.csv.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu_cases import DTYPES, Case
from bench.gpu_measure import (
    PLAN,
    Plumbing,
    append_row,
    compare,
    difference,
    measure_each,
    microseconds,
    modules,
    read_rows,
    selected,
)
from bench.layers import DisagreementError, load_fastrnn
from bench.report import commit

SCANS = ("inference", "training", "backward")
CELLS = {"rnn": "rnn_tanh", "lstm": "lstm", "gru": "gru"}
STEPS = 128  # at most: the choice is per step, and the sweep is to be short
WITHIN = 2.0  # alternatives that the model has slower than its best by more are not tried
MOST = 6  # nor more of them
BUDGET = 0.2  # seconds for each scan
CHOICE = ("tier", "exchange", "cluster", "rows", "row_tiles")  # what tells a plan from the others of its scan
FAILURE = "tune, failed"


def native() -> Any:
    """The plan, as the library has it."""
    module = load_fastrnn()._backend.native
    if module is None:
        raise RuntimeError("the native library is not loaded")
    return module


def scans(cases: Iterable[Case]) -> list[Case]:
    """Every scan of the cases once, as cases whose mode is the scan."""
    unique: dict[tuple[Any, ...], Case] = {}
    for case in cases:
        for scan in SCANS:
            key = (case.cell, DTYPES[case.dtype].itemsize, case.batch, case.hidden_size, scan)
            unique.setdefault(key, replace(case, grid="tune", steps=min(case.steps, STEPS), mode=scan))
    return list(unique.values())


def problem(case: Case) -> dict[str, Any]:
    """The arguments of fastrnn._C.cuda_plans, but for the device."""
    return {
        "cell": CELLS[case.cell],
        "steps": case.steps,
        "batch": case.batch,
        "hidden_size": case.hidden_size,
        "element_size": DTYPES[case.dtype].itemsize,
        "training": case.mode != "inference",
        "backward": case.mode == "backward",
    }


def alternatives(case: Case, device: str) -> dict[str, dict[str, Any]]:
    """Stepwise, and the persistent plans that the model has near its best, by the wish that asks for each."""
    *persistent, stepwise = native().cuda_plans(**problem(case), device=device)
    near = [plan for plan in persistent if plan["microseconds"] <= WITHIN * persistent[0]["microseconds"]]
    return {"stepwise": stepwise, **{f"persistent:{k}": plan for k, plan in enumerate(near[:MOST])}}


def call(case: Case, net: nn.RNNBase, input: Tensor) -> Callable[[], list[Tensor]]:
    """The op of the scan alone. What a backward pass needs is computed here, step by step, once."""
    weights = [weight.detach() for weight in net.parameters()]
    layer = getattr(torch.ops.fastrnn, f"{CELLS[case.cell]}_layer").default
    features = (None, None, None)  # lengths, reset, batch_sizes
    layout = (False, False)  # bidirectional, batch_first

    def forward() -> list[Tensor]:
        return layer(input, [], weights, *features, *layout, False, case.mode != "inference")

    if case.mode != "backward":
        return forward
    backward = getattr(torch.ops.fastrnn, f"{CELLS[case.cell]}_layer_backward").default
    os.environ[PLAN] = "stepwise"
    output, *states, reserve = forward()
    gradients = [torch.randn_like(output), *(None for _ in states)]
    mask = [True] * (1 + len(weights))
    return lambda: backward(gradients, input, [], weights, *features, output, reserve, *layout, mask, 0)


def under(wish: str, function: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """The function with a wish of its own; only the scan under test runs within it."""

    def wished() -> list[Tensor]:
        os.environ[PLAN] = wish
        return function()

    return wished


def check(case: Case, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """DisagreementError if a result, or a gradient, is another than step by step."""
    for one, other in zip(found, expected, strict=True):
        if other.numel() > 0:
            difference(case, one, other)


def tune_one(
    case: Case, plumbing: Plumbing, failed: dict[str, str], fail: Callable[[str, str], None]
) -> dict[str, Any]:
    """Microseconds of the alternatives that have not failed; `fail` is told of those that do now."""
    os.environ[PLAN] = "stepwise"
    _, ours, input, _ = modules(case, plumbing)
    function = call(case, ours, input)
    plans = alternatives(case, plumbing.plan_device)
    while True:
        functions = {wish: under(wish, function) for wish in plans if wish not in failed}
        try:
            expected = functions["stepwise"]()
            for wish in functions:
                check(case, functions[wish](), expected)
            comparison = compare(functions, plumbing, BUDGET)
            break
        except (RuntimeError, DisagreementError) as error:
            wish = os.environ[PLAN]  # that of the call that failed: the clock waits for each
            if wish == "stepwise":
                raise
            failed[wish] = str(error).splitlines()[0]
            fail(wish, failed[wish])
    micro = microseconds(comparison)
    ratios = {wish: comparison.median_ratio("stepwise", wish) for wish in functions}
    best, first = max(ratios, key=ratios.__getitem__), min(plans, key=lambda wish: plans[wish]["microseconds"])
    return {
        "microseconds": micro,
        "per_step": {wish: value / case.steps for wish, value in micro.items()},
        "predicted": {wish: plan["microseconds"] for wish, plan in plans.items()},
        "choices": {wish: {name: plan[name] for name in CHOICE} for wish, plan in plans.items()},
        "failed": failed,
        "best": best,
        "first": first,
        "gain": comparison.median_ratio(first, best) if first in functions else None,
        "rounds": comparison.rounds,
    }


def tune(plumbing: Plumbing, arguments: argparse.Namespace) -> dict[str, Any]:
    """The sweep, then the table. An error that takes the GPU away costs the process, not the sweep."""
    end = time.monotonic() + arguments.seconds

    def measure(case: Case, plumbing: Plumbing) -> dict[str, Any]:
        def fail(wish: str, error: str) -> None:
            row = {"name": case.name, "grid": "tune", "plan": FAILURE, "wish": wish, "error": error}
            append_row(arguments.out, row)
            print(case.name, wish, error, flush=True)
            if plumbing.lost():
                left = max(0.0, end - time.monotonic())
                os.execv(sys.executable, [sys.executable, *sys.argv, "--seconds", f"{left:.0f}"])

        earlier = [row for row in read_rows(arguments.out) if row["name"] == case.name and row.get("plan") == FAILURE]
        return tune_one(case, plumbing, {row["wish"]: row["error"] for row in earlier}, fail)

    wanted = [
        case for case in scans(selected(plumbing, arguments)) if len(alternatives(case, plumbing.plan_device)) > 1
    ]
    result = measure_each(plumbing, arguments, "tune", wanted, measure)
    write_table(arguments.out, plumbing)
    return result


def tuned(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that have a best choice."""
    return [row for row in rows if row.get("plan") == "tune" and "best" in row]


def write_table(out: Path, plumbing: Plumbing) -> None:
    """Write the best choices; RuntimeError if the plan does not take them so."""
    rows, device = tuned(read_rows(out)), native().cuda_device(plumbing.plan_device)
    what = plumbing.describe()
    lines = [f"# {what['device']}, commit {commit()}: python bench/gpu_check.py --tune", native().TUNED_HEADER]
    for row in rows:
        choice = row["choices"][row["best"]]
        if choice["tier"] == "stepwise":
            choice = dict.fromkeys(CHOICE, "") | {"tier": "stepwise"}
        scan = {**device, **choice, "cell": CELLS[row["cell"]], "element_size": DTYPES[row["dtype"]].itemsize}
        scan |= {"scan": row["mode"], "batch": row["batch"], "hidden_size": row["hidden_size"], "directions": 1}
        lines.append(",".join(str(scan[name]) for name in native().TUNED_HEADER.split(",")))
    text = "\n".join(lines) + "\n"
    native().set_tuned_plans(text)
    for row in rows:
        case = Case(**{name: row[name] for name in Case.__dataclass_fields__})
        plan = native().cuda_plan(**problem(case), device=plumbing.plan_device)
        if any(plan[name] != value for name, value in row["choices"][row["best"]].items()):
            raise RuntimeError(f"{row['name']}: the plan does not take {row['choices'][row['best']]}")
    (out / "cuda_plans.csv").write_text(text)


def markdown(rows: Iterable[dict[str, Any]]) -> list[str]:
    """A short table: the chosen, all that were measured, and what the choice gains over the model's first."""
    rows = tuned(rows)
    if not rows:
        return []
    lines = [
        "",
        "| scan | chosen | predicted us/step | measured us/step, of all | over the model's first |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        best = row["best"]
        measured = ", ".join(f"{_words(row['choices'][wish])} {value:.2f}" for wish, value in row["per_step"].items())
        failed = "".join(f"; failed: {_words(row['choices'][wish])}" for wish in row["failed"])
        gain = "which failed" if row["gain"] is None else f"{row['gain']:.2f}"
        lines.append(
            f"| {row['name']} | {_words(row['choices'][best])} | {row['predicted'][best]:.2f} | {measured}{failed} "
            f"| {gain} |"
        )
    return lines


def _words(choice: dict[str, Any]) -> str:
    if choice["tier"] == "stepwise":
        return "stepwise"
    where = "G" if choice["tier"] == "grid" else "C"
    return f"{where}{choice['cluster']} N{choice['rows']} R{choice['row_tiles']}"
