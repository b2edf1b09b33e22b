"""bench/gpu_check.py without a GPU: its plumbing, on the emulated one."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from fnmatch import fnmatchcase
from pathlib import Path

import emulation
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import gpu_cases, gpu_check, gpu_measure, gpu_tune  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the script itself is run")
needs_emulation = pytest.mark.skipif(bool(emulation.missing()), reason=emulation.missing() or "-")


def check(out, *arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu_check.py"), "--out", str(out), *arguments],
        capture_output=True,
        text=True,
    )


@needs_emulation
@pytest.mark.slow
def test_stages_and_resume(tmp_path):
    """Rows are on disk as they are measured, the rest is measured later, the table comes last."""
    first = check(tmp_path, "--stages", "environment,build,benchmark", "--only", "tiny/gru*")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "No GPU here" in first.stdout
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["tiny/gru-fp32-N3-T4-I5-H7-training"]
    assert report["stages"]["environment"]["detail"]["torch"] == torch.__version__
    row = report["rows"][0]
    assert set(row["microseconds"]) == {"cudnn", "fastrnn", "projection"}
    assert 0 < row["difference"] < 1e-5 or row["difference"] == 0

    again = check(tmp_path, "--stages", "environment,build,benchmark,stepwise", "--only", "tiny/*", "--resume")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "build:" not in again.stdout.splitlines()[1]  # it had passed
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    plans = [row["plan"] for row in report["rows"]]
    assert plans == ["auto"] * 3 + ["stepwise"] * 3
    assert report["rows"][0] == row  # not measured twice
    assert "| tiny/lstm-bf16-N3-T4-I5-H7-forward stepwise |" in again.stdout


def test_what_was_measured_survives(tmp_path):
    """A stage without time, or that fails, is said to be so, and takes nothing from the others."""
    gpu_measure.append_row(tmp_path, {"name": "an earlier row", "grid": "x"})
    done = check(tmp_path, "--stages", "environment,test", "--total", "1", "--resume")
    assert done.returncode == 1
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {stage["status"] for stage in report["stages"].values()} == {"no time left"}
    assert [row["name"] for row in report["rows"]] == ["an earlier row"]


def test_a_stage_that_hangs_is_stopped(tmp_path, monkeypatch):
    arguments = Namespace(out=tmp_path, only="*", resume=False)
    script = tmp_path / "hang.py"
    script.write_text("import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '600'])")
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    result = gpu_check.run_stage("test", 3.0, arguments)
    assert result["status"] == "stopped after 3 s"
    assert result["tail"] == "begun\n"


def test_unknown_stage(tmp_path):
    done = check(tmp_path, "--stages", "tests")
    assert done.returncode == 2
    assert "no stage tests: there are environment, build, test, sanitize, benchmark, tune, stepwise, cpu" in done.stderr


TUNED = [f"tune/lstm-bf16-N3-T4-I5-H7-{scan}" for scan in gpu_tune.SCANS]


@pytest.fixture
def plans(native):
    native.set_tuned_plans("")
    yield native
    native.set_tuned_plans("")


def chosen(native, scan):
    return native.cuda_plan("lstm", 4, 3, 7, training=scan != "inference", backward=scan == "backward")


@pytest.mark.slow
@needs_emulation
def test_tune(tmp_path, plans):
    """The sweep writes what the plan reads; run again, it measures nothing twice and writes the table anew."""
    done = check(tmp_path, "--tune", "--only", "tiny/lstm*")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert list(report["stages"]) == ["environment", "build", "tune"]
    assert [row["name"] for row in report["rows"]] == TUNED
    for row in report["rows"]:
        case = gpu_cases.Case(**{name: row[name] for name in gpu_cases.Case.__dataclass_fields__})
        assert set(row["per_step"]) == set(gpu_tune.alternatives(case, "h200"))
        assert min(row["per_step"].values()) > 0 and row["rounds"] >= 1 and not row["failed"]
        assert row["first"] == "persistent:0"
        assert f"| {row['name']} | " in done.stdout
    text = (tmp_path / "cuda_plans.csv").read_text()
    assert text.startswith("# none: emulated, times mean nothing, commit ")
    assert text.splitlines()[1] == plans.TUNED_HEADER
    assert [line.split(",")[4] for line in text.splitlines()[2:]] == list(gpu_tune.SCANS)

    # on an emulated GPU the times choose at random: say what was the best
    best = dict(zip(TUNED, ("persistent:2", "stepwise", "persistent:1"), strict=True))
    rows = [json.dumps(row | {"best": best[row["name"]]}) for row in report["rows"]]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    again = check(tmp_path, "--tune", "--only", "tiny/lstm*", "--resume")
    assert again.returncode == 0, again.stdout + again.stderr
    assert (tmp_path / "rows.jsonl").read_text().splitlines() == rows
    text = (tmp_path / "cuda_plans.csv").read_text()
    listed = [plans.cuda_plans("lstm", 4, 3, 7, training=t, backward=b) for t, b in ((0, 0), (1, 0), (1, 1))]
    for scan, plan in (("inference", listed[0][2]), ("backward", listed[2][1])):
        choice = ",".join(str(plan[name]) for name in gpu_tune.CHOICE)
        assert f"90,132,lstm,2,{scan},3,7,1,{choice}\n" in text
    assert "90,132,lstm,2,training,3,7,1,stepwise,,,,\n" in text
    assert [chosen(plans, scan) for scan in gpu_tune.SCANS] == [scan[0] for scan in listed]
    plans.set_tuned_plans(text)
    assert [chosen(plans, scan) for scan in gpu_tune.SCANS] == [listed[0][2], listed[1][-1], listed[2][1]]
    script = "import fastrnn; print(fastrnn._C.cuda_plan('lstm', 4, 3, 7) == fastrnn._C.cuda_plans('lstm', 4, 3, 7)[2])"
    for file, found in ((tmp_path / "cuda_plans.csv", "True\n"), ("", "False\n")):
        environment = {**os.environ, "FASTRNN_CUDA_TUNED": str(file)}
        assert subprocess.check_output([sys.executable, "-c", script], env=environment, text=True) == found


@needs_emulation
def test_tune_excludes_what_fails(tmp_path, plans, monkeypatch):
    """A wrong gradient and an error are on record, out of the race, and not tried again."""
    tried = []

    def faulty(wish, function):
        def wished():
            tried.append(wish)
            os.environ[gpu_measure.PLAN] = wish
            if wish == "persistent:1":
                raise RuntimeError("no room for a cluster\nmore")
            results = function()
            if wish == "persistent:0":
                results[1] = results[1] * 1.2
            return results

        return wished

    monkeypatch.setenv(gpu_measure.PLAN, "auto")  # what the stage leaves behind is taken back
    monkeypatch.setattr(gpu_tune, "under", faulty)
    arguments = Namespace(out=tmp_path, only="tiny/lstm*", seconds=100.0)
    plumbing = gpu_measure.Plumbing()
    monkeypatch.setattr(gpu_tune, "SCANS", ("backward",))
    assert gpu_tune.tune(plumbing, arguments) == {"rows": 1, "of": 1}
    *failures, row = gpu_measure.read_rows(tmp_path)
    assert [(failure["name"], failure["wish"]) for failure in failures] == [
        (TUNED[2], "persistent:0"),
        (TUNED[2], "persistent:1"),
    ]
    assert "off by 0.2 of the largest" in failures[0]["error"] and failures[1]["error"] == "no room for a cluster"
    assert list(row["failed"]) == ["persistent:0", "persistent:1"]
    assert {"stepwise", "persistent:2"} <= set(row["per_step"]) and row["best"] in row["per_step"]
    assert not set(row["per_step"]) & set(row["failed"])
    assert row["gain"] is None
    assert "| which failed |" in gpu_tune.markdown([row])[-1]
    assert "failed: C1 N8 R2; failed: C1 N8 R4" in gpu_tune.markdown([row])[-1]
    assert tried.count("persistent:1") == 1

    tried.clear()  # the process has died before the scan's row was written
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{line}\n" for line in file.read_text().splitlines()[:-1]))
    gpu_tune.tune(plumbing, arguments)
    assert set(tried) == set(row["per_step"])
    assert len(gpu_measure.read_rows(tmp_path)) == 3


@needs_emulation
def test_tune_outlives_a_lost_gpu(tmp_path, plans, monkeypatch):
    """After an assertion in a kernel a new process goes on, in the time that is left, with the failure on record."""

    class Replaced(BaseException):
        pass

    def execv(program, command):
        raise Replaced(program, command)

    def faulty(wish, function):
        def wished():
            os.environ[gpu_measure.PLAN] = wish
            if wish == "persistent:0":
                raise RuntimeError("CUDA error: device-side assert triggered")
            return function()

        return wished

    monkeypatch.setenv(gpu_measure.PLAN, "auto")
    monkeypatch.setattr(gpu_tune, "under", faulty)
    monkeypatch.setattr(gpu_measure.Plumbing, "lost", lambda self: True)
    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--stage", "tune", "--seconds", "100"])
    with pytest.raises(Replaced) as caught:
        gpu_tune.tune(gpu_measure.Plumbing(), Namespace(out=tmp_path, only="tiny/lstm*", seconds=100.0))
    program, (again, *command, seconds) = caught.value.args
    assert program == again == sys.executable
    assert command == ["gpu_check.py", "--stage", "tune", "--seconds", "100", "--seconds"]
    assert 50 < float(seconds) <= 100
    assert [row["wish"] for row in gpu_measure.read_rows(tmp_path)] == ["persistent:0"]


def test_scans():
    """Each scan once, however many dtypes, modes and lengths the grids have of it; never many steps."""
    scans = gpu_tune.scans(gpu_cases.cases())
    names = [case.name for case in scans]
    keys = [
        (case.cell, case.batch, case.hidden_size, gpu_cases.DTYPES[case.dtype].itemsize, case.mode) for case in scans
    ]
    assert len(set(keys)) == len(keys)
    assert names[:3] == [f"tune/lstm-bf16-N16-T128-I768-H768-{scan}" for scan in gpu_tune.SCANS]
    assert max(case.steps for case in scans) == gpu_tune.STEPS and min(case.steps for case in scans) == 25
    wanted = {
        (case.cell, case.batch, case.hidden_size, gpu_cases.DTYPES[case.dtype].itemsize) for case in gpu_cases.cases()
    }
    assert {key[:4] for key in keys} == wanted


def test_alternatives(native):
    """The nearest by the model, each under the number that the plan gives it."""
    case = gpu_cases.Case("tune", "lstm", "bf16", 16, 128, 256, 256, "training")
    listed = native.cuda_plans("lstm", 128, 16, 256, training=True)
    found = gpu_tune.alternatives(case, "h200")
    assert list(found) == ["stepwise", *(f"persistent:{k}" for k in range(gpu_tune.MOST))]
    assert [found[f"persistent:{k}"] for k in range(gpu_tune.MOST)] == listed[: gpu_tune.MOST]
    assert found["stepwise"]["tier"] == "stepwise"
    assert (
        found[f"persistent:{gpu_tune.MOST - 1}"]["microseconds"]
        <= gpu_tune.WITHIN * found["persistent:0"]["microseconds"]
    )
    few = gpu_tune.alternatives(gpu_cases.Case("tune", "lstm", "bf16", 16, 128, 2048, 2048, "training"), "h200")
    assert 1 < len(few) <= gpu_tune.MOST
    slow = native.cuda_plans("lstm", 128, 16, 2048, training=True)[len(few) - 1]
    assert slow["tier"] == "stepwise" or slow["microseconds"] > gpu_tune.WITHIN * few["persistent:0"]["microseconds"]


def test_cases():
    """No row twice, the telling ones first, and every grid and dtype there."""
    cases = gpu_cases.cases()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert names[0] == "flashrnn/lstm-bf16-N16-T1024-I768-H768-forward"
    for pattern in ("flashrnn/*", "haste/*", "deepbench/*", "*/gru-bf16-*-training", "*/rnn-fp16-*"):
        assert any(fnmatchcase(name, pattern) for name in names), pattern


def test_floor():
    """Matrix units or h, whichever takes longer, and one exchange."""
    case = gpu_cases.Case("x", "lstm", "bf16", 16, 1024, 768, 768, "forward")
    assert gpu_cases.floor_microseconds(case) == pytest.approx(0.3 + 2 * 16 * 768 / (64 * 1.9e3), rel=1e-6)
    wide = gpu_cases.Case("x", "lstm", "fp32", 128, 1, 4096, 4096, "forward")
    assert gpu_cases.floor_microseconds(wide) == pytest.approx(0.3 + 2 * 4 * 4096**2 * 128 / 60e6, rel=1e-6)
