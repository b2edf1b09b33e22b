"""bench/gpu_check.py without a GPU: its plumbing, on the emulated one."""

import json
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import emulation
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import gpu_check  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the script itself is run")


def check(out, *arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu_check.py"), "--out", str(out), *arguments],
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(bool(emulation.missing()), reason=emulation.missing() or "-")
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

    again = check(tmp_path, "--stages", "environment,build,benchmark,persistent", "--only", "tiny/*", "--resume")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "build:" not in again.stdout.splitlines()[1]  # it had passed
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    plans = [row["plan"] for row in report["rows"]]
    assert plans == ["stepwise"] * 3 + ["auto"] * 2
    assert report["rows"][0] == row  # not measured twice
    assert "| tiny/lstm-bf16-N3-T4-I5-H7-forward stepwise |" in again.stdout


def test_what_was_measured_survives(tmp_path):
    """A stage without time, or that fails, is said to be so, and takes nothing from the others."""
    gpu_check.append_row(tmp_path, {"name": "an earlier row", "grid": "x"})
    done = check(tmp_path, "--stages", "environment,test", "--total", "1", "--resume")
    assert done.returncode == 1
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {stage["status"] for stage in report["stages"].values()} == {"no time left"}
    assert [row["name"] for row in report["rows"]] == ["an earlier row"]


def test_a_stage_that_hangs_is_stopped(tmp_path, monkeypatch):
    arguments = gpu_check.argparse.Namespace(out=tmp_path, only="*", resume=False)
    script = tmp_path / "hang.py"
    script.write_text("import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '600'])")
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    result = gpu_check.run_stage("test", 3.0, arguments)
    assert result["status"] == "stopped after 3 s"
    assert result["tail"] == "begun\n"


def test_unknown_stage(tmp_path):
    done = check(tmp_path, "--stages", "tests")
    assert done.returncode == 2
    assert "no stage tests: there are environment, build, test, sanitize, benchmark, persistent" in done.stderr


def test_cases():
    """No row twice, the telling ones first, and every grid and dtype there."""
    cases = gpu_check.cases()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert names[0] == "flashrnn/lstm-bf16-N16-T1024-I768-H768-forward"
    for pattern in ("flashrnn/*", "haste/*", "deepbench/*", "*/gru-bf16-*-training", "*/rnn-fp16-*"):
        assert any(fnmatchcase(name, pattern) for name in names), pattern


def test_floor():
    """Matrix units or h, whichever takes longer, and one exchange."""
    case = gpu_check.Case("x", "lstm", "bf16", 16, 1024, 768, 768, "forward")
    assert gpu_check.floor_microseconds(case) == pytest.approx(0.3 + 2 * 16 * 768 / (64 * 1.9e3), rel=1e-6)
    wide = gpu_check.Case("x", "lstm", "fp32", 128, 1, 4096, 4096, "forward")
    assert gpu_check.floor_microseconds(wide) == pytest.approx(0.3 + 2 * 4 * 4096**2 * 128 / 60e6, rel=1e-6)
