"""What a model is and how it is trained: frozen dataclasses, checked when they are made.

This module imports nothing heavy, so that a configuration can be read and refused without loading torch. A value
that cannot work raises ``ValueError`` with the field, the value and the bound in one line.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from deconv_model.training_config import Precision as Precision
from deconv_model.training_config import TrainingConfig as TrainingConfig

_STRICT = {"extra": "forbid"}  # read by pydantic when these classes are part of a pydantic model


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


Activation = Literal["silu", "gelu", "relu2"]


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """A stack of residual blocks at one rate.

    Each layer is an optional causal self-attention block followed by one convolution block. With ``kernel_size`` 1 the
    latter is a plain feed-forward block, so a stack of these with attention is a Transformer.

    Attributes:
        layers: Number of layers; 0 leaves the stack out.
        hidden: Channels inside each convolution block.
        kernel_size: Taps of each depthwise convolution, in positions of this level's rate: one number, or one a layer.
            1 means no convolution.
        dilation: Positions between neighbouring taps: one number, or one a layer.
        activation: After the convolution: ``silu``, ``gelu``, or ``relu2``, the square of relu.
        gated: Whether the activation gates a second projection of the input (a gated linear unit).
        heads: Attention heads a layer; 0 means no attention. Must divide the level's width into even head sizes.
        qkv_kernel: Taps of a depthwise convolution over queries, keys and values; 1 means none.
    """

    layers: int
    hidden: int
    kernel_size: int | tuple[int, ...] = 4
    dilation: int | tuple[int, ...] = 1
    activation: Activation = "silu"
    gated: bool = True
    heads: int = 0
    qkv_kernel: int = 1

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        require(self.layers >= 0, f"layers must be at least 0, got {self.layers}")
        require(self.hidden >= 1, f"hidden must be at least 1, got {self.hidden}")
        for name in ("kernel_size", "dilation"):
            value = getattr(self, name)
            if isinstance(value, list):  # from JSON
                value = tuple(value)
                object.__setattr__(self, name, value)
            values = value if isinstance(value, tuple) else (value,)
            require(all(v >= 1 for v in values), f"{name} must be at least 1, got {value}")
            require(
                not isinstance(value, tuple) or len(value) == self.layers,
                f"{name} must be one number or one for each of the {self.layers} layers, got {value}",
            )
        require(self.heads >= 0, f"heads must be at least 0, got {self.heads}")
        require(self.qkv_kernel >= 1, f"qkv_kernel must be at least 1, got {self.qkv_kernel}")
        known = get_args(Activation)
        require(self.activation in known, f"activation must be one of {', '.join(known)}, got {self.activation!r}")

    @property
    def kernel_sizes(self) -> tuple[int, ...]:
        """Taps of the convolution of each layer."""
        return self.kernel_size if isinstance(self.kernel_size, tuple) else (self.kernel_size,) * self.layers

    @property
    def dilations(self) -> tuple[int, ...]:
        """Dilation of the convolution of each layer."""
        return self.dilation if isinstance(self.dilation, tuple) else (self.dilation,) * self.layers


@dataclass(frozen=True, kw_only=True)
class LevelConfig:
    """One rate of the hourglass.

    Attributes:
        width: Channels of the residual stream at this level.
        stride: Positions of the level above that become one position here; 1 for the first level, at least 2 below.
        encoder: Blocks on the way down. At the lowest level this is the only stack.
        decoder: Blocks on the way up; absent at the lowest level.
        down_kernel: Taps of the strided convolution that leads from the level above to here; at least ``stride``, so
            that no position is passed over. ``None`` means ``stride``.
        deconv_kernel: Taps of the transposed convolution that leads from here back to the level above; a multiple of
            ``stride``, so that every phase gets the same number of taps. ``None`` means ``stride``.
    """

    width: int
    encoder: StackConfig
    decoder: StackConfig | None = None
    stride: int = 1
    down_kernel: int | None = None
    deconv_kernel: int | None = None

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        require(self.width >= 1, f"width must be at least 1, got {self.width}")
        require(self.stride >= 1, f"stride must be at least 1, got {self.stride}")
        down = self.down_kernel
        require(
            down is None or down >= self.stride, f"down_kernel must be at least the stride {self.stride}, got {down}"
        )
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
class LanguageModelConfig:
    """What all language models share: vocabulary, context, softmax and regularisation.

    Attributes:
        vocab_size: Number of token ids.
        context_length: Longest sequence, in tokens; a multiple of the product of all strides.
        tied: Whether the softmax uses the embedding matrix (Press and Wolf 2017) or one of its own.
        pointer_size: Channels of the queries and keys with which the softmax points back at tokens of the context
            (:class:`~deconv_model.pointer.Pointer`); 0 means no pointer.
        dropout: Probability of dropping a block's output channel values.
        input_dropout: Probability of dropping a channel value of the embedded input.
        embedding_dropout: Probability of dropping a whole row of the embedding for a step.
        stochastic_depth: Probability of leaving out the last block for a sequence; rises evenly from 0 at the first.
        logit_cap: Logits are ``cap * tanh(logits / cap)``; 0 switches this off.
    """

    vocab_size: int
    context_length: int
    tied: bool = True
    pointer_size: int = 0
    dropout: float = 0.0
    input_dropout: float = 0.0
    embedding_dropout: float = 0.0
    stochastic_depth: float = 0.0
    logit_cap: float = 15.0

    def __post_init__(self) -> None:
        require(self.vocab_size >= 2, f"vocab_size must be at least 2, got {self.vocab_size}")
        require(
            self.context_length >= 2 and self.context_length % self.total_stride == 0,
            f"context_length must be a multiple of the product of strides ({self.total_stride}), "
            f"got {self.context_length}",
        )
        require(self.pointer_size >= 0, f"pointer_size must be at least 0, got {self.pointer_size}")
        for name in ("dropout", "input_dropout", "embedding_dropout", "stochastic_depth"):
            value = getattr(self, name)
            require(0.0 <= value < 1.0, f"{name} must be in [0, 1), got {value}")
        require(self.logit_cap >= 0.0, f"logit_cap must be at least 0, got {self.logit_cap}")

    @property
    def total_stride(self) -> int:
        """Input positions that become one position of the coarsest level."""
        return 1

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that ``from_dict`` turns back into an equal configuration."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(LanguageModelConfig):
    """A causal hourglass language model.

    One level makes a model without stride: with attention and ``kernel_size`` 1 a Transformer, without attention a
    gated convolutional network.

    Attributes:
        levels: From the input rate (stride 1) down to the coarsest.
    """

    levels: tuple[LevelConfig, ...]

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        require(len(self.levels) >= 1, "levels must not be empty")
        require(self.levels[0].stride == 1, f"levels.0.stride must be 1, got {self.levels[0].stride}")
        for i, level in enumerate(self.levels[1:], start=1):
            require(level.stride >= 2, f"levels.{i}.stride must be at least 2, got {level.stride}")
        for i, level in enumerate(self.levels[:-1]):
            require(level.decoder is not None, f"levels.{i}.decoder is missing: only the lowest level has none")
        lowest = len(self.levels) - 1
        require(self.levels[-1].decoder is None, f"levels.{lowest}.decoder must be absent: it is the lowest level")
        super().__post_init__()

    @property
    def width(self) -> int:
        """Channels of the embedding."""
        return self.levels[0].width

    @property
    def total_stride(self) -> int:
        """Input positions that become one position of the lowest level."""
        product = 1
        for level in self.levels:
            product *= level.stride
        return product

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


@dataclass(frozen=True, kw_only=True)
class LSTMConfig(LanguageModelConfig):
    """A recurrent language model of residual LSTM blocks, to compare with.

    Attributes:
        width: Channels of the embedding and of the residual stream.
        hidden: Cells of each LSTM.
        layers: Number of blocks.
    """

    width: int
    hidden: int
    layers: int

    def __post_init__(self) -> None:
        for name in ("width", "hidden", "layers"):
            value = getattr(self, name)
            require(value >= 1, f"{name} must be at least 1, got {value}")
        super().__post_init__()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LSTMConfig:
        """Rebuild a configuration from :meth:`to_dict` or from JSON.

        Raises:
            ValueError: A key is unknown or missing, or a value cannot work.
        """
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"not a model configuration: {error}") from error
