"""Residual LSTM blocks: the recurrent model to compare with.

Shape suffixes: B sequences, T positions, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deconv_model.blocks import DecodingState, ResidualBlock, RMSNorm
from deconv_model.config import LSTMConfig


class LSTMBlock(ResidualBlock):
    """Residual block ``x + Wout(LSTM(norm(x)))`` (Hochreiter and Schmidhuber 1997). ``Wout`` starts at zero."""

    def __init__(self, channels: int, hidden: int, dropout: float) -> None:
        super().__init__(dropout)
        self.norm = RMSNorm(channels)
        self.lstm = nn.LSTM(channels, hidden, batch_first=True)
        with torch.no_grad():  # of torch's order of gates (input, forget, cell, output), remember at first
            self.lstm.get_parameter("bias_ih_l0")[hidden : 2 * hidden] += 1.0
        self.project_out = nn.Parameter(torch.zeros(channels, hidden))

    def forward(self, x_BTC: Tensor, state: DecodingState | None = None) -> Tensor:
        """Return the output, same shape as the input."""
        normed = self.norm(x_BTC)
        if state is None or (self, "hidden") not in state.tensors:
            outputs, (hidden, cell) = self.lstm(normed)
        else:
            before = state.tensors[self, "hidden"][None], state.tensors[self, "cell"][None]
            outputs, (hidden, cell) = self.lstm(normed, before)
        if state is not None:
            state.tensors[self, "hidden"], state.tensors[self, "cell"] = hidden[0], cell[0]
        return self.add(x_BTC, F.linear(outputs, self.project_out))


class LSTMStack(nn.Module):
    """The blocks of a recurrent language model."""

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            LSTMBlock(config.width, config.hidden, config.dropout) for _ in range(config.layers)
        )

    def forward(self, x_BTC: Tensor, state: DecodingState | None = None) -> Tensor:
        """Return the output, same shape as the input."""
        for block in self.blocks:
            x_BTC = block(x_BTC, state)
        return x_BTC
