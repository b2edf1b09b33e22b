"""One-to-many: a character language model of the Python reference, sampled a character at a time."""

from __future__ import annotations

import argparse
import lzma
import math
from collections import Counter
from collections.abc import Sequence
from typing import cast

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastrnn
from bench.charlm import CharModel, Settings, State, batches, load_text
from examples import _common as common

TEMPERATURES = (0.3, 0.7, 1.1)
HELD_OUT = 0.1  # the end of the text


def unique_paragraphs(text: str) -> str:
    """The text without the paragraphs that it has had before.

    Topics of ``help()`` share passages; a model that has read one of them would be tested on what it knows by heart.
    """
    return "\n\n".join(dict.fromkeys(text.split("\n\n")))


def ngram_bits(train: Sequence[int], test: Sequence[int], order: int, alphabet: int) -> float:
    """Bits per character of a model of ``order`` characters, the predicted one included.

    Orders are interpolated as Witten and Bell (1991) do: a context with n occurrences and k different successors gives
    the next shorter one the weight k / (n + k). The shortest of all is uniform.
    """
    pairs: list[Counter[tuple[int, ...]]] = [
        Counter(zip(*(train[start:] for start in range(length)), strict=False)) for length in range(1, order + 1)
    ]
    totals: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order)]
    kinds: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order)]
    for pair, total, kind in zip(pairs, totals, kinds, strict=True):
        for gram, count in pair.items():
            total[gram[:-1]] += count
            kind[gram[:-1]] += 1
    bits = 0.0
    for place in range(order - 1, len(test)):  # the first characters have no full context
        probability = 1.0 / alphabet
        for length in range(order):
            gram = tuple(test[place - length : place + 1])
            count, different = totals[length][gram[:-1]], kinds[length][gram[:-1]]
            if not count:
                break
            probability = (pairs[length][gram] + different * probability) / (count + different)
        bits -= math.log2(probability)
    return bits / (len(test) - order + 1)


def lzma_bits(train: str, test: str) -> float:
    """Bits per character that lzma needs for ``test`` once it has compressed ``train``."""
    sizes = [len(lzma.compress(text.encode(), preset=9)) for text in (train, train + test)]
    return 8 * (sizes[1] - sizes[0]) / len(test)


@torch.inference_mode()
def bits_per_character(model: CharModel, text: Tensor) -> float:
    """The model's bits per character of a text ``[characters]``, read from its beginning with a carried state."""
    state: State | None = None
    total = 0.0
    pieces = zip(text[:-1].split(1000), text[1:].split(1000), strict=True)
    for characters, following in pieces:
        logits, state = model(characters[:, None], state)
        total += nn.functional.cross_entropy(logits[:, 0], following, reduction="sum").item()
    return total / math.log(2) / (len(text) - 1)


@torch.inference_mode()
def sample(model: CharModel, prompt: Tensor, length: int, temperature: float, seed: int = 0) -> Tensor:
    """Continue ``prompt``, int64 ``[characters]``, by ``length`` characters, one step of a session each.

    Parameters
    ----------
    temperature : float
        Divides the logits: below one the likely becomes likelier, near zero it is the only one.
    """
    generator = torch.Generator().manual_seed(seed)
    session = fastrnn.StreamingSession(cast(nn.RNNBase, model.lstm))  # keeps the state, its weights packed once
    output = session.chunk(model.embedding(prompt))[-1]
    characters = []
    for _ in range(length):
        probabilities = (model.linear(output) / temperature).softmax(-1)
        characters.append(torch.multinomial(probabilities, 1, generator=generator)[0])
        session.step(model.embedding(characters[-1]), output)
    return torch.stack(characters)


def train(model: CharModel, text: Tensor, settings: Settings) -> list[float]:
    """Bits per character of every update; the state is carried from batch to batch, the gradient is not."""
    stream = batches(text, settings)
    state: State | None = None

    def loss_of(_: int) -> Tensor:
        nonlocal state
        batch, first = next(stream)  # [T + 1, N]
        logits, after = model(batch[:-1], None if first else state)
        state = after[0].detach(), after[1].detach()
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[1:].flatten())

    losses = common.fit(model, loss_of, settings.updates, learning_rate=settings.learning_rate, clip=settings.clip)
    return [loss / math.log(2) for loss in losses]


def draw(curve: Sequence[float], bits: dict[str, float]) -> Figure:
    """Bits per character over the updates, and those of the baselines on the held-out text."""
    figure, axes = plt.subplots(figsize=(8, 4.2))
    axes.plot(curve, color="#c9dcec", linewidth=0.8, label="training, each update")
    axes.plot(common.smooth(curve, 50), color="#2a78b5", label="training, mean of 50")
    for (name, value), style in zip(bits.items(), (":", ":", ":", "--", "-"), strict=True):
        ours = name == "LSTM"  # its label to the left: it may lie on another line
        axes.axhline(value, color="#c0282d" if ours else "#666666", linestyle=style, linewidth=1)
        axes.annotate(
            f"{name}, held out: {value:.2f}",
            (0.5 if ours else 1, value),
            xycoords=("axes fraction", "data"),
            xytext=(-4, -11 if ours else 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
    axes.set(xlabel="update", ylabel="bits per character", ylim=(1, 5.5), title="The Python reference, by character")
    axes.legend(loc="lower left", fontsize=8)
    return figure


def run(options: argparse.Namespace) -> tuple[dict[str, float], dict[float, str]]:
    """Bits per character on the held-out text of each model, and a text at each temperature."""
    text = unique_paragraphs(load_text())[: 60_000 if options.quick else None]
    alphabet = "".join(sorted(set(text)))
    characters = torch.tensor([alphabet.index(character) for character in text])
    border = int(len(text) * (1 - HELD_OUT))
    settings = (
        Settings(embedding_size=32, hidden_size=96, num_layers=1, steps=48, updates=120, learning_rate=2e-2)
        if options.quick
        else Settings(batch=32, updates=1200, learning_rate=5e-3)
    )
    pieces = characters[:border].tolist(), characters[border:].tolist()
    names = {"characters": 1, "pairs": 2, "5-grams": 5}
    bits = {name: ngram_bits(*pieces, order, len(alphabet)) for name, order in names.items()}
    bits["lzma"] = lzma_bits(text[:border], text[border:])

    model = CharModel(len(alphabet), settings, common.layers(options.backend).LSTM)
    with common.Timer() as timer:
        curve = train(model, characters[:border], settings)
    bits["LSTM"] = bits_per_character(model, characters[border:])
    common.show(
        f"bits per character of the last {len(pieces[1]):,} of {len(text):,} characters; LSTM: "
        f"{common.parameter_count(model):,} parameters, {settings.updates} updates, {timer.cpu:.0f} s of CPU time",
        ["model", "bits"],
        bits.items(),
    )
    prompt, length = "The statement ", 80 if options.quick else 300
    start = torch.tensor([alphabet.index(character) for character in prompt])
    texts = {}
    for temperature in TEMPERATURES:
        with common.Timer() as timer:
            made = sample(model, start, length, temperature, options.seed)
        texts[temperature] = "".join(alphabet[character] for character in made.tolist())
        common.console.print(
            f"temperature {temperature}, {1e6 * timer.seconds / length:.0f} us a character:", style="bold"
        )
        common.console.print(prompt + texts[temperature], style="cyan", markup=False, highlight=False)
    common.save(draw(curve, bits), "generate", options)
    return bits, texts


def main(given: Sequence[str] | None = None) -> tuple[dict[str, float], dict[float, str]]:
    return run(common.parse(common.arguments(__doc__), given))


if __name__ == "__main__":
    main()
