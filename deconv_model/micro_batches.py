"""A worker's share of a global batch, cut into what it computes at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deconv_model.data import SequenceOrder


def micro_batches(
    order: SequenceOrder,
    start: int,
    size: int,
    *,
    limit: int,
    rank: int,
    world_size: int,
    device: torch.device,
    together: bool = False,
) -> list[tuple[Tensor, float]]:
    """Return one worker's micro-batches, int64 [b, T + 1] each, with what their losses count.

    Args:
        order: Where the sequences come from.
        start: Position of the global batch.
        size: Sequences in it.
        limit: Sequences of a micro-batch, at most.
        rank: The worker.
        world_size: How many there are.
        device: Where to.
        together: Whether all workers must get equally many, because they wait for each other in each: those with less
            to do get a sequence again, which counts 0.
    """
    ids = torch.from_numpy(order.batch(start, size, rank, world_size)).to(device)
    parts = [(ids[first : first + limit], 1.0) for first in range(0, len(ids), limit)]
    if together:
        most = math.ceil(math.ceil(size / world_size) / limit)
        again = torch.from_numpy(order.batch(start, 1)).to(device)
        parts += [(again, 0.0)] * (most - len(parts))
    return parts
