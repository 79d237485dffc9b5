"""Blocks in stacks, and stacks at nested rates: the hourglass.

Shape suffixes: B sequences, T positions, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from deconv_model.attention import CausalAttention
from deconv_model.blocks import ConvolutionBlock, DecodingState
from deconv_model.config import LevelConfig, StackConfig
from deconv_model.resampling import StridedConvolution, TransposedConvolution


class Stack(nn.Module):
    """Layers at one rate: each an attention block, if the configuration has heads, and a convolution block."""

    def __init__(self, channels: int, config: StackConfig, max_positions: int, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for kernel_size, dilation in zip(config.kernel_sizes, config.dilations, strict=True):
            if config.heads:
                attention = CausalAttention(
                    channels, config.heads, max_positions, qkv_kernel=config.qkv_kernel, dropout=dropout
                )
                self.blocks.append(attention)
            convolution = ConvolutionBlock(
                channels,
                config.hidden,
                kernel_size,
                dilation,
                activation=config.activation,
                gated=config.gated,
                dropout=dropout,
            )
            self.blocks.append(convolution)

    def forward(self, x_BTC: Tensor, state: DecodingState | None = None) -> Tensor:
        """Return the output, same shape as the input."""
        for block in self.blocks:
            x_BTC = block(x_BTC, state)
        return x_BTC


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
        stride = below.stride
        self.down = StridedConvolution(level.width, below.width, stride, below.down_kernel or stride)
        self.inner = Hourglass(levels[1:], max_positions // stride, dropout)
        self.up = TransposedConvolution(below.width, level.width, stride, below.deconv_kernel or stride)
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
