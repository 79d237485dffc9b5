"""What decoding and scoring ask of a language model, whatever it is made of.

Shape suffixes: B sequences, T positions, V token ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn


class DecodingSizes(Protocol):
    """The part of a model's configuration that decoding reads."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    def context_length(self) -> int:
        """Longest sequence that the model reads, in tokens."""

    @property
    def total_stride(self) -> int:
        """Windows begin at multiples of this; 1 for a model to which all positions are alike."""


class ReorderableState(Protocol):
    """What a model remembers of a batch of sequences between steps."""

    def reorder(self, rows_B: Tensor, /) -> None:
        """Make old sequence ``rows_B[i]`` the new sequence i; sequences may be left out and repeated."""


StateT = TypeVar("StateT", bound=ReorderableState)


class CausalModel(Protocol[StateT]):
    """A module whose output at a position depends on the tokens up to it, and which can go on token by token."""

    training: bool

    @property
    def config(self) -> DecodingSizes:
        """Sizes of the model."""

    def __call__(self, ids_BT: Tensor, /) -> Tensor:
        """Return the logits [B, T, V] of the token after each position."""

    def token_losses(self, ids_BT: Tensor, targets_BT: Tensor, /) -> Tensor:
        """Return ``-log p(targets)`` in nats for each position, [B, T]."""

    def prefill(self, ids_BT: Tensor, /) -> tuple[Tensor, StateT]:
        """Return the logits [B, V] of the token after the last one, and the state from which :meth:`step` goes on."""

    def step(self, ids_B: Tensor, state: StateT, /) -> Tensor:
        """Read one more token of each sequence, changing ``state``; return the logits [B, V] of the next one."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the parameters, which tell the device."""

    def train(self, mode: bool = True) -> object:
        """Switch between training and evaluation mode."""


def device_of(model: CausalModel[StateT]) -> torch.device:
    """Return the device on which a model computes."""
    return next(model.parameters()).device


@contextmanager
def evaluation_mode(model: CausalModel[StateT]) -> Iterator[None]:
    """Switch a model to evaluation mode, dropout off, and back to its own at the end."""
    was_training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(was_training)
