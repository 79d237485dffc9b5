"""The average of the weights over the steps, which scores better than the weights of any one step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from deconv_model.sharding import sharded_like, whole


class WeightAverage:
    """An exponential moving average of a model's parameters (Polyak and Juditsky 1992; Morales-Brotons et al. 2024).

    Until it has seen ``1 / (1 - decay)`` steps it is the plain mean, so the initial weights never count.

    Args:
        model: Whose parameters to average.
        decay: Part that the average keeps at each step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take in the weights after a step, the ``steps``-th one since the beginning."""
        part = max(1.0 / steps, 1.0 - self._decay)
        torch._foreach_lerp_(list(self._average.values()), list(self._parameters.values()), part)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Give the model the average instead of its weights while the block runs."""
        weights = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._give(self._average)
        try:
            yield
        finally:
            self._give(weights)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average by the names of the parameters, gathered if sharded."""
        return {name: whole(tensor) for name, tensor in self._average.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` returned; it is copied.

        Raises:
            ValueError: It is the average of another model, or there was none.
        """
        if state.keys() != self._average.keys():
            raise ValueError("the state holds no average of this model's weights: was average_decay 0 before?")
        for name, tensor in self._average.items():
            tensor.copy_(sharded_like(tensor, state[name]))

    @torch.no_grad()
    def _give(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(weights[name])
