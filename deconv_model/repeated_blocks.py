"""What is done alike to each of the blocks that a model repeats: recomputation and compilation.

Only the blocks' ``forward`` is replaced, so names in the model's ``state_dict`` stay what they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_log = logging.getLogger(__name__)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the members of every ``nn.ModuleList`` called ``blocks``, in the order in which they are registered."""
    return [
        block
        for name, modules in model.named_modules()
        if isinstance(modules, nn.ModuleList) and name.rpartition(".")[2] == "blocks"
        for block in modules
    ]


def checkpoint_blocks(model: nn.Module) -> None:
    """Let the repeated blocks be computed again in the backward pass instead of keeping what they computed.

    Gradients stay the same, bit for bit: dropout and autocast are repeated as they were (Chen et al. 2016,
    arXiv:1604.06174).
    """
    for block in repeated_blocks(model):
        block.forward = _WhileTraining(partial(checkpoint, block.forward, use_reentrant=False), block.forward)


def compile_blocks(model: nn.Module, device: torch.device) -> None:
    """Compile what the repeated blocks do while training, when they are first called.

    Blocks of the same kind and sizes share one compiled code, and a second start takes it from the cache of
    ``torch.compile`` (``TORCHINDUCTOR_CACHE_DIR``). Where nothing can be compiled, a warning says so and the blocks
    stay as they are.

    Args:
        model: The model.
        device: Where it will compute.
    """
    try:
        torch.compile(torch.neg)(torch.zeros(2, device=device))
    except Exception as error:  # a missing compiler, header or driver: each has an exception of its own
        _log.warning("nothing is compiled, training goes on without: %s", str(error).strip().partition("\n")[0])
        return
    blocks = repeated_blocks(model)
    # Beyond the limit nothing is compiled. Each block may differ from the others, and there are whole micro-batches, a
    # smaller last one, and one of a single sequence for workers that only take part.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 3 * len(blocks))
    for block in blocks:
        block.forward = _WhileTraining(torch.compile(block.forward, dynamic=False), block.forward)


class _WhileTraining:
    """Calls one function where gradients are recorded, and another one elsewhere."""

    def __init__(self, training: Callable[..., Any], otherwise: Callable[..., Any]) -> None:
        self._training = training
        self._otherwise = otherwise

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._training if torch.is_grad_enabled() else self._otherwise)(*args, **kwargs)
