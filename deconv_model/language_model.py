"""The causal language model.

In a hourglass, token embeddings pass gated convolutions at full rate, a strided convolution to a coarser and wider
level, blocks there (or a further hourglass), a transposed convolution back to full rate, and more gated convolutions;
a softmax over the embedding matrix itself (Press and Wolf 2017) gives the next token. The models to compare with have
another trunk between the same embedding and the same softmax.

Shape suffixes: B sequences, T positions, C channels, V token ids, R rows of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deconv_model.blocks import DecodingState, ResidualBlock, RMSNorm, at_least_float32
from deconv_model.config import LSTMConfig, ModelConfig
from deconv_model.hourglass import Hourglass
from deconv_model.lstm import LSTMStack
from deconv_model.pointer import Pointer
from deconv_model.softmax import capped_cross_entropy, capped_logits


class LanguageModel(nn.Module):
    """A causal model over token ids: embedding, trunk, capped softmax, and optionally a pointer into the context.

    Initial weights depend on torch's global generator only: call ``torch.manual_seed`` first. The position of a
    token modulo the strides counts from the first token of the call, in training as in generation.

    Args:
        config: Sizes; their kind decides the trunk. Sequences may have any length up to ``config.context_length``.
    """

    def __init__(self, config: ModelConfig | LSTMConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        # The input is normalised, so this scale is that of the logits only: a new model is close to a uniform guess.
        self.embedding = nn.Parameter(torch.randn(config.vocab_size, width) * 0.02)
        self.trunk = (
            Hourglass(config.levels, config.context_length, config.dropout)
            if isinstance(config, ModelConfig)
            else LSTMStack(config)
        )
        self.norm = RMSNorm(width)
        if not config.tied:
            self.output_embedding = nn.Parameter(torch.randn(config.vocab_size, width) * 0.02)
        self.pointer = Pointer(width, config.pointer_size, config.context_length) if config.pointer_size else None
        blocks = [module for module in self.modules() if isinstance(module, ResidualBlock)]
        for i, block in enumerate(blocks):
            block.skip_probability = config.stochastic_depth * i / max(1, len(blocks) - 1)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return the logits of the next token at each position, [B, T, V] in float32 (float64 for a float64 model).

        With a pointer they are the logarithms of its mixture, which are logits too.

        Raises:
            ValueError: The sequences are empty or longer than the context, or an id is not in the vocabulary.
        """
        x_BTC = self._features(ids_BT)
        logits = capped_logits(x_BTC, self._output_weight, self.config.logit_cap)
        return logits if self.pointer is None else self.pointer.mix(x_BTC, ids_BT, logits)

    def token_losses(self, ids_BT: Tensor, targets_BT: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Return ``-log p(targets)`` in nats for each position, [B, T] in float32 (float64 for a float64 model).

        The same as the cross-entropy of :meth:`forward`, but the logits never exist as a whole: they are made and
        used some rows at a time.

        Args:
            ids_BT: Input ids.
            targets_BT: The ids to predict, usually the inputs moved by one.
            label_smoothing: See :func:`~deconv_model.softmax.capped_cross_entropy`.

        Raises:
            ValueError: The sequences are empty or longer than the context, or an id is not in the vocabulary.
        """
        x_BTC = self._features(ids_BT)
        shares = None
        if self.pointer is not None:
            gate, copied = self.pointer.log_shares(x_BTC, ids_BT, targets_BT)
            shares = gate.flatten(), copied.flatten()
        losses = capped_cross_entropy(
            x_BTC.flatten(0, 1),
            self._output_weight,
            targets_BT.flatten(),
            self.config.logit_cap,
            shares=shares,
            label_smoothing=label_smoothing,
        )
        return losses.view(targets_BT.shape)

    @property
    def _output_weight(self) -> Tensor:
        return self.embedding if self.config.tied else self.output_embedding

    @torch.no_grad()
    def prefill(self, ids_BT: Tensor) -> tuple[Tensor, DecodingState]:
        """Read the beginning of the sequences.

        Returns:
            The logits [B, V] of the token after the last one, and the state from which :meth:`step` goes on.

        Raises:
            ValueError: The sequences are empty or longer than the context, or an id is not in the vocabulary.
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
        x_BTC = self._features(ids_BT, state)
        if self.pointer is not None:  # every position becomes a key, only the last one asks
            return self.pointer.mix_last(x_BTC, ids_BT, self._last_logits(x_BTC), state)
        return self._last_logits(x_BTC)

    def _last_logits(self, x_BTC: Tensor) -> Tensor:
        return capped_logits(x_BTC[:, -1], self._output_weight, self.config.logit_cap)

    def _features(self, ids_BT: Tensor, state: DecodingState | None = None) -> Tensor:
        """Return the normalised outputs of the trunk, [B, T, C]."""
        seen = state.positions.get(self, 0) if state is not None else 0
        end = seen + ids_BT.shape[1]
        if not seen < end <= self.config.context_length:
            raise ValueError(f"sequence of {end} tokens: must be 1 to context_length = {self.config.context_length}")
        if state is not None:
            state.positions[self] = end
        return self.norm(self.trunk(self._embed(ids_BT), state))

    def _embed(self, ids_BT: Tensor) -> Tensor:
        if ids_BT.device.type == "cpu" and not torch.compiler.is_compiling() and ids_BT.numel():
            low, high = (int(bound) for bound in ids_BT.aminmax())  # on a GPU this would wait for the device
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(f"ids must be in [0, vocab_size = {self.config.vocab_size}), got {low} to {high}")
        x_BTC = F.embedding(ids_BT, self.embedding)
        x_BTC = F.rms_norm(at_least_float32(x_BTC), x_BTC.shape[-1:], eps=1e-6)
        x_BTC = F.dropout(x_BTC, self.config.input_dropout, self.training)
        rate = self.config.embedding_dropout
        if not self.training or rate == 0.0:
            return x_BTC
        # A dropped id is gone from all sequences of the step, as in Merity et al. 2017.
        kept_V = (torch.rand(self.config.vocab_size, device=ids_BT.device) >= rate).to(x_BTC.dtype) / (1.0 - rate)
        return x_BTC * kept_V[ids_BT][:, :, None]


def count_parameters(model: LanguageModel) -> dict[str, int]:
    """Return the number of parameters: ``total``, ``embedding`` (with that of an untied softmax) and all ``other``."""
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding = model.embedding.numel() + (0 if model.config.tied else model.output_embedding.numel())
    return {"total": total, "embedding": embedding, "other": total - embedding}
