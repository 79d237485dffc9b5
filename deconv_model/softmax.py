"""The capped softmax over a large vocabulary, without ever holding all logits.

Logits are ``cap * tanh(x @ weight.T / cap)`` (Gemma 2, 2024), in float32 from the matrix product on.

Shape suffixes: R rows (positions), C channels, V token ids.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deconv_model.blocks import at_least_float32

# Logits of one chunk. On a CPU they should stay in the cache; a GPU wants large matrix products.
_CHUNK_LOGITS = {"cpu": 2**20, "cuda": 2**27}


def capped_logits(x: Tensor, weight_VC: Tensor, cap: float) -> Tensor:
    """Return the logits [..., V] of features [..., C], float32 or float64; ``cap`` 0 means uncapped."""
    logits = at_least_float32(F.linear(x, weight_VC))
    return torch.tanh(logits / cap) * cap if cap else logits


def capped_cross_entropy(
    x_RC: Tensor,
    weight_VC: Tensor,
    targets_R: Tensor,
    cap: float,
    *,
    shares: tuple[Tensor, Tensor] | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the cross-entropy [R] in nats of the softmax over :func:`capped_logits`, differentiable in x and weight.

    Works through the rows in chunks. If gradients will be wanted, they are computed on the way, as if that of every
    loss were 1, while the logits of the chunk are there; the backward pass then only scales them. That of the weight
    cannot be scaled when the losses' gradients differ from each other: then the logits are made once more.

    Args:
        x_RC: Features.
        weight_VC: One row for each token id.
        targets_R: Token ids, int64.
        cap: Bound of the logits; 0 means none.
        shares: Logarithms [R] of a gate g and of a probability c that the target has from elsewhere; the loss is then
            ``-log(g * p + c)``, and differentiable in both.
        label_smoothing: Part of the loss that is the mean of ``-log p`` over all ids instead (Szegedy et al. 2016).
    """
    device = x_RC.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VC.dtype
    with_gradients = torch.is_grad_enabled() and (x_RC.requires_grad or weight_VC.requires_grad)
    gate, elsewhere = shares or (None, None)
    x_RC, weight_VC = x_RC.to(dtype), weight_VC.to(dtype)
    losses: Tensor = _CappedCrossEntropy.apply(
        x_RC, weight_VC, targets_R, gate, elsewhere, cap, label_smoothing, with_gradients
    )
    return losses


class _CappedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RC: Tensor,
        weight_VC: Tensor,
        targets_R: Tensor,
        gate_R: Tensor | None,
        elsewhere_R: Tensor | None,
        cap: float,
        smoothing: float,
        with_gradients: bool,
    ) -> Tensor:
        losses, own_shares = [], []
        grad_x = torch.empty_like(x_RC) if with_gradients else x_RC
        grad_weight = torch.zeros_like(weight_VC, dtype=_wide(weight_VC)) if with_gradients else weight_VC
        rows = [_chunks(t, weight_VC) for t in (x_RC, targets_R, grad_x)]
        for i, (x, targets, out) in enumerate(zip(*rows, strict=True)):
            scaled, probabilities, loss, mean_loss = _softmax(x, weight_VC, targets, cap, smoothing)
            own = None
            if gate_R is not None and elsewhere_R is not None:
                own_part = _chunks(gate_R, weight_VC)[i] - loss
                mixed = torch.logaddexp(own_part, _chunks(elsewhere_R, weight_VC)[i])
                own = torch.exp(own_part - mixed)  # part of the probability that is the softmax's
                own_shares.append(own)
                loss = -mixed
            losses.append(loss if mean_loss is None else (1.0 - smoothing) * loss + smoothing * mean_loss)
            if with_gradients:
                grad_logits = _grad_logits(scaled, probabilities, targets, cap, smoothing, own).to(x.dtype)
                torch.mm(grad_logits, weight_VC, out=out)
                grad_weight += grad_logits.t() @ x
        if with_gradients:
            own_R = torch.cat(own_shares) if own_shares else None
            ctx.save_for_backward(x_RC, weight_VC, targets_R, grad_x, grad_weight, own_R)
            ctx.cap, ctx.smoothing = cap, smoothing
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (gradient_R,) = gradients
        x_RC, weight_VC, targets_R, grad_x, grad_weight, own_R = ctx.saved_tensors
        if bool((gradient_R == gradient_R[0]).all()):
            grad_weight = grad_weight * gradient_R[0]
        else:
            grad_weight = torch.zeros_like(grad_weight)
            rows = [_chunks(t, weight_VC) for t in (x_RC, targets_R, gradient_R)]
            for i, (x, targets, g) in enumerate(zip(*rows, strict=True)):
                scaled, probabilities, _, _ = _softmax(x, weight_VC, targets, ctx.cap, 0.0)
                own = None if own_R is None else _chunks(own_R, weight_VC)[i]
                grad_logits = _grad_logits(scaled, probabilities, targets, ctx.cap, ctx.smoothing, own).mul_(g[:, None])
                grad_weight += grad_logits.to(x.dtype).t() @ x
        grad_gate = grad_elsewhere = None
        if own_R is not None:
            share_gradient = -(1.0 - ctx.smoothing) * gradient_R
            grad_gate, grad_elsewhere = share_gradient * own_R, share_gradient * (1.0 - own_R)
        grad_x = (grad_x * gradient_R[:, None]).to(x_RC.dtype)
        return grad_x, grad_weight.to(weight_VC.dtype), None, grad_gate, grad_elsewhere, None, None, None


def _softmax(
    x_RC: Tensor, weight_VC: Tensor, targets_R: Tensor, cap: float, smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return what the losses and gradients of a chunk are made of.

    ``sigmoid(2 * logits / cap)`` (or the logits, uncapped), the probabilities [R, V], the losses [R], and with
    smoothing the mean losses over all ids [R].

    ``cap * tanh(z / cap) = 2 * cap * sigmoid(2 * z / cap) - cap``, of which the softmax ignores the last term; on a
    CPU the sigmoid takes a sixth of the time of tanh.
    """
    scaled_RV = at_least_float32(x_RC @ weight_VC.t())
    logits_RV = scaled_RV
    if cap:
        scaled_RV = scaled_RV.mul_(2.0 / cap).sigmoid_()
        logits_RV = scaled_RV * (2.0 * cap)
    probabilities_RV = torch.softmax(logits_RV, dim=1)
    # The largest probability is at least 1 / V, so its logarithm is safe; that of the target's may not be.
    normaliser_R = logits_RV.amax(dim=1) - probabilities_RV.amax(dim=1).log()
    mean_loss_R = normaliser_R - logits_RV.mean(dim=1) if smoothing else None
    return scaled_RV, probabilities_RV, normaliser_R - logits_RV.gather(1, targets_R[:, None])[:, 0], mean_loss_R


def _grad_logits(
    scaled_RV: Tensor, probabilities_RV: Tensor, targets_R: Tensor, cap: float, smoothing: float, own_R: Tensor | None
) -> Tensor:
    """Turn the probabilities into the gradient of the summed losses by the logits before the cap, in place."""
    rows = torch.arange(len(targets_R), device=targets_R.device)
    if own_R is None and not smoothing:
        probabilities_RV[rows, targets_R] -= 1.0
    else:
        part_R = (1.0 - smoothing) * (torch.ones_like(probabilities_RV[:, 0]) if own_R is None else own_R)
        probabilities_RV.mul_((part_R + smoothing)[:, None]).sub_(smoothing / probabilities_RV.shape[1])
        probabilities_RV[rows, targets_R] -= part_R
    if cap:  # d tanh = 4 * sigmoid * (1 - sigmoid)
        probabilities_RV.mul_(scaled_RV).addcmul_(probabilities_RV, scaled_RV, value=-1.0).mul_(4.0)
    return probabilities_RV


def _chunks(tensor: Tensor, weight_VC: Tensor) -> tuple[Tensor, ...]:
    return tensor.split(max(1, _CHUNK_LOGITS.get(tensor.device.type, 2**24) // weight_VC.shape[0]))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
