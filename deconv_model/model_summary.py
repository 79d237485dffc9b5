"""What a configuration amounts to, before any weight is made: parameters, reach, arithmetic.

Needs no torch. FLOPs are those of matrix products, two for each multiply-add, in the forward pass; elementwise work,
norms and the taps of depthwise convolutions (a few per cent) are left out, as in ``torch.utils.flop_counter``. A
training step takes three times as many.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deconv_model.config import LevelConfig, LSTMConfig, ModelConfig, StackConfig


@dataclass(frozen=True)
class ModelSummary:
    """Sizes of a model.

    Attributes:
        parameters: All of them.
        embedding_parameters: Those of the embedding and of an untied softmax.
        receptive_field: Tokens that can change an output, itself included; the whole context with attention, a pointer
            or recurrence.
        flops_per_token: Of the forward pass over a whole context, softmax included, divided by its tokens.
    """

    parameters: int
    embedding_parameters: int
    receptive_field: int
    flops_per_token: float

    def __str__(self) -> str:
        other = self.parameters - self.embedding_parameters
        return (
            f"{self.parameters:,} parameters ({self.embedding_parameters:,} embedding, {other:,} other), "
            f"receptive field {self.receptive_field:,} tokens, {self.flops_per_token / 1e6:.2f} MFLOPs a token"
        )


def summarise(config: ModelConfig | LSTMConfig) -> ModelSummary:
    """Return the sizes of the model that a configuration describes."""
    embedding = config.vocab_size * config.width * (1 if config.tied else 2)
    if isinstance(config, ModelConfig):
        trunk = sum(_hourglass_parameters(config.levels))
        flops = _hourglass_flops(config.levels, config.context_length)
    else:
        gates = 4 * config.hidden * (config.width + config.hidden)
        trunk = config.layers * (gates + 8 * config.hidden + config.width * config.hidden + config.width)
        flops = config.context_length * config.layers * 2.0 * (gates + config.width * config.hidden)
    pointer = 2 * config.pointer_size * config.width + config.width + 2 if config.pointer_size else 0
    if config.pointer_size:
        keys = config.context_length * (config.context_length - 1) / 2
        flops += 2.0 * config.pointer_size * (2 * config.width * config.context_length + keys)
    flops += 2.0 * config.vocab_size * config.width * config.context_length
    return ModelSummary(
        parameters=embedding + trunk + config.width + pointer,
        embedding_parameters=embedding,
        receptive_field=min(config.context_length, 1 + reach(config)),
        flops_per_token=flops / config.context_length,
    )


def reach(config: ModelConfig | LSTMConfig) -> int:
    """Return how many tokens before its own an output can see, for the phase that sees farthest."""
    if not isinstance(config, ModelConfig) or config.pointer_size or any(s.heads for s in _stacks(config.levels)):
        return config.context_length - 1
    return _reach(config.levels)


def _reach(levels: tuple[LevelConfig, ...]) -> int:
    level = levels[0]
    here = sum(_stack_reach(stack) for stack in (level.encoder, level.decoder) if stack is not None)
    if len(levels) == 1:
        return here
    below = levels[1]
    down, up = below.down_kernel or below.stride, below.deconv_kernel or below.stride
    return here + down - 1 + below.stride * _reach(levels[1:]) + up - 1


def _stack_reach(stack: StackConfig) -> int:
    return sum((k - 1) * d for k, d in zip(stack.kernel_sizes, stack.dilations, strict=True))


def _stacks(levels: tuple[LevelConfig, ...]) -> Iterator[StackConfig]:
    for level in levels:
        for stack in (level.encoder, level.decoder):
            if stack is not None and stack.layers:
                yield stack


def _matrices(width: int, stack: StackConfig) -> int:
    """Return the weights of a stack's matrices."""
    attention = 4 * width * width if stack.heads else 0
    return stack.layers * (attention + (3 if stack.gated else 2) * width * stack.hidden)


def _hourglass_parameters(levels: tuple[LevelConfig, ...]) -> Iterator[int]:
    for i, level in enumerate(levels):
        if i:
            above = levels[i - 1].width
            down, up = level.down_kernel or level.stride, level.deconv_kernel or level.stride
            yield above + level.width + (down + up) * above * level.width
        for stack in _stacks((level,)):
            yield _matrices(level.width, stack)
            yield sum(stack.hidden * k for k in stack.kernel_sizes if k > 1) + stack.layers * level.width
            if stack.heads:
                taps = 3 * level.width * stack.qkv_kernel if stack.qkv_kernel > 1 else 0
                yield stack.layers * (level.width + taps)


def _hourglass_flops(levels: tuple[LevelConfig, ...], positions: int) -> float:
    """Return the FLOPs for a number of positions of the first of the levels."""
    flops = 0.0
    for i, level in enumerate(levels):
        if i:
            above = levels[i - 1].width
            positions //= level.stride
            down, up = level.down_kernel or level.stride, level.deconv_kernel or level.stride
            flops += positions * 2.0 * (down + up) * above * level.width
        for stack in _stacks((level,)):
            flops += positions * 2.0 * _matrices(level.width, stack)
            if stack.heads:  # a query meets the keys up to its own, once for the scores and once for the values
                flops += stack.layers * 4.0 * level.width * positions * (positions + 1) / 2
    return flops
