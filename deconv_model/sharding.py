"""Tensors that ``fully_shard`` has spread over the workers (DTensors), and the whole tensors that checkpoints hold.

A tensor is sharded if it says so itself, so nothing here imports what only sharded models need (2 s).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as one piece: gathered, which all workers have to do together, if it is sharded."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    gathered: Tensor = tensor.full_tensor()
    return gathered.detach()


def sharded_like(example: Tensor, tensor: Tensor) -> Tensor:
    """Return this worker's shard of a whole tensor that is the same on all workers, if ``example`` is sharded."""
    if not hasattr(example, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(example, DTensor)
    tensor = tensor.to(example.device)
    return distribute_tensor(tensor, example.device_mesh, example.placements, src_data_rank=None)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's ``state_dict`` with sharded tensors gathered, which all workers have to do together."""
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def load_whole_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model, sharded or not, what :func:`whole_state` returned.

    Raises:
        RuntimeError: It belongs to another model.
    """
    own = model.state_dict()
    model.load_state_dict({name: sharded_like(own.get(name, value), value) for name, value in state.items()})
