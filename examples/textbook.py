"""The recurrent layers as textbooks of PyTorch introduce them: run with torch.nn, then with fastrnn in its place.

Each snippet below gets the module that it takes its layers from as ``nn``, and is otherwise written as it is taught.
Under one seed both draw the same weights, so both must return the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from examples._common import arguments, parse, seed, show


def rnn(nn: ModuleType) -> list[Tensor]:
    """nn.RNN, three layers, bidirectional, batch_first, tanh."""
    batch_size, sequence_length, input_size, hidden_size, num_layers = 5, 7, 10, 20, 3
    rnn = nn.RNN(input_size, hidden_size, num_layers, nonlinearity="tanh", batch_first=True, bidirectional=True)
    x = torch.randn(batch_size, sequence_length, input_size)
    output, hidden = rnn(x)

    assert output.shape == (batch_size, sequence_length, 2 * hidden_size)
    assert hidden.shape == (2 * num_layers, batch_size, hidden_size)
    # The last layer's final states are in the output: at the last step forward, at the first step in reverse.
    assert torch.equal(output[:, -1, :hidden_size], hidden[-2])
    assert torch.equal(output[:, 0, hidden_size:], hidden[-1])
    return [output, hidden]


def lstm(nn: ModuleType) -> list[Tensor]:
    """nn.LSTM, two layers, with initial states."""
    lstm = nn.LSTM(input_size=10, hidden_size=20, num_layers=2)
    x = torch.randn(5, 3, 10)  # sequence first
    h0 = torch.randn(2, 3, 20)
    c0 = torch.randn(2, 3, 20)
    output, (hn, cn) = lstm(x, (h0, c0))

    assert output.shape == (5, 3, 20)
    assert hn.shape == cn.shape == (2, 3, 20)
    return [output, hn, cn]


def gru_unbatched(nn: ModuleType) -> list[Tensor]:
    """nn.GRU, one sequence without a batch."""
    gru = nn.GRU(10, 20)
    output, hn = gru(torch.randn(5, 10))

    assert output.shape == (5, 20)
    assert hn.shape == (1, 20)
    return [output, hn]


def lstm_cell(nn: ModuleType) -> list[Tensor]:
    """nn.LSTMCell in a loop over time."""
    cell = nn.LSTMCell(10, 20)
    x = torch.randn(6, 3, 10)
    hx, cx = torch.zeros(3, 20), torch.zeros(3, 20)
    outputs = []
    for step in x:
        hx, cx = cell(step, (hx, cx))
        outputs.append(hx)

    assert torch.stack(outputs).shape == (6, 3, 20)
    return [torch.stack(outputs), cx]


def packed(nn: ModuleType) -> list[Tensor]:
    """nn.GRU on a packed batch of padded sequences."""
    gru = nn.GRU(10, 20, batch_first=True, bidirectional=True)
    x = torch.randn(3, 9, 10)
    packed = pack_padded_sequence(x, torch.tensor([4, 9, 1]), batch_first=True, enforce_sorted=False)
    output, hn = gru(packed)
    padded, lengths = pad_packed_sequence(output, batch_first=True)

    assert padded.shape == (3, 9, 40)
    assert lengths.tolist() == [4, 9, 1]
    return [padded, hn]


def classifier(nn: ModuleType) -> list[Tensor]:
    """A sequence classifier and one step of training."""

    class Classifier(torch.nn.Module):
        def __init__(self, vocabulary: int, classes: int) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(vocabulary, 16)
            self.lstm = nn.LSTM(16, 32, batch_first=True)
            self.linear = torch.nn.Linear(32, classes)

        def forward(self, tokens: Tensor) -> Tensor:
            _, (hn, _) = self.lstm(self.embedding(tokens))
            return self.linear(hn[-1])

    model = Classifier(vocabulary=50, classes=4)
    tokens, labels = torch.randint(50, (8, 12)), torch.randint(4, (8,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits = model(tokens)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

    assert logits.shape == (8, 4)
    return [logits.detach(), loss.detach(), *(parameter.detach() for parameter in model.parameters())]


SNIPPETS: tuple[Callable[[ModuleType], list[Tensor]], ...] = (rnn, lstm, gru_unbatched, lstm_cell, packed, classifier)


def both(snippet: Callable[[ModuleType], list[Tensor]], start: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """What a snippet returns with torch.nn and with fastrnn, from the same random numbers."""
    results: list[Any] = []
    for nn in (torch.nn, fastrnn):
        seed(start)
        results.append(snippet(nn))
    return results[0], results[1]


def difference(snippet: Callable[[ModuleType], list[Tensor]], start: int = 0) -> float:
    """The largest one between torch.nn and fastrnn."""
    return max((theirs - ours).abs().max().item() for theirs, ours in zip(*both(snippet, start), strict=True))


def main(given: Sequence[str] | None = None) -> None:
    options = parse(arguments(__doc__), given)
    show(
        f"torch.nn {torch.__version__} and fastrnn {fastrnn.__version__}, float32",
        ("snippet", "shapes", "largest difference"),
        (
            (
                snippet.__doc__,
                " ".join("×".join(map(str, value.shape)) or "()" for value in both(snippet)[1][:3]),
                f"{difference(snippet, options.seed):.1e}",
            )
            for snippet in SNIPPETS
        ),
    )


if __name__ == "__main__":
    main()
