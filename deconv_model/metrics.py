"""Measures of a language model, from nats summed over a text, with intervals over its documents.

A nat is ``-ln p(token | context)``. Bits per byte and word perplexity compare models with different tokenizers, token
perplexity does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

_CHUNK = 1 << 21  # documents drawn at once by the bootstrap: some 50 MB


def bits_per_byte(nats: float, bytes: float) -> float:
    """Return ``nats / (ln 2 * bytes)``, bytes being those of the UTF-8 text (Gao et al. 2020, arXiv:2101.00027).

    Raises:
        ValueError: There are no bytes.
    """
    return _per(nats, bytes, "bytes") / math.log(2.0)


def token_perplexity(nats: float, tokens: float) -> float:
    """Return ``exp(nats / tokens)`` (Jelinek et al. 1977).

    Raises:
        ValueError: There are no tokens.
    """
    return _exp(_per(nats, tokens, "tokens"))


def word_perplexity(nats: float, words: float) -> float:
    """Return ``exp(nats / words)``: the probability of the whole text, spread over its words.

    Words count the ends of lines or documents that are predicted too, as in Merity et al. 2016 (arXiv:1609.07843), so
    that subword models stand beside word models; see Mielke 2019, "Can you compare perplexity across different
    segmentations?".

    Raises:
        ValueError: There are no words.
    """
    return _exp(_per(nats, words, "words"))


def bootstrap_interval(
    numerator: ArrayLike,
    denominator: ArrayLike,
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of ``sum(numerator) / sum(denominator)``.

    Documents are drawn with replacement, whole, because the tokens inside one depend on each other (Efron and
    Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13). Draws whose denominators are all 0 have no ratio
    and are left out. The interval is a point when there is one document.

    Args:
        numerator: [documents], such as nats.
        denominator: [documents], such as bytes; not negative.
        resamples: Draws of as many documents as there are.
        seed: Of the draws.
        confidence: Probability mass inside the interval.

    Returns:
        The low and the high end.

    Raises:
        ValueError: No documents, different lengths, a negative denominator or only zeros, a value that is not finite,
            or ``resamples`` or ``confidence`` out of range.
    """
    top = np.asarray(numerator, dtype=np.float64)
    bottom = np.asarray(denominator, dtype=np.float64)
    if top.ndim != 1 or top.shape != bottom.shape or not top.size:
        raise ValueError(f"need one numerator and one denominator a document, got {top.shape} and {bottom.shape}")
    if not (np.isfinite(top).all() and np.isfinite(bottom).all()):
        raise ValueError("numerators and denominators must be finite")
    if (bottom < 0).any() or not bottom.any():
        raise ValueError("denominators must not be negative, and not all 0")
    if resamples < 1 or not 0.0 < confidence < 1.0:
        raise ValueError(f"need resamples >= 1 and 0 < confidence < 1, got {resamples} and {confidence}")

    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // top.size)
    ratios = []
    for first in range(0, resamples, rows):
        drawn = generator.integers(0, top.size, size=(min(rows, resamples - first), top.size))
        sums = bottom[drawn].sum(axis=1)
        some = sums > 0
        ratios.append(top[drawn].sum(axis=1)[some] / sums[some])
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(np.concatenate(ratios), [tail, 1.0 - tail])
    return float(low), float(high)


def paired_bootstrap_interval(
    numerator_a: ArrayLike,
    numerator_b: ArrayLike,
    denominator: ArrayLike,
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Return ``(sum(a) - sum(b)) / sum(denominator)`` and its bootstrap interval, both models on the same documents.

    What makes a document easy or hard for both cancels, so the interval is far narrower than those of the two models
    (Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation"). Arguments and errors are those of
    :func:`bootstrap_interval`.

    Returns:
        The difference (below 0 when a has less), the low and the high end.
    """
    a = np.asarray(numerator_a, dtype=np.float64)
    b = np.asarray(numerator_b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"both models need the same documents, got {a.shape} and {b.shape}")
    interval = bootstrap_interval(a - b, denominator, resamples=resamples, seed=seed, confidence=confidence)
    return float((a - b).sum() / np.asarray(denominator, dtype=np.float64).sum()), *interval


def unigram_nats(train_counts: ArrayLike, documents: Iterable[NDArray[np.integer]]) -> FloatArray:
    """Return the nats of each document under the token frequencies of the train split, as float64 [documents].

    ``p(v) = (count(v) + 1) / (sum of counts + V)`` (Laplace smoothing), so that unseen tokens have a probability.

    Args:
        train_counts: [V] occurrences of each token.
        documents: Ids of each document, all of which count, the end-of-document id too.

    Raises:
        ValueError: The counts are not [V] or negative, or a document has an id outside them.
    """
    counts = np.asarray(train_counts, dtype=np.float64)
    if counts.ndim != 1 or not counts.size or (counts < 0).any():
        raise ValueError("train_counts must be one count, at least 0, for each token of the vocabulary")
    nats = np.log(counts.sum() + counts.size) - np.log(counts + 1.0)
    sums = []
    for ids in documents:
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < counts.size:
            raise ValueError(f"ids {ids.min()} to {ids.max()} do not fit a vocabulary of {counts.size}")
        sums.append(nats[ids].sum())
    return np.array(sums, dtype=np.float64)


def uniform_nats(vocab_size: int, tokens: ArrayLike) -> FloatArray:
    """Return ``tokens * ln(vocab_size)`` as float64 in the shape of ``tokens``: every token equally likely."""
    return np.asarray(tokens, dtype=np.float64) * math.log(vocab_size)


def _per(nats: float, count: float, what: str) -> float:
    if count <= 0:
        raise ValueError(f"cannot measure a text of {count} {what}")
    return nats / count


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
