"""Aligned many-to-many: the token class of every character of Python source, by a stacked bidirectional LSTM."""

from __future__ import annotations

import argparse
import io
import keyword
import sysconfig
import tokenize
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from examples import _common as common

CLASSES = ("whitespace", "keyword", "name", "number", "string", "comment", "operator")
COLOURS = ("#ffffff", "#c0282d", "#222222", "#e08a1e", "#3a9a5b", "#8a8f98", "#2a78b5")
WHITESPACE, KEYWORD, NAME, NUMBER, STRING, COMMENT, OPERATOR = range(len(CLASSES))
TOKENS = {
    tokenize.NAME: NAME,
    tokenize.NUMBER: NUMBER,
    tokenize.STRING: STRING,
    tokenize.COMMENT: COMMENT,
    tokenize.OP: OPERATOR,
    # The pieces of an f-string, from Python 3.12 on; what stands in its braces has tokens of its own there.
    **{getattr(tokenize, f"FSTRING_{part}", -1): STRING for part in ("START", "MIDDLE", "END")},
}
CHARACTERS = 128  # ASCII; any other character is number 0
WINDOW = 256  # characters that are read at once
PADDING = -100  # what cross_entropy leaves out


def tags(source: str) -> list[int]:
    """The class of every character of a program, an index into `CLASSES`, by the tokenizer of Python itself.

    Raises
    ------
    tokenize.TokenError, SyntaxError
        If the source is no Python.
    """
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    result = [WHITESPACE] * len(source)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = TOKENS.get(token.type, WHITESPACE)
        if kind == NAME and keyword.iskeyword(token.string):
            kind = KEYWORD
        if kind == WHITESPACE:  # which it is already; and some of these tokens, as an indent's end, lie nowhere
            continue
        begin, end = (starts[row - 1] + column for row, column in (token.start, token.end))
        result[begin:end] = [kind] * (end - begin)
    return result


@dataclass
class Windows:
    """Pieces of programs, all files one after the other; the last of a file is shorter."""

    characters: Tensor  # int64 [N, WINDOW]
    classes: Tensor  # int64 [N, WINDOW], PADDING beyond the length
    lengths: Tensor  # int64 [N]


def windows(programs: Sequence[tuple[str, Sequence[int]]]) -> Windows:
    """Cut programs, each its text and the class of every character, into pieces that do not overlap."""
    texts, classes = [], []
    for text, kinds in programs:
        numbers = [ord(character) % CHARACTERS if character.isascii() else 0 for character in text]
        for start in range(0, len(text), WINDOW):
            texts.append(numbers[start : start + WINDOW])
            classes.append(kinds[start : start + WINDOW])
    characters, lengths = common.pad(texts)
    return Windows(characters, common.pad(classes, PADDING)[0], lengths)


def standard_library(largest: int = 60_000) -> dict[str, str]:
    """The modules at the top of the standard library, by name; without those that are tables or very long."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("[!_]*.py"))}
    # A form feed ends a line for str.splitlines, and none for the tokenizer.
    return {name: text for name, text in files.items() if 500 < len(text) <= largest and "\f" not in text}


def split(files: dict[str, str]) -> tuple[list[str], list[str]]:
    """Names of the files to train with, and of those to test with: one in six, by the name alone."""
    test = [name for name in files if zlib.crc32(name.encode()) % 6 == 0]
    return [name for name in files if name not in test], test


class Tagger(nn.Module):
    """Embedding, stacked bidirectional LSTM, linear: logits of each character's class."""

    def __init__(self, embedding: int, hidden: int, num_layers: int, layers: ModuleType) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, embedding)
        self.lstm = layers.LSTM(embedding, hidden, num_layers, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(2 * hidden, len(CLASSES))

    def forward(self, characters: Tensor, lengths: Tensor) -> Tensor:
        """Int64 ``[N, T]`` and the lengths ``[N]`` to logits ``[N, T, classes]``."""
        return self.linear(common.run_lengths(self.lstm, self.embedding(characters), lengths)[0])


def f1_scores(predicted: Tensor, classes: Tensor) -> list[float]:
    """F1 of each of `CLASSES`, over characters ``[...]``; entries of ``classes`` that are PADDING do not count.

    F1 is 2 tp / (2 tp + fp + fn), and 0 for a class that neither has.
    """
    predicted, classes = predicted[classes != PADDING], classes[classes != PADDING]
    scores = []
    for kind in range(len(CLASSES)):
        found, true = predicted == kind, classes == kind
        both = int((found & true).sum())
        total = int(found.sum()) + int(true.sum())
        scores.append(2 * both / total if total else 0.0)
    return scores


def commonest_class(train: Windows, characters: Tensor) -> Tensor:
    """The baseline: each character has the class that it has most often in the training part."""
    valid = train.classes != PADDING
    counts = Counter(zip(train.characters[valid].tolist(), train.classes[valid].tolist(), strict=True))
    table = torch.zeros(CHARACTERS, len(CLASSES))
    for (character, kind), count in counts.items():
        table[character, kind] = count
    return table.argmax(1)[characters]


def train(model: Tagger, data: Windows, updates: int, batch: int, learning_rate: float) -> list[float]:
    """The loss of every update."""
    batches = common.shuffled_batches(len(data.lengths), batch)

    def loss_of(_: int) -> Tensor:
        rows = next(batches)
        logits = model(data.characters[rows], data.lengths[rows])
        return nn.functional.cross_entropy(logits.flatten(0, 1), data.classes[rows].flatten(), ignore_index=PADDING)

    return common.fit(model, loss_of, updates, learning_rate=learning_rate)


@torch.inference_mode()
def predict(model: Tagger, data: Windows) -> Tensor:
    """The class of every character, int64 ``[N, T]``; beyond the lengths anything."""
    parts = zip(data.characters.split(64), data.lengths.split(64), strict=True)
    return torch.cat([model(characters, lengths).argmax(-1) for characters, lengths in parts])


def example(data: Windows, predicted: Tensor) -> int:
    """The full window with the most classes in it and, among those, with the most mistakes."""
    kinds = torch.tensor([len(set(row.tolist()) - {PADDING}) for row in data.classes])
    mistakes = ((predicted != data.classes) & (data.classes != PADDING)).sum(1)
    return int(torch.where(data.lengths == WINDOW, 1000 * kinds + mistakes, 0).argmax())


def draw(text: str, true: Sequence[int], predicted: Sequence[int]) -> Figure:
    """A piece of source twice, coloured by its true and by its predicted classes; mistakes on red."""
    lines = text.split("\n")
    width, height = max(map(len, lines)), len(lines)
    figure, panels = plt.subplots(1, 2, figsize=(0.072 * 2 * width, 0.16 * height + 0.9))
    for panel, title, kinds in zip(panels, ("true", "predicted"), (true, predicted), strict=True):
        row, column = 0, 0
        for character, kind, right in zip(text, kinds, true, strict=True):
            if kind != right:
                panel.add_patch(plt.Rectangle((column, row - 0.5), 1, 1, color="#f6b9bb", linewidth=0))
            place = {"ha": "center", "va": "center", "family": "monospace", "size": 8, "parse_math": False}
            panel.text(column + 0.5, row, character.strip(), color=COLOURS[kind], **place)
            row, column = (row + 1, 0) if character == "\n" else (row, column + 1)
        panel.set(title=title, xlim=(0, width), ylim=(height - 0.5, -0.5))
        panel.axis("off")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS[1:]]
    figure.legend(handles, CLASSES[1:], loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    return figure


def run(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """F1 by class on the held-out files, of the model and of the baseline."""
    files = standard_library(6_000 if options.quick else 60_000)
    programs = {name: (text, tags(text)) for name, text in files.items()}
    train_names, test_names = split(files)
    data = windows([programs[name] for name in train_names])
    test = windows([programs[name] for name in test_names])
    size = (16, 32, 1) if options.quick else (32, 96, 2)
    model = Tagger(*size, common.layers(options.backend))
    with common.Timer() as timer:
        updates = 60 if options.quick else 450
        train(model, data, updates, batch=16 if options.quick else 32, learning_rate=2e-2 if options.quick else 4e-3)
    predicted = predict(model, test)
    results = {
        "commonest class": f1_scores(commonest_class(data, test.characters), test.classes),
        "bidirectional LSTM": f1_scores(predicted, test.classes),
    }
    counts = torch.bincount(test.classes[test.classes != PADDING], minlength=len(CLASSES)).tolist()
    common.show(
        f"F1 on {len(test_names)} held-out files, {sum(counts):,} characters; trained on {len(train_names)} files, "
        f"{int(data.lengths.sum()):,} characters; {common.parameter_count(model):,} parameters, {updates} updates, "
        f"{timer.cpu:.0f} s of CPU time",
        ["class", "characters", *results],
        [
            *zip(CLASSES, counts, *results.values(), strict=True),
            ["mean", "", *(sum(scores) / len(scores) for scores in results.values())],
        ],
    )
    shown = example(test, predicted)
    text = "".join(map(chr, test.characters[shown].tolist()))
    common.save(draw(text, test.classes[shown].tolist(), predicted[shown].tolist()), "tagging", options)
    return {name: dict(zip(CLASSES, scores, strict=True)) for name, scores in results.items()}


def main(given: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    return run(common.parse(common.arguments(__doc__), given))


if __name__ == "__main__":
    main()
