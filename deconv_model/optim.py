"""Who trains which parameter, how fast, and the optimizers' state under the parameters' names.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) trains the matrices, AdamW (Loshchilov and Hutter
2019, arXiv:1711.05101) everything else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from deconv_model.muon import Muon
from deconv_model.sharding import sharded_like, whole
from deconv_model.training_config import TrainingConfig


def build_optimizers(
    model: nn.Module, config: TrainingConfig, *, rank: int = 0, world_size: int = 1
) -> dict[str, Optimizer]:
    """Return the optimizers of a model by name, at their peak learning rates.

    ``muon`` gets the 2-D parameters except embeddings and convolution taps: an orthogonal update makes sense for a
    matrix that maps features to features, not for rows that are looked up or for taps that act on one channel each.
    Embeddings are the weights of ``nn.Embedding`` and parameters with ``embedding`` in their name; taps have ``taps``
    in theirs. ``adamw`` gets the rest. An optimizer without parameters is left out.

    Weight decay acts on the matrices alone, and is decoupled: a step multiplies them by ``1 - lr * weight_decay``.

    Muon's update is close to an orthogonal matrix, scaled by ``sqrt(max(1, rows / columns))``, which keeps the change
    of the output per unit of input the same for all shapes. Rates near 0.02 are meant for this scaling. The other one
    in use multiplies by ``0.2 * sqrt(max(rows, columns))``, 3 to 9 for widths of 256 to 2,048, and wants rates of
    AdamW's size.

    Args:
        model: The model; parameters that need no gradient are left out.
        config: Gives ``muon_lr``, ``adamw_lr`` and ``weight_decay``.
        rank: This worker's place in the default process group; Muon shares its work out over the group.
        world_size: Workers in that group; 1 needs no group.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            looked_up = id(parameter) in embeddings or "embedding" in name
            is_matrix = parameter.ndim == 2 and not looked_up and "taps" not in name
            (matrices if is_matrix else others).append(parameter)
    optimizers: dict[str, Optimizer] = {}
    if matrices:
        optimizers["muon"] = Muon(
            matrices, lr=config.muon_lr, weight_decay=config.weight_decay, rank=rank, world_size=world_size
        )
    if others:
        # The second moment forgets within some 20 steps: short runs cannot wait for the default of 0.999.
        optimizers["adamw"] = AdamW(others, lr=config.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return optimizers


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Return the part of the peak learning rate for an optimizer step, counted from 0.

    It rises to the peak over the first ``warmup`` of the steps (the first step already moves), is level until
    ``constant_until``, then falls to ``final_lr`` at the last step: straight down, which makes a trapezoid (Hägele et
    al. 2024, arXiv:2405.18392), or along half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983).
    """
    rise = min(1.0, (step + 1) / (config.warmup * config.steps)) if config.warmup else 1.0
    fall_begins = config.constant_until * config.steps
    if step <= fall_begins:
        return rise
    fallen = (step - fall_begins) / (config.steps - 1 - fall_begins)
    if config.schedule == "cosine":
        fallen = (1.0 - math.cos(math.pi * fallen)) / 2.0
    return rise * (1.0 - (1.0 - config.final_lr) * fallen)


def optimizer_states(model: nn.Module, optimizers: Mapping[str, Optimizer]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the state of each optimizer by optimizer, parameter and field; empty before the first step.

    Names instead of torch's positions, so that a state says what it belongs to. The settings of the optimizers are left
    out: they follow from the configuration and the step. The tensors are the live ones, not copies, but for sharded
    ones: those are gathered, which all workers have to do together.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        kind: {
            names[id(parameter)]: {key: whole(value) for key, value in fields.items()}
            for parameter, fields in optimizer.state.items()
        }
        for kind, optimizer in optimizers.items()
    }


def load_optimizer_states(
    model: nn.Module, optimizers: Mapping[str, Optimizer], states: Mapping[str, Mapping[str, Mapping[str, Tensor]]]
) -> None:
    """Give the optimizers copies of what :func:`optimizer_states` returned.

    Raises:
        ValueError: The state belongs to other optimizers or parameters.
    """
    if states.keys() != optimizers.keys():
        raise ValueError(f"the state is of the optimizers {sorted(states)}, the model has {sorted(optimizers)}")
    parameters = dict(model.named_parameters())
    for kind, optimizer in optimizers.items():
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        optimizer.state.clear()
        for name, fields in states[kind].items():
            parameter = parameters.get(name)
            if parameter is None or parameter not in held:
                raise ValueError(f"the state of {kind} has a parameter {name!r}, which it does not train here")
            optimizer.state[parameter] = {key: _as_state_of(parameter, value) for key, value in fields.items()}


def _as_state_of(parameter: Tensor, value: Tensor) -> Tensor:
    copy = value.detach().to(parameter.device, copy=True)
    return sharded_like(parameter, copy) if copy.shape == parameter.shape else copy
