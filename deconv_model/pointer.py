"""A pointer that lets the softmax repeat tokens of the context (pointer sentinel mixture, Merity et al. 2017).

Each position compares itself with the earlier ones and gives the tokens that *followed* those a share of the
probability: where the text goes on as it did before, the token that came then is copied. Positions are compared at full
rate, so it makes no difference in which phase of the strides a phrase comes back. A sentinel decides how much of the
probability is left to the vocabulary:

    p(y) = gate * softmax(logits)[y] + sum of the weights of the positions that were followed by y
    weights, gate = softmax([scale * <q, k>, sentinel])

It costs one product of narrow queries and keys; there are no values and no output projection.

Shape suffixes: B sequences, T positions that ask, S positions that were followed by a known token, C channels, D
channels of queries and keys, V token ids.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deconv_model.blocks import DecodingState, at_least_float32, new_matrix

_QUERY_BLOCK = 128
_NONE = -1e30  # logarithm of the probability of what cannot be copied: finite, so that no gradient is nan


class Pointer(nn.Module):
    """Queries, keys and sentinel over the last features of a model.

    Args:
        channels: Of the features.
        size: Of queries and keys.
        context_length: Longest sequence.
    """

    def __init__(self, channels: int, size: int, context_length: int) -> None:
        super().__init__()
        self.context_length = context_length
        self.project_in = new_matrix(2 * size, channels)  # to queries and keys
        self.sentinel = nn.Parameter(torch.zeros(channels))
        # 500 positions with random keys weigh about as much together as a sentinel of 7: copying begins small.
        self.sentinel_bias = nn.Parameter(torch.full((1,), 9.0))  # no scalar: FSDP shards rows
        self.log_scale = nn.Parameter(torch.zeros(1))

    def log_shares(self, x_BTC: Tensor, ids_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithms of the gate and of the probability of copying the target, each [B, T]."""
        q_BTD, k_BTD, sentinel_BT = self._project(x_BTC)
        gate, copied = _LogShares.apply(q_BTD, k_BTD[:, :-1], sentinel_BT, ids_BT[:, 1:], targets_BT)
        return gate, copied

    def mix(self, x_BTC: Tensor, ids_BT: Tensor, logits_BTV: Tensor) -> Tensor:
        """Return the logarithm of the mixed probabilities [B, T, V], given the logits of the vocabulary."""
        q_BTD, k_BTD, sentinel_BT = self._project(x_BTC)
        return _mix(q_BTD, k_BTD, sentinel_BT, ids_BT, logits_BTV, 0)

    def mix_last(self, x_BTC: Tensor, ids_BT: Tensor, logits_BV: Tensor, state: DecodingState) -> Tensor:
        """Return the logarithm of the mixed probabilities [B, V] after the last of the positions of this call.

        The positions continue those of earlier calls with the same state.
        """
        q_BTD, k_BTD, sentinel_BT = self._project(x_BTC)
        start = state.positions.get(self, 0)
        end = start + ids_BT.shape[1]
        keys_BSD, ids_BS = self._remember(k_BTD, ids_BT, start, state)
        return _mix(q_BTD[:, -1:], keys_BSD, sentinel_BT[:, -1:], ids_BS, logits_BV[:, None], end - 1)[:, 0]

    def _project(self, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = self.project_in.shape[0] // 2
        qk = at_least_float32(F.linear(x_BTC, self.project_in)).unflatten(-1, (2, size))
        q_BTD, k_BTD = F.rms_norm(qk, (size,), eps=1e-6).unbind(-2)
        scale = torch.exp(5.0 * self.log_scale) * size**-0.5  # the factor lets few steps change it much
        sentinel_BT = (at_least_float32(x_BTC) * self.sentinel).sum(-1) + self.sentinel_bias
        return q_BTD * scale, k_BTD, sentinel_BT

    def _remember(self, k_BTD: Tensor, ids_BT: Tensor, start: int, state: DecodingState) -> tuple[Tensor, Tensor]:
        batch, length, size = k_BTD.shape
        if (self, "keys") not in state.tensors:
            state.tensors[self, "keys"] = k_BTD.new_empty(batch, self.context_length, size)
            state.tensors[self, "ids"] = ids_BT.new_empty(batch, self.context_length)
        keys, ids = state.tensors[self, "keys"], state.tensors[self, "ids"]
        end = start + length
        keys[:, start:end] = k_BTD
        ids[:, start:end] = ids_BT
        state.positions[self] = end
        # An exported program has sizes that do not depend on the position; what is behind the end is masked.
        return (keys, ids) if torch.compiler.is_exporting() else (keys[:, :end], ids[:, :end])


def _mix(q_BTD: Tensor, k_BSD: Tensor, sentinel_BT: Tensor, ids_BS: Tensor, logits_BTV: Tensor, start: int) -> Tensor:
    """Mix for queries that begin at position ``start``, given all keys and ids up to the last of them, or more."""
    scores_BTS = _scores(q_BTD, k_BSD[:, :-1], start, logits_BTV.dtype)
    weights = torch.cat([sentinel_BT.to(logits_BTV.dtype)[:, :, None], scores_BTS], dim=2).softmax(dim=2)
    p_BTV = logits_BTV.softmax(dim=2) * weights[:, :, :1]
    followers = ids_BS[:, None, 1:].expand(-1, q_BTD.shape[1], -1)
    return p_BTV.scatter_add(2, followers, weights[:, :, 1:]).log()


def _scores(q_BTD: Tensor, k_BSD: Tensor, start: int, dtype: torch.dtype) -> Tensor:
    """Return the scores [B, T, S] of queries from position ``start`` on; minus infinity where none follows yet."""
    scores = (q_BTD @ k_BSD.transpose(1, 2)).to(dtype)
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu_(start)
    return scores.masked_fill_(hidden, float("-inf"))


class _LogShares(torch.autograd.Function):
    """Scores are made block by block, and once more for the gradient: [B, T, S] numbers are never kept."""

    @staticmethod
    def forward(
        ctx: Any, q_BTD: Tensor, k_BSD: Tensor, sentinel_BT: Tensor, followers_BS: Tensor, targets_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        gate, copied = torch.empty_like(sentinel_BT), torch.empty_like(sentinel_BT)
        for rows, begin, end in _blocks(q_BTD):
            part = rows, slice(begin, end)
            keys = slice(0, max(0, end - 1))
            scores = _scores(q_BTD[part], k_BSD[rows, keys], begin, sentinel_BT.dtype)
            sentinel = sentinel_BT[part]
            largest = torch.maximum(scores.amax(dim=2), sentinel) if scores.shape[2] else sentinel
            weights = scores.sub_(largest[:, :, None]).exp_()
            total = weights.sum(dim=2) + (sentinel - largest).exp()
            hits = targets_BT[part][:, :, None] == followers_BS[rows, None, keys]
            copied[part] = torch.where(hits, weights, 0.0).sum(dim=2).div_(total).log_().clamp_min_(_NONE)
            gate[part] = sentinel - largest - total.log()
        ctx.save_for_backward(q_BTD, k_BSD, sentinel_BT, followers_BS, targets_BT, gate, copied)
        return gate, copied

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor, None, None]:
        grad_gate, grad_copied = gradients
        q_BTD, k_BSD, sentinel_BT, followers_BS, targets_BT, gate, copied = ctx.saved_tensors
        grad_q, grad_k = torch.empty_like(q_BTD), torch.zeros_like(k_BSD)
        normaliser_BT = sentinel_BT - gate  # logarithm of the sum over all scores and the sentinel
        both_BT = grad_gate + grad_copied
        grad_hit_BT = torch.where(copied > _NONE, grad_copied * torch.exp(-copied.clamp_min(-80.0)), 0.0)
        for rows, begin, end in _blocks(q_BTD):
            part = rows, slice(begin, end)
            keys = slice(0, max(0, end - 1))
            scores = _scores(q_BTD[part], k_BSD[rows, keys], begin, sentinel_BT.dtype)
            weights = scores.sub_(normaliser_BT[part][:, :, None]).exp_()
            hits = targets_BT[part][:, :, None] == followers_BS[rows, None, keys]
            grad = torch.where(hits, (grad_hit_BT - both_BT)[part][:, :, None], -both_BT[part][:, :, None])
            grad = grad.mul_(weights).to(q_BTD.dtype)
            grad_q[part] = grad @ k_BSD[rows, keys]
            grad_k[rows, keys] += grad.transpose(1, 2) @ q_BTD[part]
        grad_sentinel = grad_gate - both_BT * gate.exp()
        return grad_q, grad_k, grad_sentinel, None, None


def _blocks(q_BTD: Tensor) -> list[tuple[slice, int, int]]:
    """Return (sequences, first position, end) of the blocks that a CPU keeps in its cache.

    One block on a GPU, and for an exported program, which has to work for any batch.
    """
    batch, length, _ = q_BTD.shape
    if q_BTD.device.type != "cpu" or torch.compiler.is_exporting():
        return [(slice(0, batch), 0, length)]
    starts = range(0, length, _QUERY_BLOCK)
    return [(slice(b, b + 1), begin, min(length, begin + _QUERY_BLOCK)) for b in range(batch) for begin in starts]
