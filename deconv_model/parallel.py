"""How several workers share one training: who holds what, and how gradients are summed.

Each worker computes the losses of its own samples, divided by the tokens of the global batch, so gradients are summed
and not averaged. All sums are the same on all workers, bit for bit, and so are the decisions that follow from them.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deconv_model.repeated_blocks import repeated_blocks
from deconv_model.training_config import Parallel


class TokenLossModel(Protocol):
    """What training needs of a model besides being an ``nn.Module``.

    ``token_losses`` must take ``label_smoothing`` as a keyword if the training is to use it. Activation checkpointing,
    compilation and sharding work on the model's repeated blocks (:mod:`deconv_model.repeated_blocks`).
    """

    def token_losses(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the cross-entropy of each target as float32 [B, T], in nats."""
        ...


class Workers(ABC):
    """The workers that train one model, as one of them sees them.

    Attributes:
        shared: Float32 [2], summed over the workers together with the gradients: for the caller's use.
        calls_together: Whether all workers have to compute equally many micro-batches while training.
        evaluates_together: The same while evaluating.
        needs_warm_up: Whether a gradient has to be computed before the first step, or it would differ from later ones.
    """

    calls_together = False
    evaluates_together = False
    needs_warm_up = False

    def __init__(self, model: nn.Module, world_size: int, device: torch.device) -> None:
        self._model = model
        self._world_size = world_size
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.shared = torch.zeros(2, device=device)

    def equalise(self) -> None:
        """Give all workers the weights of the first one."""
        if self._world_size > 1:
            for parameter in self._model.parameters():
                dist.broadcast(parameter.data, src=0)

    def zero_gradients(self) -> None:
        """Begin a step: gradients and ``shared`` are zero afterwards."""
        self.shared.zero_()
        for parameter in self._parameters:
            parameter.grad = None

    def losses(self, ids_BT: Tensor, targets_BT: Tensor, *, is_last: bool, **settings: Any) -> Tensor:
        """Return the model's ``token_losses`` [B, T] of a micro-batch; ``is_last``: of the last one of a step."""
        return cast(TokenLossModel, self._model).token_losses(ids_BT, targets_BT, **settings)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch."""
        loss.backward()

    @abstractmethod
    def sum(self) -> list[float]:
        """Sum gradients and ``shared`` over the workers; return the sums of ``shared`` and the gradient's norm."""

    def scale_gradients(self, factor: float) -> None:
        """Multiply the gradients by a number."""
        torch._foreach_mul_(self._gradients(), factor)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]


class Replicated(Workers):
    """One worker, or several that each hold the whole model: one all-reduce of one flat buffer sums all gradients.

    Gradients are views of the buffer, to which autograd adds in place: leave ``zero_grad`` alone.
    """

    def __init__(self, model: nn.Module, world_size: int, device: torch.device) -> None:
        super().__init__(model, world_size, device)
        sizes = [parameter.numel() for parameter in self._parameters]
        self._buffer = torch.zeros(sum(sizes) + 2, dtype=torch.float32, device=device)
        self._gradient, self.shared = self._buffer[:-2], self._buffer[-2:]
        for parameter, view in zip(self._parameters, self._gradient.split(sizes), strict=True):
            parameter.grad = view.view_as(parameter)

    def zero_gradients(self) -> None:
        """Begin a step."""
        self._buffer.zero_()

    def sum(self) -> list[float]:
        """Sum over the workers."""
        if self._world_size > 1:
            dist.all_reduce(self._buffer)
        return _numbers(self.shared, torch.linalg.vector_norm(self._gradient))

    def scale_gradients(self, factor: float) -> None:
        """Multiply the gradients by a number."""
        self._gradient.mul_(factor)


class _TokenLosses(nn.Module):
    """Makes ``token_losses`` the forward pass: the wrappers of torch know no other method of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BT: Tensor, targets_BT: Tensor, **settings: Any) -> Tensor:
        losses_BT = cast(TokenLossModel, self.model).token_losses(ids_BT, targets_BT, **settings)
        return losses_BT.clone()  # fully_shard cannot hook into the backward pass of a view


class DataParallel(Workers):
    """``DistributedDataParallel`` (Li et al. 2020, arXiv:2006.15704): some gradients are summed while others are made.

    It sums in buckets, which it rearranges after the first backward pass, and with them the order of summation. So a
    gradient has to be computed before the first step after every start, or a resumed run would sum in another order
    than one that was not stopped.
    """

    calls_together = True
    needs_warm_up = True

    def __init__(self, model: nn.Module, world_size: int, device: torch.device) -> None:
        super().__init__(model, world_size, device)
        with warnings.catch_warnings():
            # torch 2.13 has another name for it, which 2.11 does not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self._wrapped = nn.parallel.DistributedDataParallel(
                _TokenLosses(model),
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )

    def losses(self, ids_BT: Tensor, targets_BT: Tensor, *, is_last: bool, **settings: Any) -> Tensor:
        """Return the losses of a micro-batch; the gradients are summed in the backward pass of the last one."""
        self._wrapped.require_backward_grad_sync = is_last
        losses_BT: Tensor = self._wrapped(ids_BT, targets_BT, **settings)
        return losses_BT

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch."""
        (loss * self._world_size).backward()  # of the sums it makes means

    def sum(self) -> list[float]:
        """Sum ``shared`` over the workers, as the gradients are already."""
        dist.all_reduce(self.shared)
        return _numbers(self.shared, nn.utils.get_total_norm(self._gradients()))


class FullySharded(Workers):
    """``fully_shard`` (FSDP2; Zhao et al. 2023, arXiv:2304.11277): each worker holds a part of every parameter.

    A block's parameters are gathered when it computes. The gradients and the states of the optimizers are sharded like
    the parameters.
    """

    calls_together = True
    evaluates_together = True

    def __init__(self, model: nn.Module, world_size: int, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        for parameter in model.parameters():  # each worker keeps its part of its own weights
            dist.broadcast(parameter.data, src=0)
        mesh = init_device_mesh(device.type, (world_size,))
        for block in repeated_blocks(model):
            fully_shard(block, mesh=mesh)
        # Not gathered between the passes, whatever kind of pass was the last: parameters are always the sharded ones.
        self._wrapped: nn.Module = _TokenLosses(model)
        fully_shard(self._wrapped, mesh=mesh, reshard_after_forward=True)
        super().__init__(model, world_size, device)

    def equalise(self) -> None:
        """Do nothing: there is one copy of the weights."""

    def losses(self, ids_BT: Tensor, targets_BT: Tensor, *, is_last: bool, **settings: Any) -> Tensor:
        """Return the losses of a micro-batch."""
        losses_BT: Tensor = self._wrapped(ids_BT, targets_BT, **settings)
        return losses_BT

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch, summed over the workers."""
        (loss * self._world_size).backward()  # of the sums it makes means

    def sum(self) -> list[float]:
        """Sum ``shared`` and the squares of the gradients over the workers."""
        shards = [gradient.to_local() for gradient in self._gradients()]  # type: ignore[attr-defined]
        square = nn.utils.get_total_norm(shards).square()
        sums = torch.cat((self.shared, square[None]))
        dist.all_reduce(sums)
        return _numbers(sums[:2], sums[2].sqrt())


_KINDS: dict[Parallel, type[Workers]] = {"replicated": Replicated, "ddp": DataParallel, "fsdp": FullySharded}


def share_training(model: nn.Module, parallel: Parallel, world_size: int, device: torch.device) -> Workers:
    """Return the workers that train a model together; one alone has nothing to share, whatever ``parallel`` says.

    Args:
        model: Has ``token_losses``; on ``device``. Its parameters may be replaced by sharded ones.
        parallel: What they share.
        world_size: Workers of the default process group; 1 needs no group.
        device: Where this worker computes.
    """
    return (_KINDS[parallel] if world_size > 1 else Replicated)(model, world_size, device)


def _numbers(shared: Tensor, norm: Tensor) -> list[float]:
    """Wait for the device once."""
    return torch.cat((shared, norm[None])).tolist()
