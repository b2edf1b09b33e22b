"""Encoder-decoder: letters to phonemes on the CMU dictionary, plain, with attention, and a Transformer beside them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from examples._common import Timer, arguments, console, fit, parameter_count, parse, save, seed, show, smooth
from examples._g2p_data import (
    END,
    PAD,
    PHONEMES,
    START,
    Pairs,
    Pronunciation,
    baseline,
    dictionary,
    error_rates,
    part,
)
from examples._g2p_models import Recurrent, Transformer, beam_search

MODELS = ("plain", "attention-dot", "attention-additive", "transformer")
SHOWN = ("knowledge", "photography")  # the words of the attention maps; left out of the training


@dataclass(frozen=True)
class Settings:
    """Sizes of the models and of the run; all models have about as many parameters."""

    hidden: int = 192
    embedding: int = 64
    transformer: int = 96
    batch: int = 128
    epochs: float = 3
    learning_rate: float = 4e-3
    transformer_rate: float = 2e-3  # a recurrent network's is too large for it
    beam: int = 3
    test_words: int | None = None  # None: all
    longest: int = 99  # letters

    @classmethod
    def quick(cls) -> Settings:
        """Short words, few of them, once."""
        return cls(hidden=64, embedding=32, transformer=32, batch=64, epochs=0.15, test_words=100, longest=5, beam=2)


@dataclass
class Result:
    """What became of one model."""

    parameters: int
    losses: list[float]  # of every update
    seconds: float  # of the processor, for training
    tokens: int  # letters and phonemes, seen in training
    search_seconds: dict[int, float]  # by width of the beam
    rates: dict[int, tuple[float, float]]  # phoneme and word error rate, by width of the beam


def make(name: str, settings: Settings, backend: str) -> Recurrent | Transformer:
    """A new model by its name in `MODELS`."""
    if name == "transformer":
        return Transformer(settings.transformer)
    _, _, attention = name.partition("-")
    return Recurrent(attention or None, settings.hidden, settings.embedding, backend)


def previous(phonemes: Tensor) -> Tensor:
    """What the decoder has seen before each of ``phonemes [N, S]``."""
    return torch.cat([torch.full_like(phonemes[:, :1], START), phonemes[:, :-1]], 1)


def loss_of(model: nn.Module, batch: Pairs) -> Tensor:
    """Mean cross-entropy of a phoneme, the end being one."""
    logits = model(batch.letters, batch.lengths, previous(batch.phonemes))
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch.phonemes.flatten(), ignore_index=PAD)


def pronounce(
    model: Recurrent | Transformer, words: Sequence[str], width: int, batch: int = 512
) -> list[Pronunciation]:
    """The model's pronunciations, in the order of the words."""
    pairs = Pairs.of([(word, ()) for word in words])
    found: dict[int, Pronunciation] = {}
    for rows in pairs.lengths.argsort().split(batch):  # alike in length: they end at about the same step
        chunk = pairs.take(rows)
        phonemes, _ = beam_search(model, chunk.letters, chunk.lengths, width)
        for row, numbers in zip(rows.tolist(), phonemes.tolist(), strict=True):
            found[row] = tuple(PHONEMES[number - END - 1] for number in numbers if number > END)
    return [found[row] for row in range(len(words))]


def run(
    name: str, train: Pairs, words: dict[str, list[Pronunciation]], settings: Settings, options: argparse.Namespace
) -> tuple[Recurrent | Transformer, Result]:
    """Train one model, and measure it on ``words``."""
    seed(options.seed)  # a model's run is the same alone, after others, and with the other backend
    batches = train.batches(settings.batch)
    model = make(name, settings, options.backend)
    updates = int(settings.epochs * len(train.lengths)) // settings.batch
    tokens = 0

    def next_loss(_: int) -> Tensor:
        nonlocal tokens
        batch = next(batches)
        tokens += int(batch.lengths.sum() + batch.steps.sum())
        return loss_of(model, batch)

    rate = settings.transformer_rate if name == "transformer" else settings.learning_rate
    with Timer() as timer:
        losses = fit(model, next_loss, updates, learning_rate=rate, description=name)
    result = Result(parameter_count(model), losses, timer.cpu, tokens, {}, {})
    for width in (1, settings.beam):
        with Timer() as timer:
            found = pronounce(model, list(words), width)
        result.search_seconds[width] = timer.cpu
        result.rates[width] = error_rates(found, list(words.values()))
    return model, result


def picture(
    models: dict[str, Recurrent | Transformer], results: dict[str, Result], options: argparse.Namespace
) -> None:
    """The loss curves, and where each model with attention looks while it speaks."""
    attentive = {name: model for name, model in models.items() if name.startswith("attention")}
    count = len(attentive)
    figure = plt.figure(figsize=(4.5 + 3.6 * count, 7.0 if count else 4.0))
    grid = figure.add_gridspec(2 if count else 1, 1 + count, width_ratios=[1.2, *[1] * count])
    axes = figure.add_subplot(grid[:, 0])
    for name, result in results.items():
        axes.plot(smooth(result.losses, max(1, len(result.losses) // 50)), label=name)
    axes.set(xlabel="update", ylabel="loss, nats per phoneme", yscale="log", title="training")
    ticks = (0.2, 0.3, 0.5, 1, 2, 3)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(color="#dddddd")
    axes.legend()
    for column, (name, model) in enumerate(attentive.items(), 1):
        for row, word in enumerate(SHOWN):
            spoken = pronounce(model, [word], width=1)[0]
            pair = Pairs.of([(word, spoken)])
            assert isinstance(model, Recurrent)
            weights = model.alignment(pair.letters, pair.lengths, previous(pair.phonemes))[0]
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
            axes.set_xticks(range(len(word)), list(word))
            axes.set_yticks(range(len(spoken) + 1), [*spoken, "(end)"])
            axes.set_title(name, fontsize=10)
    save(figure, "g2p", options)


def main(given: Sequence[str] | None = None) -> dict[str, Result]:
    parser = arguments(__doc__)
    parser.add_argument("--model", choices=(*MODELS, "all"), default="all")
    parser.add_argument("--part", choices=("test", "valid"), default="test", help="the words to measure with")
    parser.add_argument("--epochs", type=float, help="how often each word is trained on (3; --quick: less than once)")
    options = parse(parser, given)
    settings = Settings.quick() if options.quick else Settings()
    if options.epochs is not None:
        settings = replace(settings, epochs=options.epochs)

    words = {word: spoken for word, spoken in dictionary().items() if len(word) <= settings.longest}
    pairs = [
        (word, one) for word, spoken in words.items() if part(word) == "train" and word not in SHOWN for one in spoken
    ]
    measured = [word for word in words if part(word) == options.part][: settings.test_words]
    references = {word: words[word] for word in measured}
    console.print(
        f"{len(pairs):,} words with a pronunciation to train on, {len(measured):,} of {options.part} to measure"
    )

    train = Pairs.of(pairs)
    models, results = {}, {}
    for name in MODELS if options.model == "all" else (options.model,):
        models[name], results[name] = run(name, train, references, settings, options)
    report(results, error_rates(baseline(pairs, measured), list(references.values())), settings, options)
    picture(models, results, options)
    return results


def report(
    results: dict[str, Result], simple: tuple[float, float], settings: Settings, options: argparse.Namespace
) -> None:
    """Print the two tables."""
    beam = settings.beam
    show(
        f"Error rates in %, {options.part} words",
        ("model", "parameters", "PER", "WER", f"PER, beam {beam}", f"WER, beam {beam}"),
        [
            ("a phoneme a letter", "", *(f"{100 * rate:.2f}" for rate in simple), "", ""),
            *(
                (
                    name,
                    f"{one.parameters:,}",
                    *(f"{100 * rate:.2f}" for width in (1, beam) for rate in one.rates[width]),
                )
                for name, one in results.items()
            ),
        ],
    )
    show(
        f"Seconds of the processor, {torch.get_num_threads()} thread(s), layers of {options.backend}",
        ("model", "updates", "last loss", "training", "tokens/s", "greedy", f"beam {beam}"),
        (
            (
                name,
                len(one.losses),
                smooth(one.losses, 100)[-1],
                f"{one.seconds:.1f}",
                f"{one.tokens / one.seconds:,.0f}",
                *(f"{one.search_seconds[width]:.1f}" for width in (1, beam)),
            )
            for name, one in results.items()
        ),
    )


if __name__ == "__main__":
    main()
