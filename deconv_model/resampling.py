"""Convolution to a coarser rate and deconvolution (transposed convolution) back.

Shape suffixes: B sequences, T positions, M positions of the next coarser level, C channels, K taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deconv_model.blocks import DecodingState, RMSNorm, new_matrix


class StridedConvolution(nn.Module):
    """From one level to the next coarser: a dense convolution with ``kernel_size`` taps every ``stride`` positions.

    Padded on the left only, so coarse position i reads inputs up to ``i * stride``: groups end, not begin, at a
    multiple of the stride. A coarse position is complete as soon as the first input position it will serve is there.
    """

    def __init__(self, channels: int, out_channels: int, stride: int, kernel_size: int) -> None:
        super().__init__()
        self.stride = stride
        self.kernel_size = kernel_size
        self.norm = RMSNorm(channels)
        self.weight = new_matrix(out_channels, kernel_size * channels)

    def forward(self, x_BTC: Tensor, state: DecodingState | None = None) -> Tensor:
        """Return [B, M, out_channels]: one position for each multiple of the stride among the input's positions."""
        x_BTC = self.norm(x_BTC)
        batch, length, channels = x_BTC.shape
        past = self.kernel_size - 1
        seen = 0
        if state is None:
            x_BTC = F.pad(x_BTC, (0, 0, past, 0))
        else:
            seen = state.positions.get(self, 0)
            state.positions[self] = (seen + length) % self.stride
            x_BTC = state.extend(self, "inputs", x_BTC, past)
        first = -seen % self.stride
        count = max(0, -(-(length - first) // self.stride))
        if count == 0:
            return x_BTC.new_empty(batch, 0, self.weight.shape[0])
        if self.kernel_size == self.stride:  # groups side by side: no copy
            groups = x_BTC[:, first : first + count * self.stride].reshape(batch, count, self.stride * channels)
        else:
            windows = x_BTC[:, first:].unfold(1, self.kernel_size, self.stride)[:, :count]  # [B, M, C, K]
            groups = windows.transpose(2, 3).reshape(batch, count, self.kernel_size * channels)
        return F.linear(groups, self.weight)


class TransposedConvolution(nn.Module):
    """From a level back to the next finer: each coarse position adds to ``kernel_size`` fine ones from its own on.

    No padding: coarse position i reaches fine positions ``i * stride`` and later. Only the tail is dropped. The
    kernel is a multiple of the stride, so every fine position gets the same number of taps. Computed as a matrix
    product and an overlap-add. It starts at zero: a new hourglass is its full-rate path.
    """

    def __init__(self, channels: int, out_channels: int, stride: int, kernel_size: int) -> None:
        super().__init__()
        self.stride = stride
        self.kernel_size = kernel_size
        self.norm = RMSNorm(channels)
        self.weight = nn.Parameter(torch.zeros(kernel_size * out_channels, channels))

    def forward(self, x_BMC: Tensor, length: int, state: DecodingState | None = None) -> Tensor:
        """Return the next ``length`` fine positions, [B, length, out_channels]."""
        if state is not None and not x_BMC.shape[1]:
            return self._still_open(length, state)
        sums = self._overlap_add(F.linear(self.norm(x_BMC), self.weight))
        if state is None:
            return sums[:, :length]
        seen = state.positions.get(self, 0)
        pending = state.tensors.get((self, "open"))
        if pending is not None:
            first = -seen % self.stride
            short = max(0, pending.shape[1] - first - sums.shape[1])
            sums = F.pad(sums, (0, 0, first, short))
            sums[:, : pending.shape[1]] += pending
        state.tensors[self, "open"] = sums[:, length:]
        state.positions[self] = (seen + length) % self.stride
        return sums[:, :length]

    def _still_open(self, length: int, state: DecodingState) -> Tensor:
        """Return fine positions to which earlier coarse ones have added all they will."""
        sums = state.tensors[self, "open"]
        state.tensors[self, "open"] = sums[:, length:]
        state.positions[self] = (state.positions[self] + length) % self.stride
        return sums[:, :length]

    def _overlap_add(self, taps: Tensor) -> Tensor:
        """Sum [B, M, kernel * C] into [B, (M + kernel / stride - 1) * stride, C]."""
        batch, count, _ = taps.shape
        overlap = self.kernel_size // self.stride
        channels = self.weight.shape[0] // self.kernel_size
        groups = taps.view(batch, count, overlap, self.stride * channels)
        if overlap == 1:
            sums = groups[:, :, 0]
        else:
            shifted = [F.pad(groups[:, :, j], (0, 0, j, overlap - 1 - j)) for j in range(overlap)]
            sums = sum(shifted[1:], shifted[0])
        return sums.reshape(batch, -1, channels)
