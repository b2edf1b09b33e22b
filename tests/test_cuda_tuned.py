"""The table of tuned CUDA plans: where it is read, and that an op runs what it says. Its rows are tested in
cpp/plan_cuda_test.cpp, how they are measured in test_gpu_check.py.
"""

import os
import subprocess
import sys

import emulation
import pytest
import torch
from cases import Case, data, module
from test_cuda_persistent import Place

import fastrnn
from fastrnn import _tuned

LSTM = Case("lstm", steps=9, batch=3, hidden=20, dtype=torch.bfloat16)
DEVICE = "90,132"  # an H200, as which the emulator gives itself out


@pytest.fixture
def plans(native):
    """The plan of the native library, its table empty before and after."""
    native.set_tuned_plans("")
    yield native
    native.set_tuned_plans("")


@pytest.fixture
def emulated():
    if emulation.missing():
        pytest.skip(emulation.missing())
    yield emulation.library()
    emulation.library().set_tuned_plans("")


def table(native, *rows):
    return "\n".join([native.TUNED_HEADER, *rows])


def row(scan, choice, cell="lstm", batch=3, hidden=20):
    return f"{DEVICE},{cell},2,{scan},{batch},{hidden},1,{choice}"


def alternatives(native, **which):
    return native.cuda_plans("lstm", 9, 3, 20, **which)


def as_row(plan):
    return ",".join(str(plan[name]) for name in ("tier", "exchange", "cluster", "rows", "row_tiles"))


def test_plan_takes_the_rows(plans):
    """Each scan its own, the others by the model; a new table replaces the old one, a wrong one nothing."""
    best, other = alternatives(plans)[0], alternatives(plans)[2]
    assert plans.cuda_plan("lstm", 9, 3, 20) == best != other
    plans.set_tuned_plans(table(plans, row("inference", as_row(other)), row("backward", "stepwise,,,,")))
    assert plans.cuda_plan("lstm", 9, 3, 20) == other
    assert plans.cuda_plan("lstm", 100, 3, 20) == plans.cuda_plans("lstm", 100, 3, 20)[2]
    assert plans.cuda_plan("lstm", 9, 3, 20, wish="persistent") == best
    assert plans.cuda_plan("lstm", 9, 3, 20, training=True) == alternatives(plans, training=True)[0]
    assert plans.cuda_plan("lstm", 9, 3, 20, training=True, backward=True)["tier"] == "stepwise"
    with pytest.raises(ValueError, match="line 2: scan should be one of inference, training, backward, got 'sideways'"):
        plans.set_tuned_plans(table(plans, row("sideways", as_row(other))))
    assert plans.cuda_plan("lstm", 9, 3, 20) == other
    plans.set_tuned_plans(table(plans))
    assert plans.cuda_plan("lstm", 9, 3, 20) == best


def test_op_runs_what_the_table_says(plans, emulated, monkeypatch):
    """Launches tell: a step each, or packing and scan; forward and backward have rows of their own."""
    steps = LSTM.steps

    def launches(wish, *rows):
        monkeypatch.setenv("FASTRNN_CUDA_PLAN", wish)
        emulated.set_tuned_plans(table(plans, *rows))
        found = []
        with emulation.emulated_ops() as calls, fastrnn.backend("native"):
            for training in (False, True):
                net, (input, hx) = module(LSTM), data(LSTM)
                with torch.set_grad_enabled(training):
                    here = Place("cpu", calls)
                    output = net(input, hx)[0]
                    found.append(here.launches_per_call())
                if training:
                    calls.clear()
                    here = Place("cpu", calls)
                    output.sum().backward()
                    found.append(here.launches_per_call())
                calls.clear()
        return found

    stepwise = launches("stepwise")
    assert min(stepwise) >= steps
    assert launches("auto") == [2, 2, 2]
    for index, scan in enumerate(("inference", "training", "backward")):
        expected = [stepwise[index] if i == index else 2 for i in range(3)]
        assert launches("auto", row(scan, "stepwise,,,,")) == expected, scan
        assert launches("auto", row(scan, "cluster,async,16,8,2")) == [2, 2, 2], "a stale row"
    assert launches("stepwise", row("inference", "block,block,1,8,2")) == stepwise, "only auto asks the table"


def test_results_are_the_same_with_any_row(plans, emulated, monkeypatch):
    monkeypatch.setenv("FASTRNN_CUDA_PLAN", "auto")
    outputs = []
    for plan in alternatives(plans)[:-1]:
        emulated.set_tuned_plans(table(plans, row("inference", as_row(plan))))
        with emulation.emulated_ops(), fastrnn.backend("native"), torch.no_grad():
            outputs.append(module(LSTM)(*data(LSTM))[0])
    assert len(outputs) > 3
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("backward", [False, True])
def test_no_room_for_a_cluster(plans, emulated, backward, monkeypatch):
    """The device has the last word: a plan of its own goes step by step, one asked for by its number is an error."""
    case = Case("lstm", steps=3, batch=3, hidden=130, dtype=torch.bfloat16)
    listed = plans.cuda_plans("lstm", 3, 3, 130, training=True, backward=backward)
    index = next(k for k, plan in enumerate(listed) if plan["cluster"] > 2)
    monkeypatch.setenv("CUSIM_MAX_CLUSTER", "2")
    emulated.set_tuned_plans(
        table(plans, row("backward" if backward else "training", as_row(listed[index]), hidden=case.hidden))
    )

    def run(wish):
        monkeypatch.setenv("FASTRNN_CUDA_PLAN", "stepwise" if backward else wish)
        with emulation.emulated_ops() as calls, fastrnn.backend("native"):
            here = Place("cpu", calls)
            output = module(case)(*data(case))[0].sum()
            if backward:
                calls.clear()
                here = Place("cpu", calls)
                monkeypatch.setenv("FASTRNN_CUDA_PLAN", wish)
                output.backward()
            return here.launches_per_call()

    assert run("auto") >= case.steps
    with pytest.raises(RuntimeError, match=rf"persistent:{index} cannot run: .*no room for a cluster of"):
        run(f"persistent:{index}")
    monkeypatch.delenv("CUSIM_MAX_CLUSTER")
    assert run("auto") == run(f"persistent:{index}") == 2


class Extension:
    """Stands for fastrnn._C; keeps what it is given."""

    def __init__(self):
        self.texts = []

    def set_tuned_plans(self, text):
        if text.startswith("wrong"):
            raise ValueError("tuned plans, line 1: no")
        self.texts.append(text)


def test_which_file_is_read(tmp_path, monkeypatch):
    shipped = _tuned.FILE.read_text(encoding="utf-8")
    mine = tmp_path / "mine.csv"
    mine.write_text("mine")
    for named, cuda, expected in (
        (None, False, []),
        (None, True, [shipped]),
        ("", True, []),
        ("", False, []),
        (str(mine), True, ["mine"]),
        (str(mine), False, ["mine"]),
    ):
        monkeypatch.delenv(_tuned.VARIABLE, raising=False)
        if named is not None:
            monkeypatch.setenv(_tuned.VARIABLE, named)
        extension = Extension()
        _tuned.load(extension, cuda)
        assert extension.texts == expected, (named, cuda)
    mine.write_text("wrong")
    monkeypatch.setenv(_tuned.VARIABLE, str(mine))
    with pytest.raises(ValueError, match=r"mine\.csv: tuned plans, line 1: no"):
        _tuned.load(Extension(), True)
    monkeypatch.setenv(_tuned.VARIABLE, str(tmp_path / "none.csv"))
    with pytest.raises(FileNotFoundError, match=r"FASTRNN_CUDA_TUNED: .*none\.csv"):
        _tuned.load(Extension(), True)


def test_shipped_table(plans):
    """It is one, and a row of it would be used: none is stale."""
    text = _tuned.FILE.read_text(encoding="utf-8")
    plans.set_tuned_plans(text)
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert lines[0] == plans.TUNED_HEADER
    names = lines[0].split(",")
    for line in lines[1:]:
        fields = dict(zip(names, line.split(","), strict=True))
        same = [name for name in ("a100", "h200", "b200", "rtx4090", "rtx5060") if _is(plans.cuda_device(name), fields)]
        for device in same:
            scan = {"training": fields["scan"] != "inference", "backward": fields["scan"] == "backward"}
            sizes = (int(fields[name]) for name in ("batch", "hidden_size", "directions", "element_size"))
            plan = plans.cuda_plan(fields["cell"], 100, *sizes, **scan, device=device)
            assert as_row(plan) == line.split(",", 8)[8] or fields["tier"] == plan["tier"] == "stepwise", line


def _is(device, fields):
    return all(int(fields[name]) == value for name, value in device.items())


PLAN = "import fastrnn; print(fastrnn._C.cuda_plan('lstm', 9, 3, 20)['tier'])"


def test_environment_variable(plans, tmp_path):
    """At import, in a process of its own: a table that is named, none, and one that is wrong."""
    file = tmp_path / "plans.csv"
    file.write_text(table(plans, row("inference", "stepwise,,,,")))

    def run(named):
        environment = {**os.environ, _tuned.VARIABLE: str(named)}
        return subprocess.run([sys.executable, "-c", PLAN], env=environment, capture_output=True, text=True)

    assert run("").stdout == f"{alternatives(plans)[0]['tier']}\n" == "block\n"
    assert run(file).stdout == "stepwise\n"
    file.write_text("capability,cell\n")
    wrong = run(file)
    assert wrong.returncode == 1
    assert f"ValueError: {file}: tuned plans, line 1: the header should be 'capability,multiproc" in wrong.stderr
