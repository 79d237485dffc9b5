"""The parts of a causal hourglass: norms, gated convolution, attention, strided and transposed convolution.

Every part maps positions to positions and lets an output see inputs up to its own position and none after it. Called
with a :class:`DecodingState`, a part continues where the last call ended, so a sequence may arrive in pieces of any
length; the outputs are those of one call on the whole sequence.

Shape suffixes: B sequences, T positions, M positions of the next coarser level, C channels, H hidden channels,
N heads, D channels of a head, K taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deconv_model.config import StackConfig
from deconv_model.gated_convolution import gated_convolution

_QUERY_BLOCK = 128  # of 64 to 512, the fastest for contexts of 256 and 512


class DecodingState:
    """What the parts of one model remember between calls on successive pieces of a batch of sequences.

    A part keeps its entries under itself, so one state serves any nesting of parts.

    Attributes:
        tensors: Last inputs of a convolution, outputs still open of a transposed convolution, or keys and values.
        positions: Positions a part has seen, where its next output depends on that.
    """

    def __init__(self) -> None:
        self.tensors: dict[nn.Module, Tensor] = {}
        self.positions: dict[nn.Module, int] = {}


def new_matrix(out_features: int, in_features: int) -> nn.Parameter:
    """Return a matrix [out, in] that keeps the scale of its input: normal with deviation ``in ** -0.5``."""
    return nn.Parameter(torch.randn(out_features, in_features) * in_features**-0.5)


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or in float64 if it is that."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """Root mean square norm over channels (Zhang and Sennrich 2019), computed in float32; none over time."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Return the normalised input, float32 (float64 for a float64 model), same shape."""
        return F.rms_norm(at_least_float32(x_BTC), self.weight.shape, self.weight, eps=1e-6)


class GatedConvolution(nn.Module):
    """Residual block ``x + Wout(silu(conv(u)) * v)`` with ``u, v = Win(norm(x))`` and a causal depthwise ``conv``.

    A gated linear unit (Dauphin et al. 2017) whose gate sees the last ``kernel_size`` positions. ``Wout`` starts at
    zero, so a new block is the identity.
    """

    def __init__(self, channels: int, hidden: int, kernel_size: int, dropout: float) -> None:
        super().__init__()
        self.norm = RMSNorm(channels)
        self.project_in = new_matrix(2 * hidden, channels)
        self.taps = nn.Parameter(torch.randn(hidden, kernel_size) * kernel_size**-0.5)  # of t, t - 1, ...
        self.project_out = nn.Parameter(torch.zeros(channels, hidden))
        self.dropout = dropout

    def forward(self, x_BTC: Tensor, state: DecodingState | None = None) -> Tensor:
        """Return the output, same shape as the input."""
        uv_BTH = F.linear(self.norm(x_BTC), self.project_in)
        past = 0
        if state is not None:
            past = self.taps.shape[1] - 1
            if self not in state.tensors:
                state.tensors[self] = uv_BTH.new_zeros(uv_BTH.shape[0], past, uv_BTH.shape[2])
            uv_BTH = torch.cat([state.tensors[self], uv_BTH], dim=1)
            state.tensors[self] = uv_BTH[:, uv_BTH.shape[1] - past :]
        out_BTC = F.linear(gated_convolution(uv_BTH, self.taps)[:, past:], self.project_out)
        return x_BTC + F.dropout(out_BTC, self.dropout, self.training)


def causal_attention(q_BNTD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor) -> Tensor:
    """Return softmax attention [B, N, T, D] of T queries that stand at the last T of the S positions of keys.

    On a CPU in blocks of queries, each with the keys up to its own end: nothing is computed for most of what the
    mask hides, and in bfloat16 it takes half the time of torch's own kernel.
    """
    length = q_BNTD.shape[2]
    start = k_BNSD.shape[2] - length
    if q_BNTD.device.type != "cpu" and start == 0:
        return F.scaled_dot_product_attention(q_BNTD, k_BNSD, v_BNSD, is_causal=True)
    q_BNTD = q_BNTD * q_BNTD.shape[3] ** -0.5
    k_BNDS = k_BNSD.transpose(2, 3)
    outputs = []
    for begin in range(0, length, _QUERY_BLOCK):
        end = min(length, begin + _QUERY_BLOCK)
        scores = q_BNTD[:, :, begin:end] @ k_BNDS[..., : start + end]
        future = torch.full((end - begin, end - begin), float("-inf"), dtype=scores.dtype, device=scores.device)
        scores[..., start + begin :] += future.triu(1)
        outputs.append(scores.softmax(dim=-1) @ v_BNSD[:, :, : start + end])
    return torch.cat(outputs, dim=2)


class CausalAttention(nn.Module):
    """Residual block of causal self-attention with rotary positions (Su et al. 2021) and normalised queries and keys.

    The norm of queries and keys (Henry et al. 2020) keeps the attention logits bounded at high learning rates. The
    output projection starts at zero, so a new block is the identity.
    """

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, channels: int, heads: int, max_positions: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = RMSNorm(channels)
        self.project_in = new_matrix(3 * channels, channels)
        self.project_out = nn.Parameter(torch.zeros(channels, channels))
        self.dropout = dropout
        half = channels // heads // 2
        frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float64), frequencies)[:, None]
        self.register_buffer("rope_cos", angles.cos().float(), persistent=False)  # [max_positions, 1, D / 2]
        self.register_buffer("rope_sin", angles.sin().float(), persistent=False)

    def forward(self, x_BTC: Tensor, state: DecodingState | None = None) -> Tensor:
        """Return the output, same shape as the input."""
        batch, length, channels = x_BTC.shape
        start = state.positions.get(self, 0) if state is not None else 0
        qkv = F.linear(self.norm(x_BTC), self.project_in).view(batch, length, 3, self.heads, channels // self.heads)
        q_BNTD = self._rotate(qkv[:, :, 0], start).transpose(1, 2)
        k_BNTD = self._rotate(qkv[:, :, 1], start).transpose(1, 2)
        v_BNTD = qkv[:, :, 2].transpose(1, 2)
        if state is not None:
            k_BNTD, v_BNTD = self._remember(k_BNTD, v_BNTD, state)
        mixed = causal_attention(q_BNTD, k_BNTD, v_BNTD)
        out_BTC = F.linear(mixed.transpose(1, 2).reshape(batch, length, channels), self.project_out)
        return x_BTC + F.dropout(out_BTC, self.dropout, self.training)

    def _rotate(self, x_BTND: Tensor, start: int) -> Tensor:
        x = at_least_float32(x_BTND)
        x = F.rms_norm(x, x.shape[-1:], eps=1e-6)
        first, second = x.chunk(2, dim=-1)
        cos, sin = self.rope_cos[start : start + x.shape[1]], self.rope_sin[start : start + x.shape[1]]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BTND.dtype)

    def _remember(self, k_BNTD: Tensor, v_BNTD: Tensor, state: DecodingState) -> tuple[Tensor, Tensor]:
        start = state.positions.get(self, 0)
        end = start + k_BNTD.shape[2]
        if start == 0:  # room for the whole context at once: a step then writes its own entry only
            batch, heads, _, size = k_BNTD.shape
            state.tensors[self] = k_BNTD.new_empty(2, batch, heads, self.rope_cos.shape[0], size)
        keys_values = state.tensors[self]
        keys_values[0, :, :, start:end] = k_BNTD
        keys_values[1, :, :, start:end] = v_BNTD
        state.positions[self] = end
        return keys_values[0, :, :, :end], keys_values[1, :, :, :end]


class StridedConvolution(nn.Module):
    """From one level to the next coarser: a dense convolution with ``stride`` taps every ``stride`` positions.

    Padded on the left only, so coarse position i reads inputs up to ``i * stride``: groups end, not begin, at a
    multiple of the stride. A coarse position is complete as soon as the first input position it will serve is there.
    """

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.norm = RMSNorm(channels)
        self.weight = new_matrix(out_channels, stride * channels)

    def forward(self, x_BTC: Tensor, state: DecodingState | None = None) -> Tensor:
        """Return [B, M, out_channels]: one position for each multiple of the stride among the input's positions."""
        x_BTC = self.norm(x_BTC)
        batch, length, channels = x_BTC.shape
        past = self.stride - 1
        seen = 0
        if state is None or self not in state.tensors:
            recent = F.pad(x_BTC, (0, 0, past, 0))
        else:
            seen = state.positions[self]
            recent = torch.cat([state.tensors[self], x_BTC], dim=1)
        if state is not None:
            state.tensors[self] = recent[:, recent.shape[1] - past :]
            state.positions[self] = seen + length
        first = -seen % self.stride
        count = max(0, -(-(length - first) // self.stride))
        groups = recent[:, first : first + count * self.stride]
        return F.linear(groups.reshape(batch, count, self.stride * channels), self.weight)


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
        sums = self._overlap_add(F.linear(self.norm(x_BMC), self.weight))
        if state is None:
            return sums[:, :length]
        seen = state.positions.get(self, 0)
        if seen:
            pending = state.tensors[self]
            first = -seen % self.stride if x_BMC.shape[1] else 0
            short = max(0, pending.shape[1] - first - sums.shape[1])
            sums = F.pad(sums, (0, 0, first, short))
            sums[:, : pending.shape[1]] += pending
        state.tensors[self] = sums[:, length:]
        state.positions[self] = seen + length
        return sums[:, :length]

    def _overlap_add(self, taps: Tensor) -> Tensor:
        """Sum [B, M, kernel * C] into [B, (M + kernel / stride - 1) * stride, C]; [B, 0, C] if there is no input."""
        batch, count, _ = taps.shape
        overlap = self.kernel_size // self.stride
        channels = self.weight.shape[0] // self.kernel_size
        groups = taps.view(batch, count, overlap, self.stride * channels)
        if overlap == 1 or count == 0:
            sums = groups[:, :, 0]
        else:
            shifted = [F.pad(groups[:, :, j], (0, 0, j, overlap - 1 - j)) for j in range(overlap)]
            sums = sum(shifted[1:], shifted[0])
        return sums.reshape(batch, -1, channels)


class Stack(nn.Module):
    """Layers at one rate: each an attention block, if the configuration has heads, and a gated convolution."""

    def __init__(self, channels: int, config: StackConfig, max_positions: int, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for _ in range(config.layers):
            if config.heads:
                self.blocks.append(CausalAttention(channels, config.heads, max_positions, dropout))
            self.blocks.append(GatedConvolution(channels, config.hidden, config.kernel_size, dropout))

    def forward(self, x_BTC: Tensor, state: DecodingState | None = None) -> Tensor:
        """Return the output, same shape as the input."""
        for block in self.blocks:
            x_BTC = block(x_BTC, state)
        return x_BTC
