"""Beam search for the most likely continuation of a prompt.

Shape suffixes: B live hypotheses, V token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deconv_model.causal_model import CausalModel, StateT, evaluation_mode
from deconv_model.config import require
from deconv_model.generation import complete_prompt
from deconv_model.windows import WindowReader


@dataclass(frozen=True)
class Hypothesis:
    """A continuation that was found.

    Attributes:
        ids: The new ids; the last one is the stop id, unless there was no room for it.
        log_probability: ``ln p(ids | prompt)``.
        score: ``log_probability`` over the length penalty; the larger the better.
    """

    ids: list[int]
    log_probability: float
    score: float


def length_penalty(length: int, alpha: float) -> float:
    """Return ``((5 + length) / 6) ** alpha`` (Wu et al. 2016, arXiv:1609.08144, equation 14)."""
    return float(((5 + length) / 6) ** alpha)


def beam_search(
    model: CausalModel[StateT],
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    beams: int,
    alpha: float = 0.6,
    n_best: int = 1,
    stop_id: int | None = None,
    start_id: int | None = None,
) -> list[Hypothesis]:
    """Search for the continuations with the best scores, keeping a number of hypotheses at each length.

    A hypothesis ends with ``stop_id`` or after ``max_new_tokens`` ids. When one ends with ``stop_id``, the beam gets
    narrower by one (Sutskever et al. 2014, arXiv:1409.3215): one beam is greedy decoding, and a beam with room for all
    sequences finds the best of them. The search is over as soon as no hypothesis that still grows can get a better
    score than those found: its log-probability can only fall, and its length penalty is at most that of the greatest
    length.

    Args:
        model: Used in evaluation mode; its mode is restored.
        prompt_ids: As in :func:`~deconv_model.generation.generate`.
        max_new_tokens: New ids of a hypothesis at most.
        beams: Hypotheses that are kept, those that have ended included.
        alpha: Exponent of the :func:`length_penalty`, 10 at most; 0 compares log-probabilities, which favours short
            hypotheses.
        n_best: Hypotheses to return at most; there are fewer if fewer sequences exist.
        stop_id: Ends a hypothesis.
        start_id: As in :func:`~deconv_model.generation.generate`.

    Returns:
        The best hypotheses, best first.

    Raises:
        ValueError: The prompt cannot be continued (see :func:`~deconv_model.generation.generate`), or an option is out
            of range.
    """
    require(max_new_tokens >= 0, f"max_new_tokens must be at least 0, got {max_new_tokens}")
    require(beams >= 1, f"beams must be at least 1, got {beams}")
    require(0.0 <= alpha <= 10.0, f"alpha must be in [0, 10], got {alpha}")
    require(1 <= n_best <= beams, f"n_best must be in [1, {beams}], as there are {beams} beams, got {n_best}")
    prompt = complete_prompt(prompt_ids, model.config.vocab_size, stop_id=stop_id, start_id=start_id)
    largest_penalty = length_penalty(max_new_tokens, alpha)
    with evaluation_mode(model), torch.inference_mode():
        reader = WindowReader(model)
        live = [prompt]
        live_scores = [0.0]
        ended: list[Hypothesis] = []
        for length in range(1, max_new_tokens + 1):
            rows, tokens, scores = _best_steps(reader, live, live_scores, beams - len(ended))
            penalty = length_penalty(length, alpha)
            going = []
            for i, (row, token, score) in enumerate(zip(rows, tokens, scores, strict=True)):
                if token == stop_id:
                    ended.append(Hypothesis([*live[row][len(prompt) :], token], score, score / penalty))
                else:
                    going.append(i)
            live = [[*live[rows[i]], tokens[i]] for i in going]
            live_scores = [scores[i] for i in going]
            ended.sort(key=lambda hypothesis: -hypothesis.score)
            if not live or (len(ended) >= n_best and ended[n_best - 1].score >= live_scores[0] / largest_penalty):
                live, live_scores = [], []
                break
            reader.reorder([rows[i] for i in going])
    # What still grows at the end has the greatest length.
    ended += [
        Hypothesis(ids[len(prompt) :], score, score / largest_penalty)
        for ids, score in zip(live, live_scores, strict=True)
    ]
    return sorted(ended, key=lambda hypothesis: -hypothesis.score)[:n_best]


def _best_steps(
    reader: WindowReader[StateT], live: list[list[int]], live_scores: list[float], count: int
) -> tuple[list[int], list[int], list[float]]:
    """Return which hypothesis each of the most likely next ones continues, with which id, and their log-probabilities.

    They are in order of falling log-probability.
    """
    log_p_BV = reader.read(live).double().log_softmax(dim=-1)
    log_p_BV += torch.tensor(live_scores, dtype=log_p_BV.dtype, device=log_p_BV.device)[:, None]
    best = log_p_BV.flatten().topk(min(count, log_p_BV.numel()))
    vocab_size = log_p_BV.shape[1]
    places: list[int] = best.indices.tolist()
    scores: list[float] = best.values.tolist()
    return [place // vocab_size for place in places], [place % vocab_size for place in places], scores
