import math

import numpy as np
import pytest

from deconv_model.metrics import (
    bits_per_byte,
    bootstrap_interval,
    paired_bootstrap_interval,
    token_perplexity,
    uniform_nats,
    unigram_nats,
    word_perplexity,
)


def test_a_uniform_guess_over_bytes_costs_eight_bits_a_byte():
    nats = float(uniform_nats(256, 1000))
    assert bits_per_byte(nats, 1000) == pytest.approx(8.0, rel=1e-12)
    assert token_perplexity(nats, 1000) == pytest.approx(256.0, rel=1e-12)


def test_published_numbers_convert_into_each_other():
    # AWD-LSTM on the test split of WikiText-2, which has 5.1165 bytes a word: 65.8 word perplexity, 1.181 bits a byte.
    nats = 1000 * math.log(65.8)
    assert word_perplexity(nats, 1000) == pytest.approx(65.8, rel=1e-12)
    assert bits_per_byte(nats, 5116.5) == pytest.approx(1.181, abs=1e-3)


def test_a_hopeless_model_has_infinite_perplexity():
    assert token_perplexity(1e6, 1) == math.inf


@pytest.mark.parametrize("measure", [bits_per_byte, token_perplexity, word_perplexity])
def test_an_empty_text_cannot_be_measured(measure):
    with pytest.raises(ValueError, match="cannot measure a text of 0"):
        measure(1.0, 0)


def documents_like(seed, n):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 400, size=n).astype(float)
    return sizes * generator.gamma(20.0, 0.05, size=n), sizes


def test_the_interval_is_that_of_a_naive_loop():
    nats, sizes = documents_like(1, 60)
    generator = np.random.default_rng(7)
    ratios = []
    for _ in range(400):
        numerator = denominator = 0.0
        for document in generator.integers(0, 60, size=60):
            numerator += nats[document]
            denominator += sizes[document]
        ratios.append(numerator / denominator)
    ratios.sort()
    low, high = bootstrap_interval(nats, sizes, resamples=400, seed=7, confidence=0.9)
    assert low == pytest.approx(np.quantile(ratios, 0.05), rel=1e-12)
    assert high == pytest.approx(np.quantile(ratios, 0.95), rel=1e-12)


def test_the_interval_does_not_depend_on_how_draws_are_chunked(monkeypatch):
    nats, sizes = documents_like(2, 37)
    whole = bootstrap_interval(nats, sizes, resamples=300, seed=1)
    for chunk in (1, 100, 37 * 7):
        monkeypatch.setattr("deconv_model.metrics._CHUNK", chunk)
        assert bootstrap_interval(nats, sizes, resamples=300, seed=1) == whole


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    truth = 20.0 * 0.05
    covered = 0
    for seed in range(200):
        nats, sizes = documents_like(seed, 80)
        low, high = bootstrap_interval(nats, sizes, resamples=300, seed=seed, confidence=0.8)
        covered += low <= truth <= high
    assert 0.70 < covered / 200 < 0.88


def test_the_interval_narrows_with_documents_and_confidence():
    nats, sizes = documents_like(3, 1000)

    def width(n, confidence):
        low, high = bootstrap_interval(nats[:n], sizes[:n], confidence=confidence)
        return high - low

    assert width(1000, 0.95) < width(100, 0.95)
    assert width(100, 0.5) < width(100, 0.95)


def test_one_document_gives_a_point():
    assert bootstrap_interval([3.0], [2.0]) == (1.5, 1.5)


def test_documents_without_bytes_count_their_nats_and_undefined_draws_are_left_out():
    low, high = bootstrap_interval([1.0, 4.0], [0.0, 2.0], seed=0)
    assert (low, high) == (2.0, 2.5)  # the draws are (4+4)/4 and (1+4)/2; (1+1)/0 has no ratio


def test_pairing_cancels_what_both_models_find_hard():
    nats, sizes = documents_like(4, 300)
    better = nats - 0.01 * sizes
    difference, low, high = paired_bootstrap_interval(better, nats, sizes)
    assert difference == pytest.approx(-0.01, rel=1e-9)
    assert low == pytest.approx(-0.01, rel=1e-9)
    assert high == pytest.approx(-0.01, rel=1e-9)
    alone = bootstrap_interval(nats, sizes)
    assert alone[1] - alone[0] > 0.01


def test_a_paired_difference_of_noise_spans_zero():
    nats, sizes = documents_like(5, 200)
    noise = np.random.default_rng(0).normal(0.0, 1.0, size=200)
    difference, low, high = paired_bootstrap_interval(nats + noise - noise.mean(), nats, sizes)
    assert low < 0.0 < high
    assert low <= difference <= high


@pytest.mark.parametrize(
    ("numerator", "denominator", "options"),
    [
        ([], [], {}),
        ([1.0, 2.0], [1.0], {}),
        ([[1.0]], [[1.0]], {}),
        ([1.0, 2.0], [1.0, -1.0], {}),
        ([1.0, 2.0], [0.0, 0.0], {}),
        ([1.0, float("nan")], [1.0, 1.0], {}),
        ([1.0], [float("inf")], {}),
        ([1.0], [1.0], {"resamples": 0}),
        ([1.0], [1.0], {"confidence": 1.0}),
    ],
)
def test_an_interval_of_nonsense_is_refused(numerator, denominator, options):
    with pytest.raises(ValueError, match=r"need|must"):
        bootstrap_interval(numerator, denominator, **options)


def test_a_pair_on_different_documents_is_refused():
    with pytest.raises(ValueError, match="same documents"):
        paired_bootstrap_interval([1.0, 2.0], [1.0], [1.0, 1.0])


def test_unigram_nats_are_those_of_a_naive_loop():
    counts = [5, 0, 2, 9]
    documents = [np.array([0, 1, 3]), np.array([2]), np.array([], dtype=np.int64), np.array([3, 3, 3, 0])]
    expected = []
    for ids in documents:
        nats = 0.0
        for token in ids:
            nats -= math.log((counts[token] + 1) / (sum(counts) + 4))
        expected.append(nats)
    assert unigram_nats(counts, documents).tolist() == pytest.approx(expected, rel=1e-12)


def test_unigram_probabilities_sum_to_one():
    nats = unigram_nats([3, 0, 8, 1, 0], [np.array([token]) for token in range(5)])
    assert np.exp(-nats).sum() == pytest.approx(1.0, rel=1e-12)


def test_unigram_without_training_text_is_uniform():
    documents = [np.array([0, 3, 2]), np.array([1])]
    assert unigram_nats(np.zeros(4), documents) == pytest.approx(uniform_nats(4, [3, 1]), rel=1e-12)


@pytest.mark.parametrize("ids", [[4], [-1, 0]])
def test_an_id_outside_the_vocabulary_is_refused(ids):
    with pytest.raises(ValueError, match="vocabulary of 4"):
        unigram_nats([1, 1, 1, 1], [np.array(ids)])


@pytest.mark.parametrize("counts", [[], [1, -1], [[1]]])
def test_counts_that_are_no_counts_are_refused(counts):
    with pytest.raises(ValueError, match="train_counts"):
        unigram_nats(counts, [])
