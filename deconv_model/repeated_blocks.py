"""What is done alike to each of the blocks that a model repeats: recomputation and compilation.

The names in the model's ``state_dict`` stay what they are: only the blocks' ``forward`` is replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


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
        block.forward = _Checkpointed(block.forward)


def compile_blocks(model: nn.Module) -> None:
    """Compile the repeated blocks."""
    for block in repeated_blocks(model):
        block.forward = torch.compile(block.forward)


class _Checkpointed:
    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        return checkpoint(self._forward, *args, use_reentrant=False, **kwargs)
