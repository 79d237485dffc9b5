"""What an autoencoder is, and the noise it may be trained to remove: frozen dataclasses, checked when they are made.

Like :mod:`deconv_model.config`, this module does not load torch, and a value that cannot work raises ``ValueError``
with the field, the value and the bound in one line.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any, Literal, get_args

from deconv_model.config import require

_STRICT = {"extra": "forbid"}  # read by pydantic when these classes are part of a pydantic model

Latent = Literal["spatial", "vector"]
ReconstructionLoss = Literal["cross_entropy", "embedding"]


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """A convolutional encoder, a latent, and a deconvolutional decoder.

    Attributes:
        vocab_size: Number of token ids. The id ``vocab_size`` itself is the blank, an input that stands for no token:
            masked, or past the end. It is never an output.
        context_length: Longest sequence, in tokens; a multiple of the product of ``strides``.
        latent: ``spatial`` keeps one latent for each position of the coarsest level, ``vector`` makes one of them all.
        latent_size: Channels of each latent.
        widths: Channels of each level, from the input rate, where they are those of the embedding, to the coarsest.
        strides: Positions of each level but the last that become one position of the next; at least 2.
        resampling_kernel: Taps of the strided and of the transposed convolutions, in strides: 1 leaves no overlap.
        blocks: Residual blocks of each level of the encoder and again of the decoder; one number, or one a level.
        kernel_size: Taps of the convolution in each block.
        expansion: Channels inside each block, in widths of its level.
        loss: ``cross_entropy`` of the cosine softmax, or ``embedding``, one minus the cosine with the target's row.
        temperature: Of the cosine softmax: logits are cosines divided by it.
    """

    vocab_size: int
    context_length: int
    latent: Latent
    latent_size: int
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    resampling_kernel: int = 1
    blocks: int | tuple[int, ...] = 1
    kernel_size: int = 3
    expansion: int = 1
    loss: ReconstructionLoss = "cross_entropy"
    temperature: float = 0.05

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        for name in ("widths", "strides", "blocks"):
            if isinstance(value := getattr(self, name), list):  # from JSON
                object.__setattr__(self, name, tuple(value))
        require(self.vocab_size >= 2, f"vocab_size must be at least 2, got {self.vocab_size}")
        for name in ("latent_size", "resampling_kernel", "kernel_size", "expansion"):
            value = getattr(self, name)
            require(value >= 1, f"{name} must be at least 1, got {value}")
        require(bool(self.widths) and min(self.widths) >= 1, f"widths must all be at least 1, got {self.widths}")
        require(
            len(self.strides) == len(self.widths) - 1,
            f"strides must be one fewer than the {len(self.widths)} widths, got {self.strides}",
        )
        require(all(stride >= 2 for stride in self.strides), f"strides must all be at least 2, got {self.strides}")
        require(
            self.context_length >= 1 and self.context_length % self.total_stride == 0,
            f"context_length must be a multiple of the product of strides ({self.total_stride}), "
            f"got {self.context_length}",
        )
        require(min(self.level_blocks, default=0) >= 0, f"blocks must be at least 0, got {self.blocks}")
        require(
            len(self.level_blocks) == len(self.widths),
            f"blocks must be one number or one for each of the {len(self.widths)} levels, got {self.blocks}",
        )
        for name, kinds in (("latent", Latent), ("loss", ReconstructionLoss)):
            value, known = getattr(self, name), get_args(kinds)
            require(value in known, f"{name} must be one of {', '.join(known)}, got {value!r}")
        require(self.temperature > 0.0, f"temperature must be above 0, got {self.temperature}")

    @property
    def total_stride(self) -> int:
        """Input positions that become one position of the coarsest level."""
        return prod(self.strides)

    @property
    def blank_id(self) -> int:
        """The input id that stands for no token."""
        return self.vocab_size

    @property
    def level_blocks(self) -> tuple[int, ...]:
        """Residual blocks of each level, on the way down and again on the way up."""
        return self.blocks if isinstance(self.blocks, tuple) else (self.blocks,) * len(self.widths)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that :meth:`from_dict` turns back into an equal configuration."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AutoencoderConfig:
        """Rebuild a configuration from :meth:`to_dict` or from JSON.

        Raises:
            ValueError: A key is unknown or missing, or a value cannot work.
        """
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"not an autoencoder configuration: {error}") from error


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """How sequences are damaged, for a model to mend; see :func:`~deconv_model.noise.add_noise`.

    Attributes:
        permutation: Places by which a token may move at most.
        deletion: Probability that a token is left out.
        insertion: Probability that a random token is put before one.
        substitution: Probability that a token becomes a random one.
        masking: Probability that a token becomes a blank.
    """

    permutation: int = 0
    deletion: float = 0.0
    insertion: float = 0.0
    substitution: float = 0.0
    masking: float = 0.0

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        require(self.permutation >= 0, f"permutation must be at least 0, got {self.permutation}")
        for name in ("deletion", "insertion", "substitution", "masking"):
            value = getattr(self, name)
            require(0.0 <= value <= 1.0, f"{name} must be in [0, 1], got {value}")
