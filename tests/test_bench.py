"""The benchmarks: pairing and ratios on a clock of our own, the table of cases, the reports, the language model."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")
sys.path.append(str(Path(__file__).resolve().parent.parent))  # the benchmarks are no part of the installed package

import torch
from rich.console import Console
from torch import nn

from bench import __main__ as command
from bench import cases, charlm, layers, report, table, timing

TINY = cases.Case("tiny", 3, 5, 4, 6, "a test")
TINY_VARIANTS = [
    TINY,
    cases.Case("tiny-stream", 1, 1, 4, 4, "a test", stateful=True),
    cases.Case("tiny-ragged", 3, 40, 4, 6, "a test", ragged=True),
    cases.Case("tiny-rl", 3, 40, 4, 6, "a test", resets=True, stateful=True),
    cases.Case("tiny-stack", 3, 40, 4, 6, "a test", layers=3),
]


def silent() -> Console:
    return Console(file=io.StringIO(), width=120)


class FakeClock:
    """A clock that only functions move on: each call costs its function's ``cost``, times a drift common to all."""

    def __init__(self) -> None:
        self.time, self.drift, self.samples = 0.0, 1.0, []

    def now(self) -> float:
        return self.time

    def sample(self, function, calls: int) -> float:
        start = self.time
        for _ in range(calls):
            function()
        self.samples.append((function, calls))
        return self.time - start

    def function(self, cost: float):
        def call() -> None:
            self.time += cost * self.drift
            self.drift *= 1.001  # a machine that becomes slower and slower

        return call


def test_functions_are_timed_in_turn():
    clock = FakeClock()
    functions = {"a": clock.function(0.3), "b": clock.function(0.2), "c": clock.function(0.1)}
    comparison = timing.compare(functions, budget=0.0, clock=clock)
    rounds = [function for function, _ in clock.samples[-3 * timing.MIN_ROUNDS :]]
    assert rounds == list(functions.values()) * timing.MIN_ROUNDS
    assert comparison.rounds == timing.MIN_ROUNDS
    assert all(len(t.seconds) == timing.MIN_ROUNDS for t in comparison.timings.values())


def test_ratios_do_not_drift():
    clock = FakeClock()
    comparison = timing.compare({"peer": clock.function(0.4), "ours": clock.function(0.1)}, budget=10.0, clock=clock)
    assert comparison.rounds > timing.MIN_ROUNDS
    seconds = comparison.timings["ours"].seconds
    assert seconds[-1] > 1.02 * seconds[0]
    assert comparison.median_ratio("peer", "ours") == pytest.approx(4, rel=5e-3)
    assert comparison.ratio_of_minima("peer", "ours") == pytest.approx(4, rel=5e-3)


def test_statistics_of_a_comparison():
    comparison = timing.Comparison({"peer": timing.Timing([4.0, 9.0, 6.0]), "ours": timing.Timing([2.0, 3.0, 1.0])})
    assert comparison.timings["peer"].minimum == 4 and comparison.timings["peer"].median == 6
    assert comparison.ratio_of_minima("peer", "ours") == 4
    assert comparison.median_ratio("peer", "ours") == 3


def test_short_calls_are_repeated_and_seconds_are_per_call():
    clock = FakeClock()
    comparison = timing.compare({"short": clock.function(1e-6)}, budget=0.01, clock=clock)
    _, calls = clock.samples[-1]
    assert calls * comparison.timings["short"].minimum >= timing.MIN_SAMPLE_SECONDS
    clock.drift = 1.0
    assert comparison.timings["short"].minimum < 1.0


def test_budget_and_limit_end_the_rounds():
    clock = FakeClock()
    few = timing.compare({"long": clock.function(1.0)}, budget=0.0, limit=3.0, clock=clock)
    assert few.rounds == timing.FEWEST_ROUNDS
    clock = FakeClock()
    assert timing.compare({"long": clock.function(1.0)}, budget=0.0, limit=0.5, clock=clock).rounds == 1
    clock = FakeClock()
    timing.compare({"a": clock.function(0.01), "b": clock.function(0.02)}, budget=3.0, clock=clock)
    assert 2.8 < clock.time < 3.2


def test_threads_are_set_and_restored():
    before = torch.get_num_threads()
    with timing.threads(1) as count:
        assert count == torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with timing.threads(0) as count:
        assert count == before


def test_clock_of_a_device():
    assert isinstance(timing.clock_for("cpu"), timing.CpuClock)
    assert isinstance(timing.clock_for("cuda:0"), timing.CudaClock)


def test_cases():
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names) == 17
    by_name = {case.name: case for case in cases.CASES}
    assert by_name["online-1024"].steps == 64
    assert [case.name for case in cases.CASES if case.resets] == ["rl-128", "rl-256"]
    ragged = by_name["ragged"]
    lengths = ragged.lengths()
    assert lengths[0] == 400 and lengths[-1] == 20 and (lengths.diff() < 0).all()
    assert lengths.sum().item() / (ragged.steps * ragged.batch) == pytest.approx(0.52, abs=0.01)
    reset = by_name["rl-256"].reset(torch.Generator().manual_seed(0))
    assert reset.shape == (128, 16) and reset.float().mean().item() == pytest.approx(0.03, abs=0.015)
    assert not TINY.reset(torch.Generator()).any()


@pytest.mark.parametrize("cell", cases.CELLS)
@pytest.mark.parametrize("case", [TINY, *cases.STACKS], ids=lambda case: case.name)
def test_weights_of_a_case(case, cell):
    reference = layers.make_problem(case, cell).reference
    matrices = [weight for weight in reference.parameters() if weight.dim() == 2]
    assert case.weights(cell) == sum(weight.numel() for weight in matrices)
    recurrent = sum(weight.numel() for name, weight in reference.named_parameters() if name.startswith("weight_hh"))
    assert case.weight_bytes(cell, "inference") == 4 * (case.weights(cell) + (case.steps - 1) * recurrent)


def test_select():
    assert [case.name for case in cases.select(["nlp", "stream-*"])] == [
        "stream-64",
        "stream-256",
        "stream-1024",
        "nlp",
    ]
    assert cases.select(None) == list(cases.CASES)
    assert [case.name for case in cases.select(["odd-1*"])] == ["odd-1", "odd-17"]  # only where they are asked for
    assert [case.name for case in cases.select(["stack-*"])] == [case.name for case in cases.STACKS]
    with pytest.raises(ValueError, match="no case matches 'speach'; the cases are stream-64"):
        cases.select(["speach"])


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("cell", cases.CELLS)
@pytest.mark.parametrize("case", TINY_VARIANTS, ids=lambda case: case.name)
def test_measure(case, cell, mode):
    row = layers.measure(case, cell, mode, budget=0.0)
    also = {
        "tiny-ragged": {"fastrnn-lengths", "fastrnn-padded"},
        "tiny-rl": {"torch-stepwise", "fastrnn-plain"},
    }
    others = also.get(case.name, set())
    assert set(row.seconds) == {"torch", "fastrnn"} | others
    assert set(row.peer_ratios) == others
    assert row.ratio == row.seconds["torch"]["min"] / row.seconds["fastrnn"]["min"] > 0
    assert row.rounds >= timing.MIN_ROUNDS


@pytest.mark.parametrize(
    "mode, threads, beside", [("inference", 1, True), ("training", 1, False), ("inference", 2, False)]
)
@pytest.mark.parametrize("stateful", [False, True])
def test_a_session_beside_a_row(mode, threads, beside, stateful):
    case = cases.Case("tiny", 3, 5, 3, 17, "a test", stateful=stateful)
    row = layers.measure(case, "lstm", mode, thread_count=threads, session=True, budget=0.0)
    assert ("fastrnn-session" in row.seconds) == ("fastrnn-session" in row.peer_ratios) == beside
    assert row.best_ratio == row.ratio  # it is no peer


def test_least_bytes_and_operations():
    case = cases.Case("three", 2, 3, 5, 7, "a test")
    once, each_step = 4 * 4 * 7 * (5 + 7), 4 * 4 * 7 * 7
    assert case.weight_bytes("lstm", "inference") == once + 2 * each_step
    assert case.weight_bytes("lstm", "training") == 2 * (once + 2 * each_step) + once
    assert case.flops("lstm", "inference") == 2 * 6 * 4 * 7 * (5 + 7)


@pytest.mark.parametrize("mode", cases.MODES)
def test_limits_are_measured_beside_a_row(mode, native):
    """A layer cannot be faster than the machine, and the rates are those of some machine."""
    case = cases.Case("some", 16, 8, 64, 64, "a test")
    row = layers.measure(case, "lstm", mode, thread_count=1, budget=0.1, against_limits=True)
    assert {"limit-multiply-add", "limit-load"} <= set(row.seconds)
    assert not any("limit" in name for name in row.peer_ratios)
    assert 0 < row.limit < 2  # beyond 1 by what the clock moved between samples
    assert row.bound in ("multiply-add", "load")
    assert 1e9 < row.flops_per_second < 1e12 and 1e8 < row.bytes_per_second < 1e12
    seconds = case.flops("lstm", mode) / row.flops_per_second, case.weight_bytes("lstm", mode) / row.bytes_per_second
    assert row.limit == pytest.approx(max(seconds) / row.seconds["fastrnn"]["min"])


def test_what_bounds_a_row(native):
    from bench.limits import Limits

    timings = {name: timing.Timing([1.0]) for name in ("limit-multiply-add", "limit-load")}
    one = Limits(cases.Case("one", 1, 1, 512, 512, "a test"), "lstm", "inference", 1, "default")
    one.amounts = [1e9, 1e9]
    assert one.seconds(timings) == (one.bytes / 1e9, "load")
    many = Limits(cases.Case("many", 64, 1, 512, 512, "a test"), "lstm", "inference", 1, "default")
    many.amounts = [1e9, 1e9]
    assert many.seconds(timings) == (many.flops / 1e9, "multiply-add")


@pytest.mark.parametrize("peer", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("cell", cases.CELLS)
@pytest.mark.parametrize("case", TINY_VARIANTS, ids=lambda case: case.name)
def test_peers_agree(case, cell, peer):
    pytest.importorskip("onnx")
    pytest.importorskip(peer)
    from bench.peers import peer_variant

    problem = layers.make_problem(case, cell)
    layers.check(problem, [layers.variants(problem)[0], peer_variant(peer, problem, threads=1)], "inference")


def test_a_graph_of_a_stack_has_no_states():
    pytest.importorskip("onnx")
    from bench.peers import recurrent_graph

    net = nn.LSTM(4, 6, 2)
    for given, outputs in (["X", "h0", "c0"], ["Y"]), (["X"], ["Y", "Y_h"]):
        with pytest.raises(ValueError, match="several layers"):
            recurrent_graph(net, 3, 5, given, outputs)
    with pytest.raises(ValueError, match="one direction"):
        recurrent_graph(nn.LSTM(4, 6, 2, bidirectional=True), 3, 5, ["X"])


def test_wrong_results_are_not_timed():
    problem = layers.make_problem(TINY, "gru")
    runs = layers.variants(problem)
    with torch.no_grad():
        runs[1].module.weight_hh_l0[0] += 0.5
    with pytest.raises(layers.DisagreementError, match="gru tiny inference: output of fastrnn differs from torch"):
        layers.check(problem, runs, "inference")
    with pytest.raises(layers.DisagreementError, match="gru tiny training"):
        layers.check(problem, runs, "training")


def test_tf32_has_float32_beside_it():
    case = cases.Case("small", 17, 5, 3, 65, "a test")
    row = layers.measure(case, "lstm", "training", dtype="tf32", budget=0.0)
    assert row.dtype == "tf32" and set(row.peer_ratios) == {"fastrnn-float32"}
    assert set(row.seconds) == {"torch", "fastrnn", "fastrnn-float32"}
    assert torch.backends.mkldnn.rnn.fp32_precision == "none"


def make_row(cell: str, case: str, mode: str, ratio: float) -> layers.Row:
    seconds = {"torch": {"min": 1e-3 * ratio, "median": 2e-3}, "fastrnn": {"min": 1e-3, "median": 1e-3}}
    return layers.Row(cell, case, "N1 T1", mode, "float32", 2, 5, seconds, ratio, ratio)


ROWS = [
    make_row("lstm", "nlp", "training", 0.5),
    make_row("lstm", "nlp", "inference", 2.0),
    make_row("gru", "series", "inference", 8.0),
    make_row("lstm", "stream-64", "inference", 4.0),
]
INFO = {
    **{"cpu": "A processor", "cores": 2, "threads": 2, "cpu_capability": "AVX2", "torch": "2.0", "fastrnn": "1.0"},
    **{"python": "3.12", "date": "2025-01-01T00:00:00", "commit": "abc", "build_info": {}},
}


def test_geomean_and_summary():
    assert report.geomean([0.5, 2.0]) == pytest.approx(1)
    assert math.isnan(report.geomean([]))
    summary = report.summary(ROWS)
    assert list(summary) == ["lstm", "gru"]
    assert summary["lstm"]["all"] == pytest.approx(4 ** (1 / 3))
    assert summary["lstm"]["inference"] == pytest.approx(8**0.5)
    assert summary["lstm"]["regressions"] == 1 and summary["gru"]["regressions"] == 0


def test_reports():
    document = json.loads(report.to_json(ROWS, INFO))
    assert document["machine"]["cpu"] == "A processor"
    assert len(document["rows"]) == 4 and document["rows"][0]["seconds"]["fastrnn"]["min"] == 1e-3
    text = report.to_markdown(ROWS, INFO)
    lines = [line for line in text.splitlines() if line.startswith(("| stream", "| nlp", "| series"))]
    assert [line.split(" | ")[0] for line in lines] == ["| stream-64", "| nlp", "| nlp", "| series"]
    assert sum("▼" in line for line in lines) == 1 and "**0.50 ▼**" in lines[2]
    tables = [line for line in text.splitlines() if line.startswith("| ") or line.startswith("|-")]
    assert {line.count("|") for line in tables} == {6, 12}


def test_summary_of_a_full_run():
    from bench import full

    def row(case, mode, threads, milliseconds, **others):
        seconds = {name: {"min": 1e-3 * ms} for name, ms in {"fastrnn": milliseconds, **others}.items()}
        ratios = {name: ms / milliseconds for name, ms in others.items() if name != "torch"}
        ratio = others["torch"] / milliseconds
        flops = 1e11 * threads
        return layers.Row(
            "lstm",
            case,
            "",
            mode,
            "float32",
            threads,
            5,
            seconds,
            ratio,
            ratio,
            ratios,
            0.5,
            "multiply-add",
            flops,
            1e9,
        )

    rows = [
        row("nlp", "inference", 1, 4.0, torch=8.0, onnxruntime=3.0, openvino=6.0),
        row("nlp", "inference", 2, 2.5, torch=8.0, onnxruntime=5.0, openvino=6.0),
        row("ragged", "training", 1, 1.3, **{"torch": 2.0, "fastrnn-padded": 2.0}),
    ]
    assert [each.best_ratio for each in rows] == pytest.approx([0.75, 2.0, 2.0 / 1.3])
    lines = full.summary(rows, {"LSTM": {"torch": 2048, "fastrnn": 1024}})
    assert "| LSTM | inference | float32 | 1 | 2.00 |  | 0.75 | nlp 0.75 |" in lines
    assert "| LSTM | nlp | inference | 50% | 50% | 100 | 1.60 (machine 2.00) |" in lines
    useful = cases.select(["ragged"])[0].lengths().sum().item() / (400 * 32)
    assert f"| LSTM | ragged | training | float32 | 1 | {0.65 / useful:.2f} |" in lines
    assert "| LSTM | 2 | 1 |" in lines
    _, _, table_of_rows = full.to_markdown(rows, {}, INFO).partition("## LSTM")
    assert [table_of_rows.count(f"| {case} |") for case in ("nlp", "ragged")] == [2, 1]


@pytest.mark.slow
def test_full_run_of_one_case(tmp_path, native):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    arguments = ["full", "--case", "stream-64", "--cell", "rnn", "--total", "1", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    document = json.loads((tmp_path / "full.json").read_text())
    inference = [row for row in document["rows"] if row["mode"] == "inference" and row["dtype"] == "float32"]
    assert inference and all(set(row["peer_ratios"]) == set(cases.PEERS) for row in inference)
    assert all(row["limit"] for row in inference)
    if sys.platform == "linux":
        assert all(peak > 1000 for peak in document["machine"]["memory_kib"]["LSTM"].values())
    assert "over the best peer" in (tmp_path / "full.md").read_text()


def test_shown_table_marks_what_is_slower():
    console = silent()
    table.show(ROWS, console)
    text = console.file.getvalue()
    assert "0.50 ▼" in text and "geomean 8.00" in text and "1 slower rows" in text


def test_readme_shows_the_committed_results():
    from bench import readme

    text = (readme.ROOT / "README.md").read_text(encoding="utf-8")
    path = readme.RESULTS.with_suffix(".md").relative_to(readme.ROOT)
    section = readme.section(json.loads(readme.RESULTS.read_text(encoding="utf-8")), path.as_posix())
    assert readme.rewrite(text, section) == text  # else: python -m bench.readme
    with pytest.raises(ValueError, match="the README lacks"):
        readme.rewrite("no marks", section)


def test_write(tmp_path):
    pytest.importorskip("matplotlib")
    paths = report.write(ROWS, INFO, None, tmp_path / "out")
    assert [path.name for path in paths] == ["results.json", "results.md", "ratios.png"]
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "CASES", (TINY,))
    file = tmp_path / "rows.json"
    arguments = ["--case", "tiny", "--cell", "rnn", "--mode", "inference", "--threads", "1", "--budget", "0"]
    assert command.main([*arguments, "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["case"], row["cell"], row["mode"], row["threads"]) == ("tiny", "rnn", "inference", 1)


def test_command_line_tells_mistakes_in_one_line(capsys, monkeypatch):
    assert command.main(["--case", "speach"]) == 2
    assert "no case matches 'speach'" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert command.main(["--case", "nlp", "--peer", "onnxruntime"]) == 2
    assert capsys.readouterr().out.strip() == "bench: the peer needs the package onnx: python -m pip install onnx"


def test_language_model_curves_agree():
    result = charlm.run(charlm.Settings.quick(), silent())
    assert result.updates == charlm.Settings.quick().updates == len(result.seconds["fastrnn"])
    assert result.losses["torch"][-1] < 0.85 * result.losses["torch"][0]
    assert len(result.sample) == charlm.Settings.quick().sample_length
    charlm.show(result, console := silent())
    assert "The curves agree" in console.file.getvalue()


class WrongBiasGradient(nn.LSTM):
    """Trains as torch's LSTM but for a gradient that is half of what it should be."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.bias_hh_l0.register_hook(lambda gradient: 0.5 * gradient * (torch.arange(len(gradient)) % 2))


def test_language_model_finds_a_wrong_gradient(monkeypatch):
    monkeypatch.setattr(charlm, "load_fastrnn", lambda: type("Wrong", (), {"LSTM": WrongBiasGradient}))
    with pytest.raises(charlm.CurvesError, match="the losses differ at update"):
        charlm.run(charlm.Settings.quick(), silent())


def test_check_curves():
    curve = [3.0 - 0.01 * update for update in range(100)]
    charlm.check_curves(curve, curve)
    late = [loss * (1.02 if update > 50 else 1) for update, loss in enumerate(curve)]
    charlm.check_curves(curve, late)
    with pytest.raises(charlm.CurvesError, match="averaged over the 20 updates"):
        charlm.check_curves(curve, [loss * (1.06 if update > 50 else 1) for update, loss in enumerate(curve)])
    with pytest.raises(charlm.CurvesError, match="at update 1"):
        charlm.check_curves(curve, [curve[0], curve[1] * 1.01, *curve[2:]])
    with pytest.raises(charlm.CurvesError, match="not finite"):
        charlm.check_curves(curve, [*curve[:-1], math.nan])


def test_batches_are_parallel_streams_of_the_text():
    settings = charlm.Settings(batch=2, steps=3)
    made = charlm.batches(torch.arange(20), settings)
    batch, first = next(made)
    assert first and batch.tolist() == [[0, 10], [1, 11], [2, 12], [3, 13]]
    batch, first = next(made)
    assert not first and batch[:, 0].tolist() == [3, 4, 5, 6]
    next(made)
    assert next(made)[1]


def test_streaming_rows():
    from bench import streaming

    case = cases.Case("tiny-stream", 1, 1, 4, 4, "a test", stateful=True)
    rows = [streaming.measure(case, cell, onnxruntime=False, budget=0.01) for cell in cases.CELLS]
    means = streaming.geomeans(rows)
    for row in rows:
        assert set(row.seconds) == {"torch", "module", *streaming.WEIGHTS}
        assert row.ratios["float32"] == means[row.cell]["float32"] == 1
    streaming.show(rows, silent())
    assert len(json.loads(streaming.to_json(rows, {"cpu": "none"}))["rows"]) == len(cases.CELLS)


def test_streaming_refuses_another_result():
    from bench import streaming

    problem = layers.make_problem(TINY_VARIANTS[1], "lstm")
    other = layers.make_problem(TINY_VARIANTS[1], "lstm", seed=1)
    session = layers.load_fastrnn().StreamingSession(other.reference)
    with pytest.raises(layers.DisagreementError, match="a session with weights in float32 differs"):
        streaming._check(session, problem, "float32")
