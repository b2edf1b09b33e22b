"""PyTorch's own ModuleInfo samples and error inputs for its recurrent modules, with our classes swapped in."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("expecttest")
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import fastrnn

INFOS = {
    info.module_cls.__name__: info
    for info in module_db
    if info.module_cls in (torch.nn.RNN, torch.nn.LSTM, torch.nn.GRU)
    or info.module_cls in (torch.nn.RNNCell, torch.nn.LSTMCell, torch.nn.GRUCell)
}
ARGUMENTS = {"device": "cpu", "requires_grad": True}


def test_all_six_are_there():
    assert len(INFOS) == 6


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", INFOS)
def test_samples(name, dtype, training, backend):
    info = INFOS[name]
    for sample in info.module_inputs_func(info, dtype=dtype, training=training, **ARGUMENTS):
        built, forward = sample.constructor_input, sample.forward_input
        nets = []
        for library in (fastrnn, torch.nn):
            torch.manual_seed(4)
            nets.append(getattr(library, name)(*built.args, **built.kwargs, dtype=dtype).train(training))
        ours, theirs = nets
        found, expected = ours(*forward.args, **forward.kwargs), theirs(*forward.args, **forward.kwargs)
        torch.testing.assert_close(found, expected)
        if sample.reference_fn is not None:
            reference = sample.reference_fn(ours, *forward.args, **forward.kwargs)
            torch.testing.assert_close(found, reference)
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            torch.testing.assert_close(twin(*forward.args, **forward.kwargs), found, rtol=0, atol=0)
        assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("name", INFOS)
def test_error_inputs(name, backend):
    info = INFOS[name]
    cls = getattr(fastrnn, name)
    for bad in info.module_error_inputs_func(info, dtype=torch.float32, training=True, **ARGUMENTS):
        sample = bad.module_error_input
        built, forward = sample.constructor_input, sample.forward_input
        if bad.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(bad.error_type, match=bad.error_regex):
                cls(*built.args, **built.kwargs)
        else:
            net = cls(*built.args, **built.kwargs)
            with pytest.raises(bad.error_type, match=bad.error_regex):
                net(*forward.args, **forward.kwargs)
