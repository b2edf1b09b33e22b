"""convert and to_torch: the same state under another class."""

import copy
import warnings

import pytest
import torch
from torch.nn.utils import parametrizations, prune

import fastrnn

NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.LSTM(3, 5, 2, bidirectional=True, dropout=0.1)
        self.inner = torch.nn.ModuleDict({"gru": torch.nn.GRU(10, 5), "list": torch.nn.ModuleList([self.first])})
        self.cell = torch.nn.GRUCell(5, 5)
        self.linear = torch.nn.Linear(5, 2)

    def forward(self, input):
        output = self.inner["gru"](self.first(input)[0])[0]
        return self.linear(self.cell(output[-1]))


def test_whole_model(backend):
    model = Model().eval()
    input = torch.randn(4, 2, 3)
    expected = model(input)
    parameters, keys, first = dict(model.named_parameters()), [*model.state_dict()], model.first
    random = torch.get_rng_state()
    assert fastrnn.convert(model) is model
    assert torch.equal(torch.get_rng_state(), random)
    assert type(model.first) is fastrnn.LSTM
    assert type(model.inner["gru"]) is fastrnn.GRU
    assert type(model.cell) is fastrnn.GRUCell
    assert model.inner["list"][0] is model.first  # shared before, shared after
    assert first is not model.first
    assert [*model.state_dict()] == keys
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert not any(net.training for net in model.modules())
    torch.testing.assert_close(model(input), expected)
    assert fastrnn.convert(model) is model  # nothing left to do
    assert fastrnn.to_torch(model) is model
    assert type(model.first) is torch.nn.LSTM
    assert type(model.cell) is torch.nn.GRUCell
    assert model.inner["list"][0] is model.first
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert torch.equal(model(input), expected)


@pytest.mark.parametrize("name", NAMES)
def test_root(name, backend):
    root = getattr(torch.nn, name)(3, 5)
    new = fastrnn.convert(root)
    assert type(new) is getattr(fastrnn, name)
    assert type(root) is getattr(torch.nn, name)
    assert vars(new).keys() == vars(root).keys()
    back = fastrnn.to_torch(new)
    assert type(back) is type(root)
    input = torch.randn(2, 3)
    torch.testing.assert_close(new(input), root(input))
    torch.testing.assert_close(back(input), root(input), rtol=0, atol=0)
    assert repr(copy.deepcopy(new)) == repr(root)


def test_hooks_move_and_their_handles_still_work(backend):
    model = torch.nn.Sequential(torch.nn.GRU(3, 5))
    calls = []
    gru = model[0]
    handles = [
        gru.register_forward_pre_hook(lambda net, args: calls.append(("pre", type(net)))),
        gru.register_forward_hook(lambda net, args, out: calls.append(("post", type(net)))),
        gru.register_full_backward_hook(lambda net, grads, out: calls.append(("backward", type(net)))),
        gru.register_state_dict_post_hook(lambda net, *rest: calls.append(("save", type(net)))),
        gru.register_load_state_dict_pre_hook(lambda net, *rest: calls.append(("load", type(net)))),
        gru.register_load_state_dict_post_hook(lambda net, keys: calls.append(("loaded", type(net)))),
    ]
    fastrnn.convert(model)
    del gru

    def use():
        model(torch.randn(4, 2, 3, requires_grad=True))[0].sum().backward()
        model.load_state_dict(model.state_dict())

    use()
    assert [what for what, _ in calls] == ["pre", "post", "backward", "save", "load", "loaded"]
    assert all(kind is fastrnn.GRU for _, kind in calls)
    for handle in handles:
        handle.remove()
    use()
    assert len(calls) == 6


def test_parametrizations(backend):
    model = torch.nn.Sequential(parametrizations.weight_norm(torch.nn.LSTM(3, 5), "weight_hh_l0"))
    input = torch.randn(4, 2, 3)
    expected = model(input)
    before = dict(model.named_parameters())
    fastrnn.convert(model)
    lstm = model[0]
    assert isinstance(lstm, fastrnn.LSTM)
    assert type(lstm).__name__ == "ParametrizedLSTM"
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    torch.testing.assert_close(model(input), expected)
    with torch.no_grad():
        lstm.parametrizations.weight_hh_l0.original0.mul_(2)
    assert not torch.allclose(model(input)[0], expected[0])
    doubled = model(input)
    fastrnn.to_torch(model)
    assert isinstance(model[0], torch.nn.LSTM)
    fastrnn.convert(model)
    torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight_hh_l0")
    assert type(model[0]) is fastrnn.LSTM
    torch.testing.assert_close(model(input), doubled, rtol=0, atol=0)


def test_pruning_and_buffers(backend):
    model = torch.nn.Sequential(prune.random_unstructured(torch.nn.GRU(3, 5), "weight_ih_l0", 0.5))
    model[0].register_buffer("extra", torch.ones(2))
    expected = model(torch.ones(4, 2, 3))
    mask = model[0].weight_ih_l0_mask
    fastrnn.convert(model)
    assert model[0].weight_ih_l0_mask is mask
    assert torch.equal(model[0].extra, torch.ones(2))
    torch.testing.assert_close(model(torch.ones(4, 2, 3)), expected)
    prune.remove(model[0], "weight_ih_l0")
    torch.testing.assert_close(model(torch.ones(4, 2, 3)), expected)


class Custom(torch.nn.LSTM):
    pass


class Ours(fastrnn.GRU):
    pass


def test_subclasses_are_left_alone_with_one_warning():
    model = torch.nn.ModuleDict({"one": Custom(3, 5), "two": torch.nn.GRU(3, 5), "three": Custom(3, 5)})
    with pytest.warns(UserWarning) as caught:
        fastrnn.convert(model)
    assert len(caught) == 1
    assert "one (" in str(caught[0].message)
    assert "three (" in str(caught[0].message)
    assert Custom.__qualname__ in str(caught[0].message)
    assert caught[0].filename == __file__
    assert type(model["one"]) is Custom
    assert type(model["two"]) is fastrnn.GRU
    with pytest.warns(UserWarning, match="Ours"):
        assert type(fastrnn.to_torch(Ours(3, 5))) is Ours


def test_nothing_is_said_about_what_is_fine():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastrnn.convert(Model())
        fastrnn.convert(fastrnn.LSTM(3, 5))
        fastrnn.to_torch(torch.nn.LSTM(3, 5))


@pytest.mark.parametrize("root", [True, False])
def test_what_torch_compile_made_of_a_module(root):
    """It runs the new module, which modes and hooks reach."""
    compiled = torch.compile(torch.nn.LSTM(5, 17, 2, dropout=0.9), backend="eager")
    model = compiled if root else torch.nn.Sequential(compiled)
    input = torch.randn(4, 2, 5)
    expected = model.eval()(input)[0]
    assert fastrnn.convert(model.train()) is model
    model.eval()
    calls = []
    inner = compiled._orig_mod
    assert type(inner) is fastrnn.LSTM
    inner.register_forward_hook(lambda module, *_: calls.append(type(module)))
    torch.testing.assert_close(model(input)[0], expected)
    assert calls == [fastrnn.LSTM]


def test_compiled_module_says_so():
    model = torch.nn.Sequential(torch.nn.GRU(3, 5))
    model[0].compile(backend="eager")
    with pytest.warns(UserWarning, match="call compile"):
        fastrnn.convert(model)
    assert model(torch.ones(4, 2, 3))[0].shape == (4, 2, 5)
