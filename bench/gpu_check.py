"""Everything that only a GPU can tell, in one command: build, tests, sanitizers, and the benchmark against cuDNN.

    python bench/gpu_check.py                    # all stages, 9 minutes at the most
    python bench/gpu_check.py --resume           # what an earlier run has not finished
    python bench/gpu_check.py --stages benchmark --only 'flashrnn/*'

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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # run as a script, and in need of the tests' emulated GPU

import torch
from torch import nn

from bench import timing
from bench.cases import GATES
from bench.layers import CLASSES, DisagreementError, load_fastrnn
from bench.report import commit, geomean

STAGES = ("environment", "build", "test", "sanitize", "benchmark", "persistent")
# Seconds; the two benchmarks get what is left, the first of them this part of it.
LIMITS = {"environment": 30.0, "build": 210.0, "test": 120.0, "sanitize": 60.0}
BENCHMARK_SHARE = 0.6
TOTAL = 525.0
CLOSING = 10.0  # kept for the table
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Largest difference to cuDNN, relative to the largest output: to refuse to time wrong work. Accuracy is the tests' job.
TOLERANCES = {"bf16": 0.05, "fp16": 0.01, "fp32": 1e-3}


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


# --- The stages; each runs as a process ------------------------------------------------------------------------------


class Plumbing:
    """Where the stages run: on the GPU, or on the emulated one."""

    def __init__(self) -> None:
        self.gpu = torch.cuda.is_available()
        self.device = "cuda" if self.gpu else "cpu"

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


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"


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
    """Every case with the stepwise kernels, which take all of them."""
    result = _measure_all(plumbing, arguments, "stepwise", lambda case: True)
    if arguments.only == "*" and "single-step" not in {row["name"] for row in read_rows(arguments.out)}:
        for row in single_steps(plumbing):
            append_row(arguments.out, row)
    return result


def persistent(plumbing: Plumbing, arguments: argparse.Namespace) -> dict[str, Any]:
    """The 16-bit cases once more, by the plan; a stage apart, for a kernel that stops ends a process's use of a GPU."""
    return _measure_all(plumbing, arguments, "auto", lambda case: case.dtype != "fp32")


def _measure_all(
    plumbing: Plumbing, arguments: argparse.Namespace, plan: str, wanted: Callable[[Case], bool]
) -> dict[str, Any]:
    """Ours and torch.nn's in turn; one line of JSON a row, written at once."""
    os.environ["FASTRNN_CUDA_PLAN"] = plan
    chosen = [case for case in (cases() if plumbing.gpu else tiny_cases()) if fnmatchcase(case.name, arguments.only)]
    chosen = [case for case in chosen if wanted(case)]
    done = {row["name"] for row in read_rows(arguments.out) if row.get("plan") == plan}
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, for both
    end = time.monotonic() + arguments.seconds
    with _place(plumbing):
        for case in chosen:
            if case.name in done or time.monotonic() > end:
                continue
            try:
                row = measure(case, plumbing)
            except (torch.cuda.OutOfMemoryError, DisagreementError) as error:
                row = {"error": str(error).splitlines()[0]}
            append_row(arguments.out, {"name": case.name, "plan": plan, **asdict(case), **row})
            print(case.name, row.get("ratio", row.get("error")), flush=True)
    return {"rows": sum(row.get("plan") == plan for row in read_rows(arguments.out)), "of": len(chosen)}


def _place(plumbing: Plumbing) -> Any:
    if plumbing.gpu:
        return torch.cuda.device(0)
    import emulation

    return emulation.emulated_ops()


def measure(case: Case, plumbing: Plumbing) -> dict[str, Any]:
    """Microseconds of one call: ours, torch.nn's, ours from a graph, and of the input projection alone."""
    fastrnn, dtype = load_fastrnn(), DTYPES[case.dtype]
    torch.manual_seed(0)
    theirs = getattr(nn, CLASSES[case.cell])(case.input_size, case.hidden_size).to(plumbing.device, dtype)
    theirs.flatten_parameters()
    ours = getattr(fastrnn, CLASSES[case.cell])(case.input_size, case.hidden_size).to(plumbing.device, dtype)
    ours.load_state_dict(theirs.state_dict())
    input = torch.randn(case.steps, case.batch, case.input_size, device=plumbing.device, dtype=dtype)
    w_ih = theirs.weight_ih_l0.detach()
    with torch.no_grad():
        expected, found = theirs(input)[0].float(), ours(input)[0].float()
        error = ((found - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCES[case.dtype]:
        raise DisagreementError(f"{case.name}: off by {error:.3g} of the largest output")

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
    comparison = timing.compare(
        functions, budget=0.8, clock=timing.clock_for(plumbing.device), limit=2.0, max_rounds=100, min_sample=2e-4
    )
    micro = {name: 1e6 * one.median for name, one in comparison.timings.items()}
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


def read_rows(out: Path) -> list[dict[str, Any]]:
    """The rows measured so far."""
    file = out / "rows.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def append_row(out: Path, row: dict[str, Any]) -> None:
    """Add a row to those on disk."""
    with (out / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


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
    return "\n".join(lines) + "\n"


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
    parser.add_argument("--stages", default=",".join(STAGES), help=f"of {', '.join(STAGES)}, separated by commas")
    parser.add_argument("--only", default="*", help="cases of the benchmark, as a shell pattern of their names")
    parser.add_argument("--resume", action="store_true", help="skip the stages and rows that an earlier run finished")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out" / "gpu", help="folder of the results")
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds for everything")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.stage:
        detail = globals()[arguments.stage](Plumbing(), arguments)
        (arguments.out / f"{arguments.stage}.json").write_text(json.dumps(detail))
        return 0
    wanted = arguments.stages.split(",")
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
        if arguments.resume and finished and name not in ("environment", "benchmark", "persistent"):
            continue
        left = arguments.total - (time.monotonic() - begin) - CLOSING
        if left < 5:
            report["stages"][name] = {"status": "no time left", "seconds": 0.0}
            continue
        if name != "build" and report["stages"].get("build", {}).get("status", "passed") != "passed":
            report["stages"][name] = {"status": "not run: the build failed", "seconds": 0.0}
            continue
        share = BENCHMARK_SHARE * left if name == "benchmark" and "persistent" in wanted else left
        report["stages"][name] = run_stage(name, min(LIMITS.get(name, share), left), arguments)
        save(arguments.out, report)
    save(arguments.out, report)
    print(markdown(report))
    print(*(f"{name}: {stage['status']}" for name, stage in report["stages"].items()), sep="\n")
    return int(any(stage["status"] != "passed" for stage in report["stages"].values()))


if __name__ == "__main__":
    sys.exit(main())
