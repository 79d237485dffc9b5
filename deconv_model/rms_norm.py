"""Root mean square norm over channels, with a gradient that goes through the cache of a CPU once.

On a CPU, torch's own backward pass is a dozen passes over the whole batch. Measured at [4096, 256] in mixed precision,
forward and backward: 3.3 ms instead of 8.4.

Shape suffixes: R rows (positions), C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6
_BLOCK_ROWS = 512


def rms_norm(x: Tensor, weight_C: Tensor) -> Tensor:
    """Return ``x / sqrt(mean(x^2)) * weight`` over the last dimension (Zhang and Sennrich 2019).

    Computed in float32 (float64 for float64). The result has that type too, unless autocast is on, which would round it
    for the matrix product that follows anyway.
    """
    device = x.device.type
    wide = x if x.dtype == torch.float64 else x.float()
    rounded = torch.is_autocast_enabled(device) and wide.dtype == torch.float32
    dtype = torch.get_autocast_dtype(device) if rounded else wide.dtype
    if device == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        out: Tensor = _RMSNorm.apply(wide, weight_C, dtype)
        return out
    return F.rms_norm(wide, weight_C.shape, weight_C, eps=EPSILON).to(dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_C: Tensor, dtype: torch.dtype) -> Tensor:
        x_RC = x.reshape(-1, x.shape[-1])
        scale_R = torch.linalg.vector_norm(x_RC, dim=1).square_().div_(x.shape[-1]).add_(EPSILON).rsqrt_()
        out_RC = x_RC.new_empty(x_RC.shape, dtype=dtype)
        for rows, scale, out in zip(*_blocks(x_RC, scale_R, out_RC), strict=True):
            out.copy_((rows * scale[:, None]).mul_(weight_C))
        ctx.save_for_backward(x, weight_C, scale_R)
        return out_RC.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None]:
        x, weight_C, scale_R = ctx.saved_tensors
        x_RC = x.reshape(-1, x.shape[-1])
        grad_out_RC = gradients[0].reshape(x_RC.shape)
        grad_RC, grad_weight_C = torch.empty_like(x_RC), torch.zeros_like(weight_C)
        for rows, scale, grad_out, grad in zip(*_blocks(x_RC, scale_R, grad_out_RC, grad_RC), strict=True):
            normed = rows * scale[:, None]
            wide = grad_out.to(x.dtype)
            product = wide * normed
            grad_weight_C += product.sum(dim=0)
            along_R = (product @ weight_C).div_(x.shape[-1])
            torch.mul(wide, weight_C, out=grad)
            grad.sub_(normed.mul_(along_R[:, None])).mul_(scale[:, None])
        return grad_RC.view(x.shape), grad_weight_C, None


def _blocks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tensor.split(_BLOCK_ROWS) for tensor in tensors]
