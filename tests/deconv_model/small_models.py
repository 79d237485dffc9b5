"""Hourglasses of every shape that differs in kind, small enough to run thousands of times."""

from __future__ import annotations

from typing import Any

import torch

from deconv_model.config import LevelConfig, LSTMConfig, ModelConfig, StackConfig
from deconv_model.language_model import LanguageModel

VOCABULARY = 30
CONTEXT = 36


def _stack(layers: int = 1, kernel_size: int = 4, heads: int = 0, **options: Any) -> StackConfig:
    return StackConfig(layers=layers, hidden=10, kernel_size=kernel_size, heads=heads, **options)


def _config(*levels: LevelConfig, **options: Any) -> ModelConfig:
    return ModelConfig(vocab_size=VOCABULARY, context_length=CONTEXT, levels=levels, **options)


CONFIGS = {
    "one level, attention": _config(LevelConfig(width=8, encoder=_stack(2, heads=2))),
    "one level, Transformer with short convolutions": _config(
        LevelConfig(width=8, encoder=_stack(2, kernel_size=1, activation="relu2", gated=False, heads=2, qkv_kernel=3))
    ),
    "one level, long taps": _config(LevelConfig(width=8, encoder=_stack(2, kernel_size=7))),
    "one level, dilations, pointer, untied": _config(
        LevelConfig(width=8, encoder=_stack(2, kernel_size=3, dilation=(1, 4), activation="gelu")),
        pointer_size=6,
        tied=False,
    ),
    "two levels, coarse attention": _config(
        LevelConfig(width=8, encoder=_stack(), decoder=_stack(2)),
        LevelConfig(width=12, stride=2, encoder=_stack(2, heads=3)),
    ),
    "two levels, coarse attention, pointer": _config(
        LevelConfig(width=8, encoder=_stack(), decoder=_stack()),
        LevelConfig(width=12, stride=2, encoder=_stack(heads=3)),
        pointer_size=4,
    ),
    "two levels, overlapping kernels, fine attention": _config(
        LevelConfig(width=8, encoder=_stack(0), decoder=_stack(heads=2, qkv_kernel=2)),
        LevelConfig(width=12, stride=3, down_kernel=5, deconv_kernel=6, encoder=_stack()),
    ),
    "three levels, attention everywhere": _config(
        LevelConfig(width=8, encoder=_stack(heads=1), decoder=_stack()),
        LevelConfig(
            width=12,
            stride=2,
            down_kernel=4,
            deconv_kernel=4,
            encoder=_stack(kernel_size=1),
            decoder=_stack(heads=1, qkv_kernel=3),
        ),
        LevelConfig(width=16, stride=3, deconv_kernel=9, encoder=_stack(heads=2)),
    ),
    "three levels, no attention": _config(
        LevelConfig(width=8, encoder=_stack(), decoder=_stack(0)),
        LevelConfig(width=8, stride=3, encoder=_stack(), decoder=_stack(kernel_size=3, dilation=2, gated=False)),
        LevelConfig(width=8, stride=2, encoder=_stack()),
    ),
}


LSTM = LSTMConfig(vocab_size=VOCABULARY, context_length=CONTEXT, width=8, hidden=10, layers=2, pointer_size=4)
ALL_CONFIGS: dict[str, ModelConfig | LSTMConfig] = {**CONFIGS, "LSTM, pointer": LSTM}


def randomised_model(
    config: ModelConfig | LSTMConfig, dtype: torch.dtype = torch.float64, seed: int = 0, spread: float = 0.3
) -> LanguageModel:
    """Return a model in evaluation mode none of whose weights is zero: output projections start there."""
    torch.manual_seed(seed)
    model = LanguageModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=spread)
    return model.to(dtype).eval()


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    """Return token ids of a shape."""
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
