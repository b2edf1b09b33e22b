"""``python -m bench``: times selected rows of the layer table; ``python -m bench all``: what ``make bench`` runs."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

# Threads of torch's OpenMP spin for some 15 ms after a call, on cores that the next one in turn needs for threads of
# its own: another runtime's, or those of the machine's limits. Half a millisecond still joins one call to the next.
if {"full", "--peer", "--limits"} & set(sys.argv):
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from bench import cases

TOTALS = {"all": 270.0, "full": 1800.0}  # seconds
BACKENDS = ("auto", "native", "python")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times fastrnn and torch.nn in turn and prints the ratio: above 1, fastrnn is faster.",
        epilog=f"cases: {', '.join(case.name for case in cases.CASES)}; only where asked for: "
        + ", ".join(case.name for case in cases.ODD_CASES + cases.STACKS),
    )
    parser.add_argument(
        "what",
        nargs="?",
        choices=("layers", "charlm", "streaming", "all", "full"),
        default="layers",
        help="layers: the rows selected below (default); charlm: train the language model; streaming: one step at a "
        "time, by sessions; all: layers and charlm, within --total seconds, written to --out; full: every case, also "
        "at odd sizes, on one and on all threads, in float32 and bfloat16, against every peer and the machine's limits",
    )
    parser.add_argument("--cell", nargs="+", choices=cases.CELLS, default=list(cases.CELLS))
    parser.add_argument("--case", nargs="+", metavar="NAME", help="names or patterns such as 'stream-*' (default: all)")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "tf32", "bfloat16"), default=["float32"])
    parser.add_argument("--mode", nargs="+", choices=cases.MODES, default=list(cases.MODES))
    parser.add_argument("--threads", nargs="+", type=int, default=[0], help="thread counts; 0: all (default)")
    parser.add_argument("--backend", choices=BACKENDS, help="sets FASTRNN_BACKEND")
    parser.add_argument("--peer", nargs="+", choices=cases.PEERS, default=[], help="in inference")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for each row (default 1; at least 5 rounds)")
    parser.add_argument(
        "--total",
        type=float,
        help="seconds for all that 'all' (default {all:.0f}) or 'full' (default {full:.0f}) does".format(**TOTALS),
    )
    parser.add_argument("--limits", action="store_true", help="measure the machine's limits beside float32 rows")
    parser.add_argument(
        "--session", action="store_true", help="a session beside the module, in inference on one thread"
    )
    parser.add_argument("--quick", action="store_true", help="a language model of a few seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE as well")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where 'all' and 'full' write (default bench/out), and streaming if given",
    )
    options = parser.parse_args(arguments)
    options.total = options.total or TOTALS.get(options.what)
    return options


def run(options: argparse.Namespace, console: Console) -> None:
    """Do what the command line asks."""
    # Late, so that --help needs no torch, and the backend is chosen before fastrnn is imported.
    from bench import charlm, report, table

    begin = time.perf_counter()
    info = report.machine()
    console.print(f"{info['cpu']}, {info['cores']} cores, {info['threads']} threads; torch {info['torch']}")
    console.print(f"fastrnn {info['fastrnn']}, commit {info['commit']}: {info['build_info']}", style="dim")

    if (info["load"] or 0.0) > 0.5:
        console.print(
            f"This machine is busy with other work (load {info['load']:.1f}): threads that wait for each other are "
            "held up by it, and ratios are unreliable.",
            style="yellow",
        )

    if options.what == "streaming":
        return run_streaming(options, console, info)
    if options.what == "full":
        from bench import full

        written = full.run(options.total, options.out or report.OUT, options.case, options.cell, console, info)
        return console.print("Written: " + ", ".join(str(path) for path in written))

    language_model = None
    if options.what in ("all", "charlm"):
        settings = charlm.Settings.quick() if options.quick else charlm.Settings()
        language_model = charlm.run(settings, console)
        charlm.show(language_model, console)

    rows: list[table.Row] = []
    if options.what in ("all", "layers"):
        selection = table.Selection(
            cases.select(options.case),
            options.cell,
            options.mode,
            options.dtype,
            options.threads,
            options.peer,
            options.limits,
            options.session,
        )
        total = options.total - (time.perf_counter() - begin) if options.what == "all" else None
        rows = table.measure_table(selection, console, budget=options.budget, total=total)
        table.show(rows, console)

    if options.json:
        options.json.write_text(report.to_json(rows, info, language_model), encoding="utf-8")
    if options.what == "all":
        written = report.write(rows, info, language_model, options.out or report.OUT)
        console.print("Written: " + ", ".join(str(path) for path in written))


def run_streaming(options: argparse.Namespace, console: Console, info: dict[str, Any]) -> None:
    """The steps of sessions against those of modules and, with --peer, of ONNX Runtime."""
    from bench import streaming

    rows = streaming.run(options.case, options.cell, "onnxruntime" in options.peer, options.budget)
    streaming.show(rows, console)
    if options.json:
        options.json.write_text(streaming.to_json(rows, info), encoding="utf-8")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "streaming.md").write_text(streaming.to_markdown(rows, info), encoding="utf-8")
        console.print(f"Written: {options.out / 'streaming.md'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, with what the user can mend (a missing package, wrong results) told in one line."""
    options = parse(arguments)
    if options.backend:
        os.environ["FASTRNN_BACKEND"] = options.backend
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width of its own
        console = Console(width=110)
    try:
        cases.select(options.case)
        if peers := cases.PEERS if options.what == "full" else options.peer:
            from bench.peers import require_peer

            for peer in peers:
                require_peer(peer)
    except (ValueError, RuntimeError) as error:
        console.print(f"bench: {error}", style="bold red", markup=False)
        return 2
    from bench.layers import DisagreementError

    try:
        run(options, console)
    except DisagreementError as error:
        console.print(f"bench: {error}", style="bold red", markup=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
