"""How the next token is chosen from its logits.

Shape suffixes: B sequences, V token ids, K candidates in order of falling probability.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deconv_model.config import require

_SHORTLIST = 256  # candidates to which top-p and min-p look first: sorting them all takes six times as long


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """What the distribution of the next token goes through, in this order, before a token is drawn from it.

    Attributes:
        repetition_penalty: Positive logits of the ids that occur in the prompt or the continuation are divided by it,
            negative ones multiplied (CTRL, Keskar et al. 2019, arXiv:1909.05858). 1 changes nothing.
        temperature: Divides the logits; 0 takes the most likely id, the smallest of equals.
        top_k: Only this many most likely ids (Fan et al. 2018, arXiv:1805.04833); 0 means all.
        top_p: Only the fewest most likely ids whose probabilities, among those left, add up to this (nucleus sampling,
            Holtzman et al. 2020, arXiv:1904.09751). 1 means all.
        min_p: Only ids with at least this part of the probability of the most likely one (Nguyen et al. 2024,
            arXiv:2407.01082). 0 means all.
        seed: Of the draws. Sequence i of a batch draws with ``seed + i``, whatever the others do.

    Raises:
        ValueError: A value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            0.0 <= self.temperature < math.inf, f"temperature must be at least 0 and finite, got {self.temperature}"
        )
        require(
            isinstance(self.top_k, int) and self.top_k >= 0,
            f"top_k must be a whole number of at least 0, got {self.top_k}",
        )
        require(0.0 < self.top_p <= 1.0, f"top_p must be above 0 and at most 1, got {self.top_p}")
        require(0.0 <= self.min_p <= 1.0, f"min_p must be in [0, 1], got {self.min_p}")
        penalty = self.repetition_penalty
        require(0.0 < penalty < math.inf, f"repetition_penalty must be above 0 and finite, got {penalty}")
        require(
            isinstance(self.seed, int) and 0 <= self.seed < 2**63,
            f"seed must be a whole number in [0, 2**63), got {self.seed}",
        )


DEFAULT_OPTIONS = SamplingOptions()


class Sampler:
    """Chooses the next ids of a batch of sequences, of which each has random numbers of its own.

    Args:
        options: How.
        prompts: The ids that the repetition penalty knows from the beginning, of each sequence.
        vocab_size: Number of token ids.
        device: Of the logits. The random numbers are made on the CPU, so that a seed means the same everywhere.
    """

    def __init__(
        self, options: SamplingOptions, prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device
    ) -> None:
        self._options = options
        self._generators: list[torch.Generator] = []
        if options.temperature > 0:
            self._generators = [torch.Generator().manual_seed(options.seed + i) for i in range(len(prompts))]
        self._seen_BV: Tensor | None = None
        if options.repetition_penalty != 1.0:
            self._seen_BV = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
            for seen_V, prompt in zip(self._seen_BV, prompts, strict=True):
                seen_V[torch.tensor(prompt, device=device)] = True

    @torch.inference_mode()
    def sample(self, logits_BV: Tensor, sequences: Sequence[int]) -> list[int]:
        """Return the next id of some of the sequences.

        Args:
            logits_BV: Of these sequences.
            sequences: Their numbers among the prompts, [B].
        """
        if self._seen_BV is not None:
            chosen = torch.tensor(sequences, device=logits_BV.device)
            logits_BV = penalise_repetition(logits_BV, self._seen_BV[chosen], self._options.repetition_penalty)
        ids_B = self._draw(logits_BV, sequences) if self._generators else logits_BV.argmax(dim=-1)
        if self._seen_BV is not None:
            self._seen_BV[chosen, ids_B.to(chosen.device)] = True
        ids: list[int] = ids_B.tolist()
        return ids

    def _draw(self, logits_BV: Tensor, sequences: Sequence[int]) -> Tensor:
        options = self._options
        all_k = options.top_k == 0 or options.top_k >= logits_BV.shape[1]
        if all_k and options.top_p == 1.0 and options.min_p == 0.0:
            probabilities_BV = _scaled(logits_BV.double(), options.temperature).softmax(dim=-1)
            return self._race(probabilities_BV, [logits_BV.shape[1]] * len(sequences), sequences)
        probabilities_BK, candidates_BK = kept_candidates(logits_BV, options)
        counts = [probabilities_BK.shape[1]] * len(sequences)
        if options.top_p < 1.0 or options.min_p > 0.0:
            # How many numbers a sequence takes must not depend on how many candidates the others have.
            counts = (probabilities_BK > 0).sum(dim=-1).tolist()
        winners_B = self._race(probabilities_BK, counts, sequences)
        return candidates_BK.gather(1, winners_B.to(candidates_BK.device)[:, None])[:, 0]

    def _race(self, probabilities_BK: Tensor, counts: Sequence[int], sequences: Sequence[int]) -> Tensor:
        """Draw [B] indices below ``counts``, each as ``torch.multinomial`` does: the least of exponential waits."""
        waits_BK = torch.ones(probabilities_BK.shape, dtype=probabilities_BK.dtype)
        for wait_K, count, sequence in zip(waits_BK, counts, sequences, strict=True):
            wait_K[:count].exponential_(generator=self._generators[sequence])
        return (probabilities_BK.cpu() / waits_BK).argmax(dim=-1)


def penalise_repetition(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Return the logits with those of the seen ids made smaller (Keskar et al. 2019), for a penalty above 1.

    Args:
        logits_BV: Any floating type; not changed.
        seen_BV: Booleans.
        penalty: Divides positive logits and multiplies negative ones.
    """
    return torch.where(seen_BV, torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def kept_candidates(logits_BV: Tensor, options: SamplingOptions) -> tuple[Tensor, Tensor]:
    """Apply temperature, top-k, top-p and min-p, of which at least one of the last three leaves ids out.

    Returns:
        Probabilities [B, K] in float64 of the candidates, in falling order, relative to each other only; those of ids
        that are left out are 0. And the candidates' ids [B, K]. K is as large as it must be.
    """
    vocab_size = logits_BV.shape[1]
    if options.top_k:
        return _likeliest(logits_BV, options, min(options.top_k, vocab_size))
    probabilities_BK, candidates_BK = _likeliest(logits_BV, options, min(_SHORTLIST, vocab_size))
    if probabilities_BK.shape[1] < vocab_size and bool((probabilities_BK[:, -1] > 0).any()):
        return _likeliest(logits_BV, options, vocab_size)  # what is kept may go on after the short list
    return probabilities_BK, candidates_BK


def _likeliest(logits_BV: Tensor, options: SamplingOptions, count: int) -> tuple[Tensor, Tensor]:
    values_BK, candidates_BK = logits_BV.topk(count)
    scaled_BK = _scaled(values_BK.double(), options.temperature)
    if options.top_k:
        probabilities_BK = scaled_BK.softmax(dim=-1)
    else:
        normaliser_B = _scaled(logits_BV, options.temperature).logsumexp(dim=-1)
        probabilities_BK = (scaled_BK - normaliser_B[:, None]).exp()
    kept_BK = probabilities_BK >= options.min_p * probabilities_BK[:, :1]
    if options.top_p < 1.0:
        before_BK = probabilities_BK.cumsum(dim=-1) - probabilities_BK
        kept_BK &= before_BK < options.top_p
    return probabilities_BK.where(kept_BK, 0.0), candidates_BK


def _scaled(logits_BV: Tensor, temperature: float) -> Tensor:
    """Return the logits relative to the largest, divided by the temperature: none overflows, however cold it is."""
    # In float32 a smaller divisor would be 0, and the largest logit 0 / 0.
    return (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / max(temperature, 1e-30)
