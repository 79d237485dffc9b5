"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): momentum made orthogonal.

What it costs is matrix products, which run at the speed of the hardware already, so what is saved here is products:
for 3.1M parameters in 16 matrices on one CPU thread, 100 ms a step instead of the 140 of ``torch.optim.Muon``, which
does five iterations of Jordan's polynomial. Training goes equally well.

- Four polynomials chosen one after the other, each the best for where the singular values then are (the Polar Express,
  Amsel et al. 2025, arXiv:2505.16932), take them as close to 1.
- They begin from a tighter bound of the largest singular value: the fourth root of the sum of the fourth powers, which
  is the Frobenius norm of the Gram matrix. For the usual few large and many small ones it is little above the largest.
- Two polynomials are applied to a long matrix at once: the second one's Gram matrix follows from the first one's
  (``q gram q``), so both are worked out on the short side. More than two would be too many for bfloat16: the errors of
  the first Gram matrix hide the smallest singular values, and a new one has to be made from the matrix.

Shape suffixes: N matrices, R rows, C columns, S the shorter of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from deconv_model.sharding import sharded_like, whole

# Coefficients (a, b, c) of x -> a x + b x^3 + c x^5, best for singular values of 0.003 to 1, which become 0.77 to 1.21.
# All but the last are for values up to 1.01: bfloat16 may lift a 1 above 1.
_POLYNOMIALS = (
    ((8.1377, -22.7137, 16.3254), (3.9652, -2.8364, 0.5225)),
    ((3.4887, -2.5622, 0.5016), (2.5115, -1.8524, 0.4388)),
)
_LONG = 1.5  # times as long as wide, from where on two polynomials at once take fewer multiplications
_TINY = 1e-30


class Muon(Optimizer):
    """Nesterov momentum, made orthogonal, scaled by ``sqrt(max(1, rows / columns))``; decoupled weight decay.

    With more than one worker, each one makes its share of the matrices orthogonal and all get all results, so the
    weights are the same on all of them, bit for bit. Parameters sharded by ``fully_shard`` are gathered as bfloat16.

    Args:
        params: Matrices. Those without a gradient stay as they are.
        lr: Learning rate.
        weight_decay: A step multiplies the matrices by ``1 - lr * weight_decay``.
        momentum: Part that the moving average of the gradients (``momentum_buffer``) keeps.
        rank: This worker's place in the default process group.
        world_size: Workers in that group; 1 needs no group.

    Raises:
        ValueError: A parameter is no matrix.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._rank = rank
        self._world_size = world_size
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon trains matrices, got a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Change the matrices by their gradients; a collective call when there are several workers."""
        assert closure is None, "Muon evaluates nothing"
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            updates = self._orthogonal([self._momentum(parameter, group["momentum"]) for parameter in parameters])
            for parameter, update in zip(parameters, updates, strict=True):
                rows, columns = parameter.shape
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                parameter.add_(sharded_like(parameter, update), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _momentum(self, parameter: Tensor, keep: float) -> Tensor:
        """Add the gradient to the momentum and return that of the next step (Nesterov) as bfloat16 [R, C]."""
        gradient = parameter.grad
        assert gradient is not None
        state: dict[str, Any] = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1.0 - keep)
        return whole(torch.lerp(gradient, average, keep).bfloat16())

    def _orthogonal(self, matrices: list[Tensor]) -> list[Tensor]:
        """Return the matrices made orthogonal, each by one of the workers."""
        owners = _share_out([matrix.shape for matrix in matrices], self._world_size)
        mine = [index for index, owner in enumerate(owners) if owner == self._rank]
        results: dict[int, Tensor] = {}
        for shape in dict.fromkeys(matrices[index].shape for index in mine):
            alike = [index for index in mine if matrices[index].shape == shape]
            stacked = orthogonalise(torch.stack([matrices[index] for index in alike]))
            results.update(zip(alike, stacked, strict=True))
        if self._world_size > 1 and matrices:
            results = self._exchange(results, matrices, owners)
        return [results[index] for index in range(len(matrices))]

    def _exchange(self, mine: dict[int, Tensor], matrices: list[Tensor], owners: list[int]) -> dict[int, Tensor]:
        """Return the results of all workers, gathered as one buffer."""
        owned = [[i for i, owner in enumerate(owners) if owner == worker] for worker in range(self._world_size)]
        longest = max(sum(matrices[i].numel() for i in indices) for indices in owned)
        sent = matrices[0].new_zeros(longest)
        received = [torch.empty_like(sent) for _ in owned]
        for i, place in _places(sent, owned[self._rank], matrices):
            place.copy_(mine[i])
        dist.all_gather(received, sent)
        return {
            i: place
            for row, indices in zip(received, owned, strict=True)
            for i, place in _places(row, indices, matrices)
        }


def _places(buffer: Tensor, indices: list[int], matrices: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield each index with a view of the buffer where its matrix lies: one after the other."""
    begin = 0
    for index in indices:
        end = begin + matrices[index].numel()
        yield index, buffer[begin:end].view_as(matrices[index])
        begin = end


def orthogonalise(x_NRC: Tensor) -> Tensor:
    """Return ``U f(S) V^T`` for each matrix ``U S V^T``, bfloat16 [N, R, C].

    ``f`` takes what is above 0.003 of the bound of the singular values to between 0.7 and 1.3, and what is below
    linearly towards 0.
    """
    x = x_NRC.bfloat16()
    is_long = max(x.shape[1:]) > _LONG * min(x.shape[1:])
    for number, (first, second) in enumerate(_POLYNOMIALS):
        gram_NSS = _gram(x)
        if number == 0:
            x, gram_NSS = _bounded(x, gram_NSS)
        factor_NSS = _polynomial(gram_NSS, first)
        if is_long:
            factor_NSS = _polynomial(factor_NSS @ gram_NSS @ factor_NSS, second) @ factor_NSS
        else:
            x = _applied(factor_NSS, x)
            factor_NSS = _polynomial(_gram(x), second)
        x = _applied(factor_NSS, x)
    return x


def _polynomial(gram_NSS: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """Return ``a + b gram + c gram^2``: what a matrix is multiplied by to get ``a x + b x^3 + c x^5``."""
    a, b, c = coefficients
    factor_NSS = torch.baddbmm(gram_NSS, gram_NSS, gram_NSS, beta=b, alpha=c)
    factor_NSS.diagonal(dim1=1, dim2=2).add_(a)
    return factor_NSS


def _gram(x: Tensor) -> Tensor:
    return x.mT @ x if x.shape[1] > x.shape[2] else x @ x.mT


def _applied(factor_NSS: Tensor, x: Tensor) -> Tensor:
    return x @ factor_NSS if x.shape[1] > x.shape[2] else factor_NSS @ x


def _bounded(x: Tensor, gram_NSS: Tensor) -> tuple[Tensor, Tensor]:
    """Return the matrices, divided by a bound of their singular values, and their Gram matrices."""
    # First by the Frobenius norm of x, whose square is this trace, so that no square can leave the range of a float.
    trace = gram_NSS.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float32).clamp_(min=_TINY)[:, None, None]
    gram_NSS = gram_NSS * trace.reciprocal().to(x.dtype)
    norm = torch.linalg.vector_norm(gram_NSS, dim=(1, 2), keepdim=True, dtype=torch.float32).clamp_(min=_TINY)
    gram_NSS = gram_NSS * norm.reciprocal().to(x.dtype)
    return x * (trace.rsqrt() * norm.rsqrt()).to(x.dtype), gram_NSS


def _share_out(shapes: list[torch.Size], workers: int) -> list[int]:
    """Return the worker of each matrix: the dearest ones first, each to the worker that has least to do."""
    load = [0] * workers
    owners = [0] * len(shapes)
    cost = [min(shape) ** 2 * (max(shape) + min(shape)) for shape in shapes]
    for index in sorted(range(len(shapes)), key=lambda index: -cost[index]):
        owners[index] = load.index(min(load))
        load[owners[index]] += cost[index]
    return owners
