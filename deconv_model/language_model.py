"""The causal hourglass language model.

Token embeddings pass gated convolutions at full rate, a strided convolution to a coarser and wider level, blocks
there (or a further hourglass), a transposed convolution back to full rate, and more gated convolutions; a softmax
over the embedding matrix itself (Press and Wolf 2017) gives the next token.

Shape suffixes: B sequences, T positions, C channels, V token ids, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deconv_model.blocks import (
    DecodingState,
    RMSNorm,
    Stack,
    StridedConvolution,
    TransposedConvolution,
    at_least_float32,
)
from deconv_model.config import LevelConfig, ModelConfig
from deconv_model.softmax import capped_cross_entropy, capped_logits


class Hourglass(nn.Module):
    """The levels from one rate downwards: encoder, the coarser hourglass between down and up, skip, decoder."""

    def __init__(self, levels: Sequence[LevelConfig], max_positions: int, dropout: float) -> None:
        super().__init__()
        level = levels[0]
        self.encoder = Stack(level.width, level.encoder, max_positions, dropout)
        self.inner: Hourglass | None = None
        if len(levels) == 1:
            return
        below = levels[1]
        self.down = StridedConvolution(level.width, below.width, below.stride)
        self.inner = Hourglass(levels[1:], max_positions // below.stride, dropout)
        self.up = TransposedConvolution(below.width, level.width, below.stride, below.deconv_kernel or below.stride)
        assert level.decoder is not None  # ModelConfig has checked this
        self.decoder = Stack(level.width, level.decoder, max_positions, dropout)

    def forward(self, x_BTC: Tensor, state: DecodingState | None = None) -> Tensor:
        """Return the output, same shape as the input."""
        x_BTC = self.encoder(x_BTC, state)
        if self.inner is None:
            return x_BTC
        coarse = self.down(x_BTC, state)
        if coarse.shape[1]:  # while decoding, most steps complete no coarse position
            coarse = self.inner(coarse, state)
        x_BTC = x_BTC + self.up(coarse, x_BTC.shape[1], state)
        return self.decoder(x_BTC, state)


class LanguageModel(nn.Module):
    """A causal hourglass over token ids with a tied, capped softmax.

    Initial weights depend on torch's global generator only: call ``torch.manual_seed`` first. The position of a
    token modulo the strides counts from the first token of the call, in training as in generation.

    Args:
        config: Sizes. Sequences may have any length up to ``config.context_length``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.levels[0].width
        # The input is normalised, so this scale is that of the logits only: a new model is close to a uniform guess.
        self.embedding = nn.Parameter(torch.randn(config.vocab_size, width) * 0.02)
        self.hourglass = Hourglass(config.levels, config.context_length, config.dropout)
        self.norm = RMSNorm(width)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return the logits of the next token at each position, [B, T, V] in float32 (float64 for a float64 model).

        Raises:
            ValueError: The sequences are empty or longer than the context.
        """
        return capped_logits(self._features(ids_BT), self.embedding, self.config.logit_cap)

    def token_losses(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return ``-log p(targets)`` in nats for each position, [B, T] in float32 (float64 for a float64 model).

        The same as the cross-entropy of :meth:`forward`, but the logits never exist as a whole: they are made and
        used some rows at a time.

        Raises:
            ValueError: The sequences are empty or longer than the context.
        """
        features = self._features(ids_BT).flatten(0, 1)
        losses = capped_cross_entropy(features, self.embedding, targets_BT.flatten(), self.config.logit_cap)
        return losses.view(targets_BT.shape)

    @torch.no_grad()
    def prefill(self, ids_BT: Tensor) -> tuple[Tensor, DecodingState]:
        """Read the beginning of the sequences.

        Returns:
            The logits [B, V] of the token after the last one, and the state from which :meth:`step` goes on.

        Raises:
            ValueError: The sequences are empty or longer than the context.
        """
        state = DecodingState()
        return self._continue(ids_BT, state), state

    @torch.no_grad()
    def step(self, ids_B: Tensor, state: DecodingState) -> Tensor:
        """Read one more token of each sequence, changing ``state``; return the logits [B, V] of the next one.

        The cost does not grow with the position, but for attention over the keys so far; a coarse level works only
        when one of its positions begins.

        Raises:
            ValueError: The context is full.
        """
        return self._continue(ids_B[:, None], state)

    def _continue(self, ids_BT: Tensor, state: DecodingState) -> Tensor:
        last_BC = self._features(ids_BT, state)[:, -1]
        return capped_logits(last_BC, self.embedding, self.config.logit_cap)

    def _features(self, ids_BT: Tensor, state: DecodingState | None = None) -> Tensor:
        """Return the normalised outputs of the hourglass, [B, T, C]."""
        seen = state.positions.get(self, 0) if state is not None else 0
        end = seen + ids_BT.shape[1]
        if not seen < end <= self.config.context_length:
            raise ValueError(f"sequence of {end} tokens: must be 1 to context_length = {self.config.context_length}")
        if state is not None:
            state.positions[self] = end
        return self.norm(self.hourglass(self._embed(ids_BT), state))

    def _embed(self, ids_BT: Tensor) -> Tensor:
        x_BTC = F.embedding(ids_BT, self.embedding)
        x_BTC = F.rms_norm(at_least_float32(x_BTC), x_BTC.shape[-1:], eps=1e-6)
        rate = self.config.embedding_dropout
        if not self.training or rate == 0.0:
            return x_BTC
        # A dropped id is gone from all sequences of the step, as in Merity et al. 2017.
        kept_V = (torch.rand(self.config.vocab_size, device=ids_BT.device) >= rate).to(x_BTC.dtype) / (1.0 - rate)
        return x_BTC * kept_V[ids_BT][:, :, None]


def count_parameters(model: LanguageModel) -> dict[str, int]:
    """Return the number of parameters: ``total``, ``embedding`` (used by the softmax too) and all ``other``."""
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding = model.embedding.numel()
    return {"total": total, "embedding": embedding, "other": total - embedding}
