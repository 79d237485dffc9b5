"""Models of three sizes, for bytes and for subwords, that need no thought to begin with.

``tiny`` for subwords is the shape that was best in the experiments on WikiText-2 (README); the others follow it in
other widths and depths and were not searched for.
"""

from __future__ import annotations

from typing import Literal, get_args

from deconv_model.config import LevelConfig, ModelConfig, StackConfig, require

Size = Literal["tiny", "small", "base"]
Units = Literal["bytes", "subwords"]

BYTES_VOCABULARY = 257  # the values of a byte, and the end of a document


def preset(size: Size, units: Units = "subwords", *, vocab_size: int | None = None) -> ModelConfig:
    """Return a model configuration.

    Args:
        size: ``tiny`` (about 3M parameters besides the embedding; minutes on a CPU), ``small`` (about 10M) or ``base``
            (about 125M with the embedding; a GPU).
        units: What the ids stand for.
        vocab_size: Number of ids; by default 257 for bytes, and 4,096, 8,192 and 32,768 for the sizes of subwords.

    Raises:
        ValueError: There is no such size or unit, or the vocabulary cannot work.
    """
    require(size in get_args(Size), f"size must be one of {', '.join(get_args(Size))}, got {size!r}")
    require(units in get_args(Units), f"units must be one of {', '.join(get_args(Units))}, got {units!r}")
    context_length, default_vocabulary, levels = (_BYTES if units == "bytes" else _SUBWORDS)[size]
    return ModelConfig(
        vocab_size=default_vocabulary if vocab_size is None else vocab_size,
        context_length=context_length,
        levels=levels,
        pointer_size=64 if units == "subwords" else 0,
        logit_cap=0.0,
    )


def _level(width: int, encoder: tuple[int, int], decoder: tuple[int, int], kernel_size: int) -> LevelConfig:
    """Return a level at full rate; the stacks are given as (layers, hidden)."""
    stacks = (
        StackConfig(layers=layers, hidden=hidden, kernel_size=kernel_size) for layers, hidden in (encoder, decoder)
    )
    return LevelConfig(width=width, encoder=next(stacks), decoder=next(stacks))


def _coarse(width: int, stride: int, layers: int, hidden: int) -> LevelConfig:
    """Return the lowest level, with attention heads of 64 channels."""
    return LevelConfig(width=width, stride=stride, encoder=StackConfig(layers=layers, hidden=hidden, heads=width // 64))


_Shape = tuple[int, int, tuple[LevelConfig, ...]]

_SUBWORDS: dict[Size, _Shape] = {
    "tiny": (512, 4096, (_level(256, (1, 384), (2, 448), 4), _coarse(320, 4, 2, 384))),
    "small": (512, 8192, (_level(384, (1, 640), (2, 640), 4), _coarse(512, 4, 3, 704))),
    "base": (1024, 32768, (_level(640, (2, 960), (2, 960), 4), _coarse(1024, 2, 10, 1664))),
}
_BYTES: dict[Size, _Shape] = {
    "tiny": (2048, BYTES_VOCABULARY, (_level(192, (1, 288), (1, 288), 6), _coarse(384, 4, 2, 512))),
    "small": (2048, BYTES_VOCABULARY, (_level(256, (1, 384), (2, 384), 6), _coarse(512, 4, 4, 768))),
    "base": (4096, BYTES_VOCABULARY, (_level(512, (2, 768), (2, 768), 6), _coarse(1152, 4, 10, 1856))),
}
