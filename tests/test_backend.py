"""Which backend runs: the environment variable, the fallback with its one warning, and explain."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

import fastrnn
from fastrnn import _backend

# what an import of the native library can meet
ABSENT = "import sys; sys.modules['fastrnn._C'] = None"
BROKEN = """
    import importlib.abc, importlib.machinery, sys
    class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        def find_spec(self, name, path, target=None):
            return importlib.machinery.ModuleSpec(name, self) if name == "fastrnn._C" else None
        def create_module(self, spec):
            raise ImportError("undefined symbol: at_some_other_version")
        def exec_module(self, module):
            pass
    sys.meta_path.insert(0, Broken())
"""


def python(code, **environment):
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("FASTRNN_")}
    inherited["PYTHONPATH"] = os.pathsep.join(sys.path)
    inherited["OMP_WAIT_POLICY"] = "passive"  # other tests run beside it: threads that wait for each other must let go
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", textwrap.dedent(code)],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


USE = """
    import torch, fastrnn
    fastrnn.LSTM(3, 5)(torch.randn(4, 2, 3)); fastrnn.GRUCell(3, 5)(torch.randn(2, 3))
    print(fastrnn.build_info()["backend"])
"""


@pytest.mark.parametrize("before, why", [(ABSENT, "it was not built"), (BROKEN, "undefined symbol")])
def test_one_warning_without_the_native_library(before, why):
    done = python(textwrap.dedent(before) + textwrap.dedent(USE))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "python"
    assert done.stderr.count("UserWarning") == 1
    for words in (why, "speed", "torch.compile", "torch.export", "pip install --no-build-isolation"):
        assert words in done.stderr


@pytest.mark.parametrize("before, why", [(ABSENT, "it was not built"), (BROKEN, "undefined symbol")])
def test_native_insists(before, why):
    done = python(textwrap.dedent(before) + textwrap.dedent(USE), FASTRNN_BACKEND="native")
    assert done.returncode != 0
    assert "ImportError: fastrnn's native library cannot be used" in done.stderr
    assert why in done.stderr


def test_python_does_not_look_for_the_native_library():
    done = python(USE + "\n    import sys; print('fastrnn._C' in sys.modules)", FASTRNN_BACKEND="python")
    assert done.stdout.split() == ["python", "False"], done.stderr
    assert "Warning" not in done.stderr


def test_other_values_are_refused():
    done = python(USE, FASTRNN_BACKEND="cuda")
    assert "ValueError: FASTRNN_BACKEND should be one of auto, native or python, got: 'cuda'" in done.stderr


@pytest.mark.parametrize("value", ["auto", "native"])
def test_native_is_the_default(value, native):
    done = python(USE, FASTRNN_BACKEND=value)
    assert done.stdout.strip() == "native", done.stderr
    assert "Warning" not in done.stderr


@pytest.mark.parametrize("value", ["auto", "native"])
def test_capability_that_is_not_one(value, native):
    done = python(USE, FASTRNN_BACKEND=value, FASTRNN_CPU_CAPABILITY="sse")
    assert done.returncode != 0
    assert "ValueError: FASTRNN_CPU_CAPABILITY should be one of avx512, avx2 or default, got: 'sse'" in done.stderr
    assert "Warning" not in done.stderr


def test_bf16_that_is_not_one(native):
    done = python(USE, FASTRNN_BACKEND="native", FASTRNN_CPU_BF16="yes")
    assert "ValueError: FASTRNN_CPU_BF16 should be one of auto, off or emulate, got: 'yes'" in done.stderr


def test_empty_variable_is_none(native):
    done = python(USE, FASTRNN_BACKEND="native", FASTRNN_CPU_CAPABILITY="", FASTRNN_CPU_BF16="")
    assert done.stdout.strip() == "native", done.stderr


CAPABILITIES = """
    import torch, fastrnn
    torch.set_num_threads(1)
    print(fastrnn.build_info()["cpu_capability"])
    for name in ("RNN", "LSTM", "GRU"):
        for hidden in (1, 3, 17, 129):
            torch.manual_seed(hidden)
            theirs = getattr(torch.nn, name)(3, hidden, 2, bidirectional=True)
            torch.manual_seed(hidden)
            ours = getattr(fastrnn, name)(3, hidden, 2, bidirectional=True)
            input = torch.randn(17, 3, 3)
            results = []
            for net in (ours, theirs):
                output = net(input)[0]
                results.append([output, *torch.autograd.grad(output.square().sum(), list(net.parameters()))])
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_capability_of_the_machine(capability, native):
    order = ["default", "avx2", "avx512"]
    if capability not in order[: order.index(native.cpu_capability()) + 1]:
        pytest.skip(f"this machine, or FASTRNN_CPU_CAPABILITY, stops at {native.cpu_capability()}")
    done = python(CAPABILITIES, FASTRNN_BACKEND="native", FASTRNN_CPU_CAPABILITY=capability)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == capability


def test_backend_context(backend):
    assert fastrnn.build_info()["backend"] == backend
    with fastrnn.backend("python"):
        assert fastrnn.build_info()["backend"] == "python"
        with pytest.raises(ValueError, match="backend should be one of auto, native or python, got: 'cuda'"):
            with fastrnn.backend("cuda"):
                pass
    assert fastrnn.build_info()["backend"] == backend


def test_native_context_without_native(monkeypatch):
    monkeypatch.setattr(_backend, "_native_ops", None)
    with pytest.raises(RuntimeError, match="native library cannot be used"):
        with fastrnn.backend("native"):
            pass


def test_explain_python():
    with fastrnn.backend("python"):
        text = fastrnn.explain(fastrnn.LSTM(3, 5), torch.randn(4, 2, 3))
    assert "backend: python" in text
    assert "why: " in text


def test_explain_native(native):
    net = fastrnn.LSTM(3, 5, 2, bidirectional=True, proj_size=2)
    text = fastrnn.explain(net, torch.randn(4, 2, 3), lengths=torch.tensor([4, 1]))
    for words in ("backend: native", "torch.ops.fastrnn.lstm_layer", "with lengths", native.cpu_capability()):
        assert words in text
    assert "layer 0: backward" in text
    assert "the layers above: forward" in text
    with torch.no_grad():
        assert "backward" not in fastrnn.explain(net, torch.randn(4, 2, 3))
        assert "torch.ops.fastrnn.gru_layer" in fastrnn.explain(fastrnn.GRUCell(3, 5), torch.randn(2, 3))
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    assert "packed rows" in fastrnn.explain(net, packed)
    assert "torch.ops.fastrnn.rnn_relu_layer" in fastrnn.explain(fastrnn.RNNCell(3, 5, True, "relu"), torch.ones(3))


def test_explain_asks_for_the_plan_that_runs(native, monkeypatch):
    """That of the tensors' dtype; rows are ragged where a length falls short of T."""
    asked = []

    class Native:
        cpu_capability = staticmethod(native.cpu_capability)

        @staticmethod
        def plan(cell, *sizes, ragged, beside):
            assert not beside
            asked.append((sizes[-3], ragged))
            return {"recurrent": "packed", "fused_input": True, "threads": 1, "shard": "none"}

    monkeypatch.setattr(_backend, "native", Native)
    net, input = fastrnn.LSTM(3, 5), torch.randn(4, 2, 3)
    assert "the input multiplied along with them" in fastrnn.explain(net, input)
    for dtype in (torch.float64, torch.bfloat16):
        fastrnn.explain(net, input.to(dtype))
    fastrnn.explain(net, input.int())
    for lengths in ([4, 1], [4, 4]):
        fastrnn.explain(net, input, lengths=torch.tensor(lengths))
        fastrnn.explain(net, torch.nn.utils.rnn.pack_padded_sequence(input, lengths))
    dtypes = ["float32", "float64", "bfloat16", *["float32"] * 5]
    assert asked == list(zip(dtypes, [False, False, False, False, True, True, False, False], strict=True))


def test_explain_another_device(monkeypatch):
    monkeypatch.setattr(_backend, "choose", lambda tensor, features: "python" if features else "torch")
    net, input = fastrnn.GRU(3, 5), torch.randn(4, 2, 3)
    assert "op: torch.gru" in fastrnn.explain(net, input)
    monkeypatch.setattr(_backend, "layer_ops", {})
    monkeypatch.setattr(_backend, "native", object())
    assert "no native kernel for cpu" in fastrnn.explain(net, input, lengths=torch.tensor([4, 1]))


def test_explain_wants_a_module_of_ours():
    with pytest.raises(TypeError, match=r"explain takes a module of fastrnn, got: torch\.nn\.modules\.rnn\.LSTM"):
        fastrnn.explain(torch.nn.LSTM(3, 5), torch.randn(4, 2, 3))


def test_version():
    assert fastrnn.__version__.count(".") == 2
    if _backend.native is not None:
        assert _backend.native.build_info()["version"] == fastrnn.__version__
