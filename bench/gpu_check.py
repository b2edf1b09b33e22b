"""Everything that only a GPU can tell, in one command: build, tests, sanitizers, and the benchmark against cuDNN.

    python bench/gpu_check.py                    # all stages, 9 minutes at the most
    python bench/gpu_check.py --resume           # what an earlier run has not finished
    python bench/gpu_check.py --stages benchmark --only 'flashrnn/*'
    python bench/gpu_check.py --tune             # which of the plan's alternatives is the fastest, as data for the plan
    python bench/gpu_check.py --stages stepwise  # the same cases, all of them step by step
    python bench/gpu_check.py --stages cpu       # the machine's processor: 1, 2, 4, 8 and 16 threads against torch.nn

Needs no network. Every stage is a process with a time limit of its own; what was measured is on disk (raw JSON, a
Markdown table) even if a later stage fails. Where there is no GPU the script says so and checks its own plumbing: the
same stages on the emulated GPU of the tests, with tiny shapes and times that mean nothing.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # run as a script, and in need of the tests' emulated GPU

import torch

from bench import gpu_tune, timing
from bench.gpu_measure import Plumbing, append_row, by_plan, read_rows
from bench.report import geomean

DEFAULT_STAGES = ("environment", "build", "test", "sanitize", "benchmark")
TUNE_STAGES = ("environment", "build", "tune")
STAGES = (*DEFAULT_STAGES, "tune", "stepwise", "cpu")
MEASURING = ("benchmark", "stepwise", "tune")  # which go on where they stopped
# Seconds; what measures gets what is left.
LIMITS = {"environment": 30.0, "build": 210.0, "test": 120.0, "sanitize": 60.0, "cpu": 90.0}
TOTAL = 525.0
CLOSING = 10.0  # kept for the table

# --- The stages; each runs as a process ------------------------------------------------------------------------------


def environment(plumbing: Plumbing, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    return plumbing.describe()


def build(plumbing: Plumbing, arguments: argparse.Namespace) -> dict[str, Any]:
    """The library for this device only, against the torch that is here."""
    if not plumbing.gpu:
        _run([sys.executable, "tools/native.py", "cuda-ops"])
        return {"what": "the ops on the emulated GPU"}
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}{minor}{'a' if major >= 9 else ''}-real"
    _run([sys.executable, "tools/native.py", "build"], FASTRNN_CUDA="1", FASTRNN_CUDA_ARCH=architecture)
    return {"what": architecture}


def test(plumbing: Plumbing, arguments: argparse.Namespace) -> dict[str, Any]:
    """The CUDA tests, gpu.h's functions against their emulated twins among them."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-x"]
    if plumbing.gpu:
        _run(
            [
                *pytest[:-1],
                "-m",
                "cuda",
                "--maxfail=20",
                "tests/test_cuda.py",
                "tests/test_cuda_persistent.py",
                "tests/test_cuda_sim.py",
            ]
        )
    else:
        _run([*pytest, "tests/test_cuda.py", "-k", "test_cells or test_autocast"])
    return {}


SANITIZED = """
import torch, fastrnn
torch.manual_seed(0)
for name in ("RNN", "LSTM", "GRU"):
    for dtype in (torch.float32, torch.bfloat16):
        net = getattr(fastrnn, name)(5, 37, num_layers=2, bidirectional=True, device="cuda", dtype=dtype)
        input = torch.randn(6, 3, 5, device="cuda", dtype=dtype, requires_grad=True)
        lengths = torch.tensor([6, 0, 4], device="cuda")
        reset = torch.rand(6, 3, device="cuda") < 0.3
        for extra in ((), (None, lengths, reset)):
            net(input, *extra)[0].float().sum().backward()
torch.cuda.synchronize()
"""


def sanitize(plumbing: Plumbing, arguments: argparse.Namespace) -> dict[str, Any]:
    """compute-sanitizer over small shapes, where it is installed."""
    tool = _which("compute-sanitizer")
    if not plumbing.gpu or tool is None:
        return {"skipped": "no GPU" if not plumbing.gpu else "compute-sanitizer is not installed"}
    checks = {}
    for check in ("memcheck", "racecheck"):
        # cuBLAS's and torch's own kernels are not the subject
        kernels = [
            "--kernel-name-exclude",
            "kernel_substring=cutlass",
            "--kernel-name-exclude",
            "kernel_substring=gemm",
        ]
        command = [tool, "--tool", check, "--error-exitcode", "9", *kernels, sys.executable, "-c", SANITIZED]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        print(done.stdout[-2000:], done.stderr[-1000:])
        checks[check] = "clean" if done.returncode == 0 else f"status {done.returncode}: {done.stdout[-300:]}"
    if any(result != "clean" for result in checks.values()):
        raise RuntimeError(f"compute-sanitizer: {checks}")
    return checks


def _which(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path="/usr/local/cuda/bin")


def _run(command: list[str], **environment: str) -> None:
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **environment})


def benchmark(plumbing: Plumbing, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every case as the plan has it, tuned rows included."""
    result = by_plan(plumbing, arguments, "auto")
    if arguments.only == "*" and "single-step" not in {row["name"] for row in read_rows(arguments.out)}:
        for row in single_steps(plumbing):
            append_row(arguments.out, row)
    return result


def stepwise(plumbing: Plumbing, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every case step by step: what the persistent kernels gain."""
    return by_plan(plumbing, arguments, "stepwise")


def cpu(plumbing: Plumbing, arguments: argparse.Namespace) -> dict[str, Any]:
    """How the CPU's scans use the cores of a machine that has more than a few."""
    threads = [str(count) for count in (1, 2, 4, 8, 16) if count <= (os.cpu_count() or 1)]
    command = [sys.executable, "-m", "bench", "--cell", "lstm", "gru", "--case", "nlp", "speech", "wide"]
    _run([*command, "--threads", *threads, "--budget", "0.3", "--json", str(arguments.out.resolve() / "cpu.json")])
    return {"threads": threads}


def tune(plumbing: Plumbing, arguments: argparse.Namespace) -> dict[str, Any]:
    """The fastest of the plan's alternatives for each shape, as data for the plan: cuda_plans.csv."""
    return gpu_tune.tune(plumbing, arguments)


def single_steps(plumbing: Plumbing) -> Iterator[dict[str, Any]]:
    """A step in plain torch, compiled, in a loop of Python: what one would write without a library."""
    for batch, size in ((1, 256), (8, 512), (16, 768)) if plumbing.gpu else ((2, 5),):
        dtype, steps = torch.bfloat16, 64 if plumbing.gpu else 3
        w_ih, w_hh = (torch.randn(4 * size, size, device=plumbing.device, dtype=dtype) / size**0.5 for _ in range(2))
        input = torch.randn(steps, batch, size, device=plumbing.device, dtype=dtype)

        def lstm(x, h, c, w_hh=w_hh):
            i, f, g, o = (x + h @ w_hh.t()).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            return o.sigmoid() * c.tanh(), c

        compiled = torch.compile(lstm, mode="reduce-overhead" if plumbing.gpu else "default")

        def loop(step=compiled, input=input, w_ih=w_ih, batch=batch, size=size):
            with torch.no_grad():
                projected = input @ w_ih.t()
                h = c = input.new_zeros(batch, size)
                for x in projected:
                    if input.is_cuda:
                        torch.compiler.cudagraph_mark_step_begin()
                    h, c = (state.clone() for state in step(x, h, c))
                return h

        for _ in range(3):
            loop()
        clock = timing.clock_for(plumbing.device)
        seconds = sorted(clock.sample(loop, 1) for _ in range(10))[5]
        yield {
            "name": "single-step",
            "grid": "single-step",
            "batch": batch,
            "hidden_size": size,
            "steps": steps,
            "per_step": {"compiled": 1e6 * seconds / steps},
        }


# --- The whole -------------------------------------------------------------------------------------------------------


def save(out: Path, report: dict[str, Any]) -> None:
    """Write the raw results, whole or not at all."""
    report["rows"] = read_rows(out)
    partial = out / "gpu_check.json.part"
    partial.write_text(json.dumps(report, indent=1))
    partial.replace(out / "gpu_check.json")
    (out / "gpu_check.md").write_text(markdown(report))


def markdown(report: dict[str, Any]) -> str:
    """A short table: microseconds per step, and ratios above 1 where fastrnn is faster."""
    rows = [row for row in report["rows"] if "ratio" in row]
    environment = report["stages"].get("environment", {}).get("detail", {})
    lines = [
        f"{environment.get('device')}, driver {environment.get('driver', '-')}, torch {environment.get('torch')}, "
        f"cuDNN {environment.get('cudnn', '-')}, commit {environment.get('commit')}",
        "",
        "| case | cuDNN us/step | fastrnn | in a graph | ratio | graph | without projection | times the floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        step, graph = row["per_step"], row["graph_ratio"]
        lines.append(
            f"| {row['name']} {row['plan']} | {step['cudnn']:.2f} | {step['fastrnn']:.2f} "
            f"| {step.get('graph', float('nan')):.2f} | {row['ratio']:.2f} "
            f"| {'-' if graph is None else f'{graph:.2f}'} | {row['scan_ratio']:.2f} "
            f"| {step['fastrnn'] / row['floor_per_step']:.1f} |"
        )
    lines.append("")
    for key, what in (("ratio", "as called"), ("graph_ratio", "in a graph")):
        groups: dict[str, list[float]] = {}
        for row in rows:
            if row[key]:
                groups.setdefault(f"{row['plan']}, {row['cell']} {row['dtype']} {row['mode']}", []).append(row[key])
        lines += [f"geomean {what}: {name} {geomean(ratios):.2f} ({len(ratios)})" for name, ratios in groups.items()]
    for row in report["rows"]:
        if row["grid"] == "single-step":
            name = f"N{row['batch']} H{row['hidden_size']}"
            lines.append(
                f"a compiled step in a Python loop, LSTM bf16 {name}: {row['per_step']['compiled']:.1f} us/step"
            )
    return "\n".join([*lines, *gpu_tune.markdown(report["rows"])]) + "\n"


def run_stage(name: str, limit: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """One stage as a process; killed with all that it started when its time is over."""
    begin = time.monotonic()
    command = [sys.executable, __file__, "--stage", name, "--out", str(arguments.out), "--only", arguments.only]
    command += ["--seconds", f"{limit - CLOSING:.0f}", *(["--resume"] if arguments.resume else [])]
    detail = arguments.out / f"{name}.json"
    detail.unlink(missing_ok=True)
    with (arguments.out / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = {0: "passed"}.get(process.wait(limit), f"failed with status {process.returncode}")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = f"stopped after {limit:.0f} s"
    result: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - begin, 1)}
    if detail.exists():
        result["detail"] = json.loads(detail.read_text())
    print(f"{name}: {status}, {result['seconds']} s", flush=True)
    if status != "passed":
        result["tail"] = (arguments.out / f"{name}.log").read_text(errors="replace")[-3000:]
        print(result["tail"], flush=True)
    return result


def main() -> int:
    """Run the stages in order, within the time; the table comes last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stages", default=",".join(DEFAULT_STAGES), help=f"of {', '.join(STAGES)}, separated by commas"
    )
    parser.add_argument("--tune", action="store_true", help=f"the stages {', '.join(TUNE_STAGES)}")
    parser.add_argument("--only", default="*", help="cases of the benchmark, as a shell pattern of their names")
    parser.add_argument("--resume", action="store_true", help="skip the stages and rows that an earlier run finished")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out" / "gpu", help="folder of the results")
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds for everything")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.stage:
        # fp32 means fp32, for both
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        detail = globals()[arguments.stage](Plumbing(), arguments)
        (arguments.out / f"{arguments.stage}.json").write_text(json.dumps(detail))
        return 0
    wanted = list(TUNE_STAGES) if arguments.tune else arguments.stages.split(",")
    unknown = sorted(set(wanted) - set(STAGES))
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}: there are {', '.join(STAGES)}")
    if not torch.cuda.is_available():
        print("No GPU here: the stages run on the emulated one, to check this script. Its times mean nothing.")
    begin = time.monotonic()
    report: dict[str, Any] = {"stages": {}}
    earlier = arguments.out / "gpu_check.json"
    if not arguments.resume:
        (arguments.out / "rows.jsonl").unlink(missing_ok=True)
    if arguments.resume and earlier.exists():
        report = json.loads(earlier.read_text())
    for name in wanted:
        finished = report["stages"].get(name, {}).get("status") == "passed"
        if arguments.resume and finished and name not in ("environment", *MEASURING):
            continue
        left = arguments.total - (time.monotonic() - begin) - CLOSING
        if left < 5:
            report["stages"][name] = {"status": "no time left", "seconds": 0.0}
            continue
        if name != "build" and report["stages"].get("build", {}).get("status", "passed") != "passed":
            report["stages"][name] = {"status": "not run: the build failed", "seconds": 0.0}
            continue
        report["stages"][name] = run_stage(name, min(LIMITS.get(name, left), left), arguments)
        save(arguments.out, report)
    save(arguments.out, report)
    print(markdown(report))
    print(*(f"{name}: {stage['status']}" for name, stage in report["stages"].items()), sep="\n")
    return int(any(stage["status"] != "passed" for stage in report["stages"].values()))


if __name__ == "__main__":
    sys.exit(main())
