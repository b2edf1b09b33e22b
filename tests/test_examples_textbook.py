"""examples/textbook.py: the taught snippets give the same numbers with fastrnn in torch.nn's place."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tolerance import check

import fastrnn

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
sys.path.append(str(Path(__file__).resolve().parent.parent))  # the examples are no part of the installed package

from examples import textbook

NAMES = ("RNN", "LSTM", "GRU", "LSTMCell")


def in_float64(snippet):
    """torch.nn's results in float64, from the very numbers that float32 draws."""

    class Double:
        """A layer that widens what it is given and what it has, and keeps what it returns so."""

        def __init__(self, kind):
            self.kind = kind

        def __call__(self, *args, **kwargs):
            layer = self.kind(*args, **kwargs).double()
            layer.register_forward_pre_hook(lambda module, inputs: widen(inputs))
            return layer

    textbook.seed(0)
    return snippet(SimpleNamespace(**{name: Double(getattr(torch.nn, name)) for name in NAMES}))


def widen(value):
    if isinstance(value, tuple) and not hasattr(value, "batch_sizes"):
        return tuple(widen(item) for item in value)
    return value.double()


@pytest.mark.parametrize("snippet", textbook.SNIPPETS[:-1], ids=lambda snippet: snippet.__name__)
def test_same_numbers(snippet, backend):
    theirs, ours = textbook.both(snippet)
    oracle = in_float64(snippet)
    assert len(theirs) == len(ours) == len(oracle)
    for number, values in enumerate(zip(ours, theirs, oracle, strict=True)):
        check(f"result {number}", *values)


def test_training_step(backend):
    theirs, ours = textbook.both(textbook.classifier)
    for value, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(value, expected)


def test_the_layers_are_swapped(monkeypatch):
    """Both runs of a snippet use the module they are given: a fault in one of them shows."""
    monkeypatch.setattr(fastrnn, "GRU", torch.nn.LSTM)
    with pytest.raises(AttributeError):
        textbook.both(textbook.gru_unbatched)


@pytest.mark.slow
def test_program(capsys):
    textbook.main(["--quick"])
    lines = capsys.readouterr().out
    assert all(snippet.__doc__.rstrip(".")[:40] in lines for snippet in textbook.SNIPPETS)
