"""What a model is and how it is trained: frozen dataclasses, checked when they are made.

This module imports nothing heavy, so that a configuration can be read and refused without loading torch. A value
that cannot work raises ``ValueError`` with the field, the value and the bound in one line.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

_STRICT = {"extra": "forbid"}  # read by pydantic when these classes are part of a pydantic model


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """A stack of residual blocks at one rate.

    Each layer is an optional causal self-attention block followed by one gated convolution block.

    Attributes:
        layers: Number of layers; 0 leaves the stack out.
        hidden: Channels inside each gated convolution block.
        kernel_size: Taps of each depthwise convolution, in positions of this level's rate.
        heads: Attention heads a layer; 0 means no attention. Must divide the level's width into even head sizes.
    """

    layers: int
    hidden: int
    kernel_size: int = 4
    heads: int = 0

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        require(self.layers >= 0, f"layers must be at least 0, got {self.layers}")
        require(self.hidden >= 1, f"hidden must be at least 1, got {self.hidden}")
        require(self.kernel_size >= 1, f"kernel_size must be at least 1, got {self.kernel_size}")
        require(self.heads >= 0, f"heads must be at least 0, got {self.heads}")


@dataclass(frozen=True, kw_only=True)
class LevelConfig:
    """One rate of the hourglass.

    Attributes:
        width: Channels of the residual stream at this level.
        stride: Positions of the level above that become one position here; 1 for the first level, at least 2 below.
        encoder: Blocks on the way down. At the lowest level this is the only stack.
        decoder: Blocks on the way up; absent at the lowest level.
        deconv_kernel: Taps of the transposed convolution that leads from here back to the level above; a multiple of
            ``stride``, so that every phase gets the same number of taps. ``None`` means ``stride``.
    """

    width: int
    encoder: StackConfig
    decoder: StackConfig | None = None
    stride: int = 1
    deconv_kernel: int | None = None

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        require(self.width >= 1, f"width must be at least 1, got {self.width}")
        require(self.stride >= 1, f"stride must be at least 1, got {self.stride}")
        kernel = self.deconv_kernel
        require(
            kernel is None or (kernel >= self.stride and kernel % self.stride == 0),
            f"deconv_kernel must be a multiple of the stride {self.stride}, got {kernel}",
        )
        for stack in (self.encoder, self.decoder):
            if stack is not None and stack.heads and stack.layers:
                require(
                    self.width % (2 * stack.heads) == 0,
                    f"width {self.width} must be a multiple of 2 x heads ({2 * stack.heads})",
                )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A causal hourglass language model.

    Attributes:
        vocab_size: Number of token ids.
        context_length: Longest sequence, in tokens; a multiple of the product of all strides.
        levels: From the input rate (stride 1) down to the coarsest.
        dropout: Probability of dropping a block's output channel values.
        embedding_dropout: Probability of dropping a whole row of the embedding for a step.
        logit_cap: Logits are ``cap * tanh(logits / cap)``; 0 switches this off.
    """

    vocab_size: int
    context_length: int
    levels: tuple[LevelConfig, ...]
    dropout: float = 0.0
    embedding_dropout: float = 0.0
    logit_cap: float = 15.0

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        require(self.vocab_size >= 2, f"vocab_size must be at least 2, got {self.vocab_size}")
        require(len(self.levels) >= 1, "levels must not be empty")
        require(self.levels[0].stride == 1, f"levels.0.stride must be 1, got {self.levels[0].stride}")
        for i, level in enumerate(self.levels[1:], start=1):
            require(level.stride >= 2, f"levels.{i}.stride must be at least 2, got {level.stride}")
        for i, level in enumerate(self.levels[:-1]):
            require(level.decoder is not None, f"levels.{i}.decoder is missing: only the lowest level has none")
        lowest = len(self.levels) - 1
        require(self.levels[-1].decoder is None, f"levels.{lowest}.decoder must be absent: it is the lowest level")
        require(
            self.context_length >= 2 and self.context_length % self.total_stride == 0,
            f"context_length must be a multiple of the product of strides ({self.total_stride}), "
            f"got {self.context_length}",
        )
        for name in ("dropout", "embedding_dropout"):
            value = getattr(self, name)
            require(0.0 <= value < 1.0, f"{name} must be in [0, 1), got {value}")
        require(self.logit_cap >= 0.0, f"logit_cap must be at least 0, got {self.logit_cap}")

    @property
    def total_stride(self) -> int:
        """Input positions that become one position of the lowest level."""
        product = 1
        for level in self.levels:
            product *= level.stride
        return product

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that :meth:`from_dict` turns back into an equal configuration."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """Rebuild a configuration from :meth:`to_dict` or from JSON.

        Raises:
            ValueError: A key is unknown or missing, or a value cannot work.
        """

        def stack(value: dict[str, Any] | None) -> StackConfig | None:
            return None if value is None else StackConfig(**value)

        try:
            levels = (
                {**level, "encoder": StackConfig(**level["encoder"]), "decoder": stack(level.get("decoder"))}
                for level in data["levels"]
            )
            return cls(**{**data, "levels": tuple(LevelConfig(**level) for level in levels)})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a model configuration: {error}") from error


Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained. Everything here changes the weights unless its description says otherwise.

    Attributes:
        steps: Optimizer steps at most; the learning rate schedule ends there.
        batch_size: Sequences of ``context_length`` tokens in a global batch, whatever the number of workers.
        micro_batch_size: Sequences a worker computes at once; smaller ones are accumulated.
        seed: Initial weights, order of the samples and dropout.
        muon_lr: Peak learning rate of Muon, which trains the matrices.
        adamw_lr: Peak learning rate of AdamW, which trains embedding, norms and convolution taps.
        weight_decay: Decoupled weight decay of the matrices.
        warmup: Part of ``steps`` in which the rate rises linearly from 0.
        constant_until: Part of ``steps`` after which the rate falls linearly.
        final_lr: Part of the peak rate that is left at the last step.
        gradient_clip: Largest norm of the whole gradient; 0 switches clipping off.
        precision: Of the matrix products: ``auto`` is bfloat16 where the device computes it fast, else float32.
        eval_every: Steps between evaluations on the valid split.
        eval_sequences: Sequences of the valid split that are evaluated, at most.
        patience: Evaluations without improvement after which training stops early; 0 never stops early.
        checkpoint_every: Steps between checkpoints. Changes nothing in the result.
    """

    steps: int
    batch_size: int = 32
    micro_batch_size: int = 16
    seed: int = 0
    muon_lr: float = 0.02
    adamw_lr: float = 0.004
    weight_decay: float = 0.05
    warmup: float = 0.05
    constant_until: float = 0.4
    final_lr: float = 0.02
    gradient_clip: float = 1.0
    precision: Precision = "auto"
    eval_every: int = 50
    eval_sequences: int = 64
    patience: int = 5
    checkpoint_every: int = 50

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch_size", "eval_every", "eval_sequences", "checkpoint_every"):
            value = getattr(self, name)
            require(value >= 1, f"{name} must be at least 1, got {value}")
        for name in ("muon_lr", "adamw_lr"):
            value = getattr(self, name)
            require(0.0 < value < 1.0, f"{name} must be between 0 and 1, got {value}")
        for name in ("weight_decay", "gradient_clip"):
            value = getattr(self, name)
            require(value >= 0.0, f"{name} must be at least 0, got {value}")
        for name in ("warmup", "constant_until", "final_lr"):
            value = getattr(self, name)
            require(0.0 <= value <= 1.0, f"{name} must be in [0, 1], got {value}")
        require(self.warmup <= self.constant_until, f"warmup must be at most constant_until, got {self.warmup}")
        require(self.patience >= 0, f"patience must be at least 0, got {self.patience}")
        require(0 <= self.seed < 2**62, f"seed must be in [0, 2**62), got {self.seed}")
        require(self.precision in ("auto", "float32", "bfloat16"), f"unknown precision {self.precision!r}")
