"""The models that are compared, at about 3.1 million parameters without the embedding, and how each is trained.

All are configurations of the same library with the same optimizers and rates: whatever makes one block fast makes it
fast for all. The hourglass was chosen among some ten shapes; the baselines were not searched as much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from deconv_model.config import LevelConfig, LSTMConfig, ModelConfig, StackConfig
from tests.benchmarks.wikitext import BPE_IDS, BYTE_VALUES, Kind

CONTEXT = {"subwords": 512, "bytes": 2048}
VOCABULARY = {"subwords": BPE_IDS, "bytes": BYTE_VALUES + 1}


@dataclass(frozen=True)
class Contender:
    """A model and its training.

    Attributes:
        config: The model.
        sequence_length: Tokens of a training sequence; evaluation uses the whole context.
        muon_lr: Peak rate of Muon.
        adamw_lr: Peak rate of AdamW.
    """

    config: ModelConfig | LSTMConfig
    sequence_length: int
    muon_lr: float = 0.02
    adamw_lr: float = 0.004


def _hourglass(kind: Kind, *, pointer: bool = True, attention: bool = True) -> Contender:
    if kind == "subwords":
        levels = (
            LevelConfig(
                width=256, encoder=StackConfig(layers=1, hidden=384), decoder=StackConfig(layers=2, hidden=448)
            ),
            LevelConfig(
                width=320, stride=4, encoder=StackConfig(layers=2, hidden=384, heads=5) if attention else _COARSE
            ),
        )
    else:
        levels = (
            LevelConfig(
                width=192,
                encoder=StackConfig(layers=1, hidden=288, kernel_size=6),
                decoder=StackConfig(layers=1, hidden=288, kernel_size=6),
            ),
            LevelConfig(
                width=384,
                stride=4,
                encoder=StackConfig(layers=2, hidden=512, heads=6)
                if attention
                else replace(_COARSE, hidden=600, layers=4, dilation=(1, 4, 16, 64)),
            ),
        )
    return Contender(_model(kind, levels, pointer_size=64 if pointer and kind == "subwords" else 0), CONTEXT[kind])


# Of the same size as two layers with attention; the dilations see as far as they can without one.
_COARSE = StackConfig(layers=3, hidden=540, kernel_size=8, dilation=(1, 4, 16))


def _model(kind: Kind, levels: tuple[LevelConfig, ...], pointer_size: int = 0) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCABULARY[kind],
        context_length=CONTEXT[kind],
        levels=levels,
        pointer_size=pointer_size,
        logit_cap=0.0,
    )


def _flat(kind: Kind, stack: StackConfig, pointer_size: int = 0) -> Contender:
    return Contender(_model(kind, (LevelConfig(width=256, encoder=stack),), pointer_size), CONTEXT[kind])


_TRANSFORMER = StackConfig(layers=4, hidden=1024, kernel_size=1, activation="relu2", gated=False, heads=4, qkv_kernel=4)
_CONVOLUTIONS = StackConfig(layers=4, hidden=1024, kernel_size=4)


def _lstm(kind: Kind) -> Contender:
    config = LSTMConfig(vocab_size=VOCABULARY[kind], context_length=CONTEXT[kind], width=256, hidden=480, layers=2)
    # Four times as many sequences of a quarter of the length: as many tokens a step in a quarter of the time.
    return Contender(config, CONTEXT[kind] // 4)


CONTENDERS: dict[str, Callable[[Kind], Contender]] = {
    "hourglass": _hourglass,
    "hourglass, no pointer": lambda kind: _hourglass(kind, pointer=False),
    "hourglass, no attention": lambda kind: _hourglass(kind, pointer=False, attention=False),
    "Transformer": lambda kind: _flat(kind, replace(_TRANSFORMER, qkv_kernel=1)),
    "Transformer, short convolutions": lambda kind: _flat(kind, _TRANSFORMER),
    "Transformer, short convolutions, pointer": lambda kind: _flat(kind, _TRANSFORMER, pointer_size=64),
    "gated convolution": lambda kind: _flat(kind, _CONVOLUTIONS),
    "gated convolution, pointer": lambda kind: _flat(kind, _CONVOLUTIONS, pointer_size=64),
    "LSTM": _lstm,
}
OURS = "hourglass"
BASELINES = ("Transformer", "Transformer, short convolutions", "gated convolution", "LSTM")
