"""Causal self-attention with rotary positions, in training and with a key/value cache.

Shape suffixes: B sequences, T positions, S positions of keys and values, C channels, N heads, D channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deconv_model.blocks import DecodingState, ResidualBlock, RMSNorm, at_least_float32, new_matrix
from deconv_model.convolution import causal_convolution

_QUERY_BLOCK = 128  # of 64 to 512, the fastest for contexts of 256 and 512


def causal_attention(q_BNTD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor) -> Tensor:
    """Return softmax attention [B, N, T, D] of T queries that stand at the last T of the S positions of keys.

    On a CPU in blocks of queries, each with the keys up to its own end: nothing is computed for most of what the
    mask hides, and in bfloat16 it takes half the time of torch's own kernel.
    """
    length = q_BNTD.shape[2]
    start = k_BNSD.shape[2] - length
    if length == 1:  # all keys are visible
        return F.scaled_dot_product_attention(q_BNTD, k_BNSD, v_BNSD)
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


class CausalAttention(ResidualBlock):
    """Residual block of causal self-attention with rotary positions (Su et al. 2021) and normalised queries and keys.

    The norm of queries and keys (Henry et al. 2020) keeps the attention logits bounded at high learning rates. The
    output projection starts at zero, so a new block is the identity. With ``qkv_kernel`` above 1, queries, keys and
    values pass a depthwise convolution each (So et al. 2021), which starts as the identity.
    """

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(
        self, channels: int, heads: int, max_positions: int, *, qkv_kernel: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__(dropout)
        self.heads = heads
        self.past = qkv_kernel - 1
        self.norm = RMSNorm(channels)
        self.project_in = new_matrix(3 * channels, channels)
        if self.past:
            identity = torch.zeros(3 * channels, qkv_kernel)
            identity[:, 0] = 1.0
            self.taps = nn.Parameter(identity)
        self.project_out = nn.Parameter(torch.zeros(channels, channels))
        half = channels // heads // 2
        frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float64), frequencies)[:, None, None]
        self.register_buffer("rope_cos", angles.cos().float(), persistent=False)  # [max_positions, 1, 1, D / 2]
        self.register_buffer("rope_sin", angles.sin().float(), persistent=False)

    def forward(self, x_BTC: Tensor, state: DecodingState | None = None) -> Tensor:
        """Return the output, same shape as the input."""
        batch, length, channels = x_BTC.shape
        start = state.positions.get(self, 0) if state is not None else 0
        qkv = F.linear(self.norm(x_BTC), self.project_in)
        if self.past:
            past = self.past if state is not None else 0
            qkv = qkv if state is None else state.extend(self, "inputs", qkv, past)
            qkv = causal_convolution(qkv, self.taps)[:, past:]
        qkv = qkv.view(batch, length, 3, self.heads, channels // self.heads)
        q_BNTD, k_BNTD = self._rotate(qkv[:, :, :2], start).permute(2, 0, 3, 1, 4).unbind(0)
        v_BNTD = qkv[:, :, 2].transpose(1, 2)
        if state is not None:
            k_BNTD = self._remember("keys", k_BNTD, start, state)
            v_BNTD = self._remember("values", v_BNTD, start, state)
            state.positions[self] = start + length
        if state is not None and torch.compiler.is_exporting():
            # The sizes of an exported program do not depend on the position: what is behind it in the cache is masked.
            visible_1S = torch.arange(k_BNTD.shape[2], device=x_BTC.device)[None] < start + length
            mixed = F.scaled_dot_product_attention(q_BNTD, k_BNTD, v_BNTD, attn_mask=visible_1S)
        else:
            mixed = causal_attention(q_BNTD, k_BNTD, v_BNTD)
        return self.add(x_BTC, F.linear(mixed.transpose(1, 2).reshape(batch, length, channels), self.project_out))

    def _rotate(self, qk: Tensor, start: int) -> Tensor:
        """Normalise and rotate queries and keys, [B, T, 2, N, D]."""
        x = at_least_float32(qk)
        x = F.rms_norm(x, x.shape[-1:], eps=1e-6)
        first, second = x.chunk(2, dim=-1)
        cos, sin = self.rope_cos[start : start + x.shape[1]], self.rope_sin[start : start + x.shape[1]]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(qk.dtype)

    def _remember(self, name: str, x_BNTD: Tensor, start: int, state: DecodingState) -> Tensor:
        """Write the new keys or values behind those of earlier calls; return them all, [B, N, S, D].

        An exported program gets the whole cache.
        """
        end = start + x_BNTD.shape[2]
        if (self, name) not in state.tensors:  # room for the whole context: a step then writes its own entry only
            batch, heads, _, size = x_BNTD.shape
            state.tensors[self, name] = x_BNTD.new_empty(batch, heads, self.rope_cos.shape[0], size)
        cache = state.tensors[self, name]
        cache[:, :, start:end] = x_BNTD
        return cache if torch.compiler.is_exporting() else cache[:, :, :end]
