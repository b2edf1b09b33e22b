import pytest
import torch

import fastrnn
from fastrnn import _backend


def _enter(name):
    if name == "native" and _backend.native is None:
        pytest.skip(f"the native library is not loaded: {_backend.reason}")
    return fastrnn.backend(name)


@pytest.fixture(params=["native", "python"])
def backend(request):
    """Every test that names it runs on each backend that is there."""
    with _enter(request.param):
        yield request.param


@pytest.fixture
def native():
    """For what only the native backend promises."""
    with _enter("native"):
        yield _backend.native


@pytest.fixture(params=["default", "avx2"])
def narrow_vectors(request, native):
    """FASTRNN_CPU_CAPABILITY below AVX-512, of those that the machine has."""
    if request.param == "avx2" and native.cpu_capability() == "default":
        pytest.skip("this machine has no AVX2, or FASTRNN_CPU_CAPABILITY forbids it")
    return request.param


@pytest.fixture(autouse=True)
def _reproducible():
    """One seed; and one thread, because torch's own loops over tiny tensors crawl where cores are shared."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
