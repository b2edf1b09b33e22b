"""``python -m bench streaming``: one step at a time, by a session of fastrnn, by torch.nn and by ONNX Runtime."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import layers, report, timing
from bench.cases import CELLS, Case, select
from bench.peers import peer_inputs, peer_runner, recurrent_graph

# What a session's weights are kept in; the first is what the others are compared with.
WEIGHTS: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16, "int8": torch.int8}
# Largest difference from torch.nn that is accepted before timing, after some steps (see layers.TOLERANCES).
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.05, "int8": 0.1}
CHECKED_STEPS = 8


@dataclass
class StreamingRow:
    """One cell at one size: seconds a step of each implementation, and the ratios to a float32 session."""

    case: str
    cell: str
    seconds: dict[str, float]
    ratios: dict[str, float]  # time of the implementation over that of the session in float32
    rounds: int


def measure(case: Case, cell: str, *, onnxruntime: bool, budget: float) -> StreamingRow:
    """Time one step of every implementation in turn, on one thread; each carries its own state on."""
    problem = layers.make_problem(case, cell)
    # weights of its own: those of torch.nn's module would still lie in a cache, as nobody else's do
    module = layers.load_fastrnn().convert(copy.deepcopy(problem.reference))
    x = problem.input[0]
    with timing.threads(1), torch.inference_mode():
        functions = {"torch": _module_step(problem.reference, problem), "module": _module_step(module, problem)}
        for name, dtype in WEIGHTS.items():
            session = layers.load_fastrnn().StreamingSession(module, weight_dtype=dtype)
            _check(session, problem, name)
            functions[name] = _session_step(session, x)
        if onnxruntime:
            graph = recurrent_graph(problem.reference, 1, 1, list(peer_inputs(problem)), _outputs(cell))
            functions["onnxruntime"] = peer_runner("onnxruntime", graph, peer_inputs(problem))
        comparison = timing.compare(functions, budget=budget)
    return StreamingRow(
        case.name,
        cell,
        {name: one.minimum for name, one in comparison.timings.items()},
        {name: comparison.ratio_of_minima(name, "float32") for name in functions},
        comparison.rounds,
    )


def _outputs(cell: str) -> Sequence[str]:
    return ("Y_h", "Y_c") if cell == "lstm" else ("Y_h",)


def _module_step(module: Any, problem: layers.Problem) -> Callable[[], object]:
    state = [problem.hx]

    def step() -> object:
        output, state[0] = module(problem.input, state[0])
        return output

    return step


def _session_step(session: Any, x: torch.Tensor) -> Callable[[], object]:
    return lambda: session.step(x)


def _check(session: Any, problem: layers.Problem, name: str) -> None:
    """Some steps from the problem's initial state must agree with torch.nn's."""
    state = problem.hx
    session.state = state
    for _ in range(CHECKED_STEPS):
        expected, state = problem.reference(problem.input, state)
        found = session.step(problem.input[0])
        error = (found - expected[0]).abs().max().item()
        if not error <= TOLERANCES[name] * expected.abs().max().item():
            raise layers.DisagreementError(
                f"{problem.cell} {problem.case.name}: a session with weights in {name} differs by {error:.2g}"
            )


def run(patterns: list[str] | None, cells: Sequence[str], onnxruntime: bool, budget: float) -> list[StreamingRow]:
    """All rows: the ``stream-*`` cases unless others are named."""
    cases = select(patterns or ["stream-*"])
    return [measure(case, cell, onnxruntime=onnxruntime, budget=budget) for cell in cells for case in cases]


def geomeans(rows: Sequence[StreamingRow]) -> dict[str, dict[str, float]]:
    """By cell, and for each implementation, the geometric mean of the ratios to the session in float32."""
    result: dict[str, dict[str, float]] = {}
    for cell in CELLS:
        group = [row for row in rows if row.cell == cell]
        if group:
            result[cell] = {name: report.geomean(row.ratios[name] for row in group) for name in group[0].ratios}
    return result


def show(rows: Sequence[StreamingRow], console: Console) -> None:
    """Microseconds a step, and the geometric means of the ratios."""
    names = list(rows[0].seconds)
    table = Table(title="One step, 1 thread: microseconds")
    for name in ("cell", "case", *names, "torch / float32"):
        table.add_column(name, justify="left" if name in ("cell", "case") else "right", no_wrap=True)
    for row in rows:
        numbers = (f"{1e6 * row.seconds[name]:.4g}" for name in names)
        table.add_row(row.cell, row.case, *numbers, f"{row.ratios['torch']:.2f}")
    console.print(table)
    for cell, means in geomeans(rows).items():
        words = ", ".join(f"{name} {ratio:.2f}" for name, ratio in means.items() if name != "float32")
        console.print(f"{cell.upper():5} time over that of the session in float32, geomean: {words}")


def to_markdown(rows: Sequence[StreamingRow], info: dict[str, Any]) -> str:
    """The table as one reads it."""
    names = list(rows[0].seconds)
    lines = [
        "# Streaming: one step at a time",
        "",
        f"{info['cpu']}, {info['cpu_capability']}; torch {info['torch']}, fastrnn {info['fastrnn']} (commit "
        f"{info['commit']}), Python {info['python']}; {info['date']}. One thread; batch of one.",
        "",
        "Microseconds a step, the fastest sample of each, all timed in turn in one process. *module*: a call of "
        "fastrnn's module; *float32*, *bfloat16*, *int8*: a session with its weights kept so. ONNX Runtime is given "
        "the same state in every call.",
        "",
        f"| cell | case | {' | '.join(names)} | rounds |",
        f"|---|---|{'--:|' * (len(names) + 1)}",
    ]
    for row in rows:
        numbers = " | ".join(f"{1e6 * row.seconds[name]:.4g}" for name in names)
        lines.append(f"| {row.cell} | {row.case} | {numbers} | {row.rounds} |")
    lines += ["", "Time over that of the float32 session, geometric means:", ""]
    lines += [f"| cell | {' | '.join(names)} |", f"|---|{'--:|' * len(names)}"]
    for cell, means in geomeans(rows).items():
        lines.append(f"| {cell} | {' | '.join(f'{means[name]:.2f}' for name in names)} |")
    return "\n".join(lines) + "\n"


def to_json(rows: Sequence[StreamingRow], info: dict[str, Any]) -> str:
    """Everything measured; times are in seconds a step."""
    return json.dumps({"machine": info, "geomeans": geomeans(rows), "rows": [asdict(row) for row in rows]}, indent=1)
