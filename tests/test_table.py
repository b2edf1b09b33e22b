"""The table of docs/features.md: what it says of torch.nn and of fastrnn is tried, and its links lead to tests."""

import re
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap

import fastrnn

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([^|]+) \| (yes|no) \| (yes|no) \| \[[^\]]+\]\(\.\./(tests/\w+\.py)\) `(\w+)` \|$", PAGE, re.M)
TORCH = re.search(r"torch\.nn is that of torch (\d+\.\d+)", PAGE).group(1)

STEPS, BATCH = 7, 4
X = torch.randn(STEPS, BATCH, 3)


def per_sample(library, name):
    net = getattr(library, name)(3, 5)
    weights = {key: value.detach() for key, value in net.named_parameters()}
    return vmap(grad(lambda w, x: functional_call(net, w, (x,))[0].sum()), in_dims=(None, 1))(weights, X)


def compiled(library, name):
    torch._dynamo.reset()
    return torch.compile(getattr(library, name)(3, 5), fullgraph=True, backend="aot_eager")(X)


def exported(library, name):
    steps = torch.export.Dim("steps", min=2, max=99)
    return torch.export.export(getattr(library, name)(3, 5), (X,), dynamic_shapes={"input": {0: steps}})


def ones_twice(library, name, method):
    return getattr(getattr(library, name)(3, 5), method)(X, None, torch.tensor([7, 1, 2, 3]))


def ensemble(library, name):
    nets = [getattr(library, name)(3, 5) for _ in range(2)]
    weights, _ = torch.func.stack_module_state(nets)
    return vmap(lambda w: functional_call(nets[0], w, (X,))[0])(weights)


def dual(library, name):
    with forward_ad.dual_level():
        output, _ = getattr(library, name)(3, 5)(forward_ad.make_dual(X, X))
        assert forward_ad.unpack_dual(output).tangent is not None


def second(library, name):
    net = getattr(library, name)(3, 5)
    return hessian(lambda x: net(x)[0].sum())(X)


TRIED = {
    "ensembles: vmap over stack_module_state": ensemble,
    "torch.autograd.forward_ad": dual,
    "hessian": second,
    "per-sample gradients: vmap(grad)": per_sample,
    "forward-mode AD: jvp": lambda lib, name: jvp(lambda x: getattr(lib, name)(3, 5)(x)[0], (X,), (X,)),
    "torch.compile(fullgraph=True)": compiled,
    "torch.export with T open": exported,
    "skip_init": lambda lib, name: torch.nn.utils.skip_init(getattr(lib, name), 3, 5),
    "rows of different length without packing": lambda lib, name: ones_twice(lib, name, "forward"),
    "the states of every step": lambda lib, name: ones_twice(lib, name, "forward_states"),
    "orthogonal recurrent weights": lambda lib, name: getattr(lib, name)(3, 5, recurrent_init="orthogonal"),
    "torch.jit.script": lambda lib, name: torch.jit.script(torch.nn.Sequential(getattr(lib, name)(3, 5)))(X),
    "torch.jit.trace": lambda lib, name: torch.jit.trace(getattr(lib, name)(3, 5), X),
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_links_lead_to_tests(row):
    _, _, _, path, test = row
    assert re.search(rf"^def {test}\(", (ROOT / path).read_text(encoding="utf-8"), re.M)


def test_every_row_is_read():
    lines = [line for line in PAGE.splitlines() if line.startswith("| ") and "torch.nn |" not in line]
    assert len(lines) == len(ROWS) > len(TRIED)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("feature", TRIED)
@pytest.mark.parametrize("library", [torch.nn, fastrnn], ids=["torch.nn", "fastrnn"])
def test_entries(library, feature, native):
    """ "yes" is yes for the LSTM and the GRU, "no" an error for at least one of them."""
    if library is torch.nn and not torch.__version__.startswith(TORCH + "."):
        pytest.skip(f"the table says what torch {TORCH} does")
    (row,) = [row for row in ROWS if row[0] == feature]
    promised = row[1 if library is torch.nn else 2]
    errors = []
    for name in ("LSTM", "GRU"):
        try:
            TRIED[feature](library, name)
        except Exception as error:  # whatever it is: it does not work
            errors.append(error)
    assert ("no" if errors else "yes") == promised, errors
