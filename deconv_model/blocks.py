"""What all blocks of a model share: the decoding state, norm, residual connections, and the convolution block.

Every block maps positions to positions and lets an output see inputs up to its own position and none after it. Called
with a :class:`DecodingState`, a block continues where the last call ended, so a sequence may arrive in pieces of any
length; the outputs are those of one call on the whole sequence.

Shape suffixes: B sequences, T positions, C channels, H hidden channels, K taps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deconv_model.config import Activation
from deconv_model.convolution import causal_convolution, gated_convolution
from deconv_model.rms_norm import rms_norm


class DecodingState:
    """What the parts of one model remember between calls on successive pieces of a batch of sequences.

    A part keeps its entries under itself, so one state serves any nesting of parts.

    Attributes:
        tensors: By part and name, each [B, ...]: last inputs of a convolution, outputs still open of a transposed
            convolution, keys and values.
        positions: Positions a part has seen, where its next output depends on that; modulo the stride, where only that
            counts.
    """

    def __init__(self) -> None:
        self.tensors: dict[tuple[nn.Module, str], Tensor] = {}
        self.positions: dict[nn.Module, int] = {}

    def reorder(self, rows_B: Tensor) -> None:
        """Keep the sequences ``rows_B`` (int64) in that order; a row may be named several times, as beams are."""
        if not self.tensors or torch.equal(rows_B, torch.arange(self._batch, device=rows_B.device)):
            return
        for key, tensor in self.tensors.items():
            self.tensors[key] = tensor.index_select(0, rows_B)

    @property
    def _batch(self) -> int:
        return len(next(iter(self.tensors.values())))

    def extend(self, part: nn.Module, name: str, x_BTC: Tensor, past: int) -> Tensor:
        """Return ``x_BTC`` after the ``past`` positions before it (zeros before the first); remember the last ones."""
        before = self.tensors.get((part, name))
        if before is None:
            before = x_BTC.new_zeros(x_BTC.shape[0], past, *x_BTC.shape[2:])
        x_BTC = torch.cat([before, x_BTC], dim=1)
        self.tensors[part, name] = x_BTC[:, x_BTC.shape[1] - past :]
        return x_BTC


def new_matrix(out_features: int, in_features: int) -> nn.Parameter:
    """Return a matrix [out, in] that keeps the scale of its input: normal with deviation ``in ** -0.5``."""
    return nn.Parameter(torch.randn(out_features, in_features) * in_features**-0.5)


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or in float64 if it is that."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """Root mean square norm over channels; none over time."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Return the normalised input, same shape; see :func:`~deconv_model.rms_norm.rms_norm`."""
        return rms_norm(x_BTC, self.weight)


class ResidualBlock(nn.Module):
    """A block that adds something to its input: dropout and stochastic depth are the same for all of them.

    Attributes:
        dropout: Probability of dropping a channel value of what is added.
        skip_probability: Probability that a sequence leaves the block out while training (Huang et al. 2016).
    """

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.skip_probability = 0.0

    def add(self, x_BTC: Tensor, change_BTC: Tensor) -> Tensor:
        """Return the sum, as the block is to give it in training or evaluation."""
        if self.training and self.skip_probability:
            kept_B = torch.rand(len(x_BTC), 1, 1, device=x_BTC.device) >= self.skip_probability
            change_BTC = change_BTC * (kept_B / (1.0 - self.skip_probability)).to(change_BTC.dtype)
        return x_BTC + F.dropout(change_BTC, self.dropout, self.training)


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu2": _squared_relu}


class ConvolutionBlock(ResidualBlock):
    """Residual block ``x + Wout(act(conv(u)) * v)`` with ``u, v = Win(norm(x))`` and a causal depthwise ``conv``.

    A gated linear unit (Dauphin et al. 2017) whose gate sees ``kernel_size`` positions. Without the gate, ``* v`` is
    left out; with one tap, the convolution: then it is the feed-forward block of a Transformer. ``Wout`` starts at
    zero, so a new block is the identity.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        kernel_size: int,
        dilation: int = 1,
        *,
        activation: Activation = "silu",
        gated: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dropout)
        self.activation = activation
        self.gated = gated
        self.dilation = dilation
        self.past = (kernel_size - 1) * dilation
        self.norm = RMSNorm(channels)
        self.project_in = new_matrix(2 * hidden if gated else hidden, channels)
        if kernel_size > 1:
            self.taps = nn.Parameter(torch.randn(hidden, kernel_size) * kernel_size**-0.5)  # of t, t - dilation, ...
        self.project_out = nn.Parameter(torch.zeros(channels, hidden))

    def forward(self, x_BTC: Tensor, state: DecodingState | None = None) -> Tensor:
        """Return the output, same shape as the input."""
        uv = F.linear(self.norm(x_BTC), self.project_in)
        hidden = self._mix(uv) if state is None or not self.past else self._mix_piece(uv, state)
        return self.add(x_BTC, F.linear(hidden, self.project_out))

    def _mix(self, uv: Tensor) -> Tensor:
        if self.past and self.gated and self.activation == "silu":
            return gated_convolution(uv, self.taps, self.dilation)
        u, v = uv.chunk(2, dim=-1) if self.gated else (uv, None)
        if self.past:
            u = causal_convolution(u, self.taps, self.dilation)
        return self._gate(u, v)

    def _mix_piece(self, uv: Tensor, state: DecodingState) -> Tensor:
        u, v = uv.chunk(2, dim=-1) if self.gated else (uv, None)
        length = u.shape[1]
        u = state.extend(self, "inputs", u, self.past)
        if length == 1:  # one product instead of one for each tap
            y = (u[:, :: self.dilation] * self.taps.t().flip(0)).sum(dim=1, keepdim=True)
        else:
            y = causal_convolution(u, self.taps, self.dilation)[:, self.past :]
        return self._gate(y, v)

    def _gate(self, u: Tensor, v: Tensor | None) -> Tensor:
        y = _ACTIVATIONS[self.activation](u)
        return y if v is None else y * v
