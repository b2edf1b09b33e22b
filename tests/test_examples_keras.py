"""examples/keras_equivalents.py and _keras_weights.py: from the same weights, Keras and fastrnn give the same numbers.

Keras runs its own equations here, step by step (``use_cudnn=False``: on some backends it would else call torch's). It
knows float32 only, so it errs as torch does; how much, is measured against torch.nn in float64, and ours may then
differ from it by what tolerance.py allows to an oracle with an error.
"""

import importlib.util
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerance import check, error

import fastrnn

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the examples are no part of the installed package

from examples import _keras_weights as keras_weights

# Keras' own, under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

KINDS = ("SimpleRNN", "LSTM", "GRU")
SIZES = [(1, 1, 1, 1), (1, 17, 3, 17), (3, 3, 17, 1), (17, 1, 1, 3), (17, 3, 17, 17)]  # T, N, I, H


@pytest.fixture
def equivalents():
    """The module; importing Keras takes seconds, so not before a test asks for it."""
    for package in ("keras", "matplotlib", "rich"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    from examples import keras_equivalents

    if keras_equivalents.keras.backend.backend() != "torch":
        pytest.skip("Keras was imported with another backend")
    return keras_equivalents


def keras_layer(equivalents, kind, hidden, bidirectional, bias, **options):
    options = {"return_sequences": True, "return_state": True, "use_bias": bias, **options}
    if kind != "SimpleRNN":
        options["use_cudnn"] = False
    layer = getattr(equivalents, kind)(hidden, **options)
    return equivalents.Bidirectional(layer) if bidirectional else layer


def flat(output, hidden):
    """torch's results in the order of Keras': the output, then direction by direction the states."""
    states = hidden if isinstance(hidden, tuple) else (hidden,)
    return [output, *(state for direction in zip(*states, strict=True) for state in direction)]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_there_and_back(kind):
    gates = len(keras_weights.GATES[kind])
    generator = np.random.default_rng(0)
    shapes = [(3, gates * 5), (5, gates * 5), (2, gates * 5) if kind == "GRU" else (gates * 5,)]
    weights = [generator.normal(size=shape) for shape in shapes]
    there = keras_weights.to_torch(kind, weights)
    assert [weight.shape for weight in there] == [(gates * 5, 3), (gates * 5, 5), (gates * 5,), (gates * 5,)]
    for before, after in zip(weights, keras_weights.to_keras(kind, there), strict=True):
        np.testing.assert_array_equal(after, before)
    assert len(keras_weights.to_keras(kind, keras_weights.to_torch(kind, weights[:2]))) == 2


def test_gates_of_gru_change_places():
    kernel = np.repeat([1.0, 2.0, 3.0], 2)[None]  # z, r, h of two units
    assert keras_weights.to_torch("GRU", [kernel, kernel])[0].ravel().tolist() == [2, 2, 1, 1, 3, 3]


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_numbers(kind, bidirectional, equivalents, backend):
    for (steps, batch, inputs, hidden), bias in itertools.product(SIZES, (True, False)):
        x = torch.randn(batch, steps, inputs)
        layer = equivalents.trained(keras_layer(equivalents, kind, hidden, bidirectional, bias), x)
        module = keras_weights.from_keras(layer)
        assert type(module) is keras_weights.MODULES[kind]
        with torch.no_grad():
            theirs = layer(x)
            ours = flat(*module(x))
            exact = flat(*fastrnn.to_torch(keras_weights.from_keras(layer)).double()(x.double()))
        for number, (value, peer, oracle) in enumerate(zip(ours, theirs, exact, strict=True)):
            allowed = error(peer, oracle)
            assert allowed < torch.finfo(torch.float32).eps ** 0.5, "Keras and torch.nn compute different things"
            check(f"{kind} result {number}", value, None, peer.double(), own=allowed, of_oracle=allowed)


def test_gradients(equivalents, backend):
    """Of the input, through a stack of both directions."""
    layers = [keras_layer(equivalents, "GRU", 3, True, True, return_state=False) for _ in range(2)]
    model = equivalents.keras.Sequential(layers)
    x = torch.randn(3, 17, 5, requires_grad=True)
    equivalents.trained(model, x)
    module = keras_weights.from_keras(model.layers)
    wide = x.detach().double().requires_grad_()
    oracle = fastrnn.to_torch(keras_weights.from_keras(model.layers)).double()
    (ours,) = torch.autograd.grad(module(x)[0].square().sum(), x)
    (theirs,) = torch.autograd.grad(model(x).square().sum(), x)
    (exact,) = torch.autograd.grad(oracle(wide)[0].square().sum(), wide)
    allowed = error(theirs, exact)
    assert allowed < 1e-3 * exact.abs().max()
    check("the gradient", ours, None, theirs.double(), own=allowed, of_oracle=allowed)


def test_snippets(equivalents, backend):
    """A few roundings of values near one; a wrong gate, direction or bias is off by a tenth."""
    for snippet in equivalents.SNIPPETS:
        theirs, ours = equivalents.both(snippet)
        assert len(theirs) == len(ours)
        for value, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(value, expected, msg=lambda text, name=snippet.__name__: f"{name}: {text}")


def test_a_wrong_gate_is_found(equivalents, monkeypatch):
    monkeypatch.setitem(keras_weights.GATES, "GRU", [0, 1, 2])
    assert equivalents.difference(equivalents.gru_sequences_and_state) > 0.01


def test_no_equivalent_is_refused(equivalents):
    expected = ("reset_after", "recurrent_dropout", "dropout", "activation", "recurrent_activation", "ConvLSTM1D")
    for make, word in zip(equivalents.NO_EQUIVALENT, expected, strict=True):
        assert word in equivalents.refusal(make)


def test_layers_that_are_not_alike_are_refused(equivalents):
    x = torch.randn(1, 3, 3)
    layers = [equivalents.LSTM(3, return_sequences=True), equivalents.LSTM(5)]
    equivalents.trained(equivalents.keras.Sequential(layers), x)
    with pytest.raises(keras_weights.NoEquivalentError, match="different kind, width"):
        keras_weights.from_keras(layers)


@pytest.mark.slow
def test_program(equivalents, capsys):
    equivalents.main(["--quick"])
    printed = capsys.readouterr().out
    assert all(snippet.__doc__.rstrip(".")[:30] in printed for snippet in equivalents.SNIPPETS)
    assert "reset_after=False" in printed
