"""Products of large matrices by the kernels' own tiles, which not every machine chooses, and by torch's library."""

import pytest
from test_backend import python

# Whole cases, forward and backward, by the rule of tolerance.py: more rows, columns and k than a block has, vectors,
# one step with many rows or a single one, few rows in all, and whatever divides or scatters what is multiplied. Then
# inputs that repeat themselves.
RULE = """
    import torch, fastrnn
    from cases import data, module, outputs_and_gradients, small
    from test_features import OPTIONS, compare_apart
    from test_modules import compare
    from tolerance import check
    assert fastrnn.build_info()["cpu_gemm"] == GEMM
    shapes = (
        {"steps": 129, "batch": 17, "inputs": 3, "hidden": 17},
        {"steps": 17, "batch": 33, "inputs": 389, "hidden": 67, "layout": "batch_first"},
        {"steps": 1, "batch": 17, "inputs": 129, "hidden": 129},
        {"steps": 1, "batch": 9, "inputs": 129, "hidden": 129},
        {"steps": 1, "batch": 1, "inputs": 129, "hidden": 385, "bidirectional": True},
        {"steps": 3, "batch": 1, "inputs": 17, "hidden": 385},
        {"steps": 5, "batch": 3, "inputs": 193, "hidden": 65, "num_layers": 2},
        {"steps": 3, "batch": 129, "inputs": 1, "hidden": 3, "bidirectional": True, "num_layers": 2},
        {"steps": 33, "batch": 3, "inputs": 17, "hidden": 129, "bidirectional": True, "layout": "unsorted"},
        {"steps": 17, "batch": 17, "inputs": 65, "hidden": 33, "dtype": torch.float64, "bias": False},
    )
    for shape in shapes:
        for case in small(**shape):
            compare(case, "BACKEND")
    for which in OPTIONS:
        for case in small(steps=17, batch=29, inputs=3, hidden=65, bidirectional=True, layout="batch_first"):
            compare_apart(case, which, "BACKEND")
    for case in small(steps=65, batch=17, inputs=17, hidden=33):
        for part in ((65, 17, 1), (65, 1, 17), (1, 17, 17)):
            results = []
            for net in (module(case), module(case, torch.nn), module(case, torch.nn, torch.float64)):
                input, hx = data(case, net.weight_ih_l0.dtype)
                steps, batch, inputs = part
                repeated = input.detach()[:steps, :batch, :inputs].expand_as(input).requires_grad_()
                results.append(outputs_and_gradients(net, repeated, hx))
            for name, value in results[0].items():
                check(name, value, results[1][name], results[2][name])
"""


# with the backend "native", compare() runs on two threads
@pytest.mark.parametrize("backend", ["one thread", "native"])
@pytest.mark.parametrize("gemm", ["own", pytest.param("library", marks=pytest.mark.slow)])
def test_rule(gemm, backend, native):
    code = RULE.replace("BACKEND", backend).replace("GEMM", repr(gemm))
    done = python(code, FASTRNN_BACKEND="native", FASTRNN_CPU_GEMM=gemm)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_rule_on_narrow_vectors(narrow_vectors, native):
    code = RULE.replace("BACKEND", "native").replace("GEMM", "'own'")
    done = python(code, FASTRNN_BACKEND="native", FASTRNN_CPU_GEMM="own", FASTRNN_CPU_CAPABILITY=narrow_vectors)
    assert done.returncode == 0, done.stderr


def test_value_that_is_not_one(native):
    done = python("import fastrnn", FASTRNN_BACKEND="native", FASTRNN_CPU_GEMM="mkl")
    assert "ValueError: FASTRNN_CPU_GEMM should be one of auto, own or library, got: 'mkl'" in done.stderr
