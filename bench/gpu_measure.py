"""What the measuring stages of `gpu_check.py` share: where they run, two modules that agree, and rows on disk."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import timing
from bench.gpu_cases import DTYPES, Case, cases, floor_microseconds, tiny_cases
from bench.layers import CLASSES, DisagreementError, load_fastrnn
from bench.report import commit

PLAN = "FASTRNN_CUDA_PLAN"  # the library reads it at each call
# Largest difference to cuDNN, relative to the largest output: to refuse to time wrong work. Accuracy is the tests' job.
TOLERANCES = {"bf16": 0.05, "fp16": 0.01, "fp32": 1e-3}


class Plumbing:
    """Where the stages run: on the GPU, or on the emulated one."""

    def __init__(self) -> None:
        self.gpu = torch.cuda.is_available()
        self.device = "cuda" if self.gpu else "cpu"
        self.plan_device = "cuda" if self.gpu else "h200"  # for fastrnn._C; what the emulator says that it is

    def describe(self) -> dict[str, Any]:
        info: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if self.gpu else "none: emulated, times mean nothing",
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "commit": commit(),
        }
        if self.gpu:
            properties = torch.cuda.get_device_properties(0)
            info |= {
                "capability": list(torch.cuda.get_device_capability()),
                "multiprocessors": properties.multi_processor_count,
                "memory": properties.total_memory,
                "cudnn": torch.backends.cudnn.version(),
                "cuda": torch.version.cuda,
                "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
                "clocks": _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"),
                "nvcc": _output("nvcc", "--version").splitlines()[-1:],
            }
        return info

    def place(self) -> Any:
        """A context in which the ops run there."""
        if self.gpu:
            return torch.cuda.device(0)
        import emulation

        return emulation.emulated_ops()

    def lost(self) -> bool:
        """Whether an error has ended this process's use of the GPU, as an assertion of a kernel does."""
        try:
            if self.gpu:
                torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"


def read_rows(out: Path) -> list[dict[str, Any]]:
    """The rows measured so far."""
    file = out / "rows.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def append_row(out: Path, row: dict[str, Any]) -> None:
    """Add a row to those on disk."""
    with (out / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def selected(plumbing: Plumbing, arguments: argparse.Namespace) -> list[Case]:
    """The cases of this place that --only names."""
    return [case for case in (cases() if plumbing.gpu else tiny_cases()) if fnmatchcase(case.name, arguments.only)]


def measure_each(
    plumbing: Plumbing,
    arguments: argparse.Namespace,
    plan: str,
    chosen: Sequence[Case],
    measure: Callable[[Case, Plumbing], dict[str, Any]],
) -> dict[str, Any]:
    """One line of JSON a case, written at once; what is there already is not measured again."""
    done = {row["name"] for row in read_rows(arguments.out) if row.get("plan") == plan}
    end = time.monotonic() + arguments.seconds
    with plumbing.place():
        for case in chosen:
            if case.name in done or time.monotonic() > end:
                continue
            try:
                row = measure(case, plumbing)
            except (torch.cuda.OutOfMemoryError, DisagreementError) as error:
                row = {"error": str(error).splitlines()[0]}
            append_row(arguments.out, {"name": case.name, "plan": plan, **asdict(case), **row})
            print(case.name, row.get("ratio", row.get("best", row.get("error"))), flush=True)
    return {"rows": sum(row.get("plan") == plan for row in read_rows(arguments.out)), "of": len(chosen)}


def difference(case: Case, found: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest value expected; DisagreementError if it is not rounding."""
    error = ((found.float() - expected.float()).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
    if not error <= TOLERANCES[case.dtype]:
        raise DisagreementError(f"{case.name}: off by {error:.3g} of the largest output")
    return error


def modules(case: Case, plumbing: Plumbing) -> tuple[nn.RNNBase, nn.RNNBase, Tensor, float]:
    """torch.nn's layer, ours with the same weights, an input, and the difference of their outputs."""
    fastrnn, dtype = load_fastrnn(), DTYPES[case.dtype]
    torch.manual_seed(0)
    theirs = getattr(nn, CLASSES[case.cell])(case.input_size, case.hidden_size).to(plumbing.device, dtype)
    theirs.flatten_parameters()
    ours = getattr(fastrnn, CLASSES[case.cell])(case.input_size, case.hidden_size).to(plumbing.device, dtype)
    ours.load_state_dict(theirs.state_dict())
    input = torch.randn(case.steps, case.batch, case.input_size, device=plumbing.device, dtype=dtype)
    with torch.no_grad():
        return theirs, ours, input, difference(case, ours(input)[0], theirs(input)[0])


def compare(functions: Mapping[str, timing.Function], plumbing: Plumbing, budget: float = 0.35) -> timing.Comparison:
    """Time them in turn, for about so many seconds."""
    return timing.compare(
        functions,
        budget=budget,
        clock=timing.clock_for(plumbing.device),
        limit=2.5 * budget,
        max_rounds=100,
        min_sample=2e-4,
    )


def microseconds(comparison: timing.Comparison) -> dict[str, float]:
    """The median of each function's calls."""
    return {name: 1e6 * one.median for name, one in comparison.timings.items()}


def measure(case: Case, plumbing: Plumbing) -> dict[str, Any]:
    """Microseconds of one call: ours, torch.nn's, ours from a graph, and of the input projection alone."""
    theirs, ours, input, error = modules(case, plumbing)
    w_ih = theirs.weight_ih_l0.detach()

    def step(net: nn.Module) -> Callable[[], object]:
        def forward() -> object:
            with torch.no_grad():
                return net(input)

        source = input.clone().requires_grad_()
        inputs = [source, *net.parameters()]

        def training() -> object:
            return torch.autograd.grad(net(source)[0].sum(), inputs)

        return forward if case.mode == "forward" else training

    rows = input.reshape(-1, case.input_size)
    functions = {"cudnn": step(theirs), "fastrnn": step(ours), "projection": lambda: rows @ w_ih.t()}
    if plumbing.gpu:
        functions["graph"] = _captured(step(ours))
    comparison = compare(functions, plumbing)
    micro = microseconds(comparison)
    floor = floor_microseconds(case)
    return {
        "microseconds": micro,
        "per_step": {name: value / case.steps for name, value in micro.items()},
        "ratio": comparison.median_ratio("cudnn", "fastrnn"),
        "graph_ratio": comparison.median_ratio("cudnn", "graph") if "graph" in functions else None,
        # both without the input projection, which is the same GEMM for either
        "scan_ratio": (micro["cudnn"] - micro["projection"]) / max(1e-9, micro["fastrnn"] - micro["projection"]),
        "floor_per_step": floor,
        "rounds": comparison.rounds,
        "error": None,
        "difference": error,
    }


def _captured(function: Callable[[], object]) -> Callable[[], object]:
    """The calls of a function as one graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = function()  # its tensors are the graph's memory

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def by_plan(plumbing: Plumbing, arguments: argparse.Namespace, plan: str) -> dict[str, Any]:
    """Ours and torch.nn's in turn, ours as `plan` wishes."""
    os.environ[PLAN] = plan
    return measure_each(plumbing, arguments, plan, selected(plumbing, arguments), measure)
