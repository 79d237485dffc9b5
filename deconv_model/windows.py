"""How a sequence that is longer than the context is read: through windows.

Each window is ``context_length`` long and begins about half of that after the one before, at a multiple of all
strides, so that a token keeps its phase.

Shape suffixes: B sequences, V token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic

import torch
from torch import Tensor

from deconv_model.causal_model import CausalModel, DecodingSizes, StateT, device_of

# Tokens that are read at once in the time of a step: on a CPU 30 for one sequence, 60 for 16.
_TOKENS_A_STEP = 32


def window_step(config: DecodingSizes) -> int:
    """Return how many tokens after a window the next one begins: at most half the context, whole strides if it can."""
    half = config.context_length // 2
    return half // config.total_stride * config.total_stride or half


def window_start(length: int, config: DecodingSizes) -> int:
    """Return where the window that reads the last of ``length`` tokens begins."""
    excess = length - config.context_length
    step = window_step(config)
    return 0 if excess <= 0 else -(-excess // step) * step


class WindowReader(Generic[StateT]):
    """A model that reads a batch of growing sequences of which all have got to the same position.

    The phase of a token counts from the first one, so sequences of different lengths cannot be aligned by padding
    on the left. They share positions instead: all are read up to the end of the shortest.

    Args:
        model: In evaluation mode.

    Attributes:
        length: Tokens of each sequence that have been read.
    """

    def __init__(self, model: CausalModel[StateT]) -> None:
        self.length = 0
        self._model = model
        self._device = device_of(model)
        self._state: StateT | None = None
        self._start = 0  # of the window

    @torch.inference_mode()
    def read(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Read up to the end of the shortest sequence.

        A step costs the same at any position, but for attention. When the context is full, the next window begins: its
        first half, the last half context, is read again at once. So the model sees between a half and a whole context.

        Args:
            sequences: The same ones as in the call before, each with more ids at its end if it likes.

        Returns:
            The logits [B, V] of the token after the last one that was read.
        """
        end = min(map(len, sequences))
        start = window_start(end, self._model.config)
        steps = end - self.length
        reading_again = 1 + (end - start) * len(sequences) // _TOKENS_A_STEP
        if self._state is None or start != self._start or steps > reading_again:
            ids_BT = torch.tensor([ids[start:end] for ids in sequences], device=self._device)
            logits_BV, self._state = self._model.prefill(ids_BT)
            self._start = start
        else:
            for position in range(self.length, end):
                ids_B = torch.tensor([ids[position] for ids in sequences], device=self._device)
                logits_BV = self._model.step(ids_B, self._state)
        self.length = end
        return logits_BV

    @torch.inference_mode()
    def reorder(self, rows: Sequence[int]) -> None:
        """Make old sequence ``rows[i]`` the new sequence i; sequences may be left out and repeated."""
        if self._state is not None and rows:
            self._state.reorder(torch.tensor(rows, device=self._device))
