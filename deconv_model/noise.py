"""Noise on token ids, for denoising autoencoders.

Substitution is the noise of the character correction in Zhang et al. 2017 (arXiv:1708.04729), deletion and local
permutation are those of Lample et al. 2018 (arXiv:1711.00043).

Shape suffixes: B sequences, T positions, P pairs of a possible insertion and a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deconv_model.autoencoder_config import NoiseConfig


def add_noise(ids_BT: Tensor, noise: NoiseConfig, vocab_size: int, generator: torch.Generator | None = None) -> Tensor:
    """Return damaged copies of the sequences, of the same length.

    The noises act in the order of the fields of ``noise``. A deletion pulls the rest of its sequence forward and leaves
    a blank at the end; an insertion pushes it back, and what crosses the end is lost. Blanks at the end of a sequence
    are not part of it: nothing is done to them.

    Args:
        ids_BT: Token ids, int64; ``vocab_size`` itself is the blank.
        noise: What to do, and how much.
        vocab_size: Random tokens are drawn evenly from the ids below it.
        generator: Source of all randomness, on the device of the ids; ``None`` is torch's global one.
    """
    shape, device = ids_BT.shape, ids_BT.device

    def chosen_tokens(ids_BT: Tensor, probability: float) -> Tensor:
        chosen_BT = torch.rand(shape, device=device, generator=generator) < probability
        return chosen_BT & (ids_BT != vocab_size)

    def random_tokens() -> Tensor:
        return torch.randint(vocab_size, shape, device=device, generator=generator)

    if noise.permutation:
        # Sorting the places after adding less than k + 1 to each moves none by more than k.
        shift_BT = torch.rand(shape, device=device, generator=generator) * (noise.permutation + 1)
        shift_BT.masked_fill_(ids_BT == vocab_size, noise.permutation + 1)
        places_T = torch.arange(shape[1], device=device)
        ids_BT = ids_BT.gather(1, (places_T + shift_BT).argsort(dim=1, stable=True))
    if noise.deletion:
        deleted_BT = chosen_tokens(ids_BT, noise.deletion)
        ids_BT = _keep(ids_BT.masked_fill(deleted_BT, vocab_size), ~deleted_BT)
    if noise.insertion:
        inserted_BT = chosen_tokens(ids_BT, noise.insertion)
        pairs_BTP = torch.stack([random_tokens(), ids_BT], dim=2)
        kept_BTP = torch.stack([inserted_BT, torch.ones_like(inserted_BT)], dim=2)
        ids_BT = _keep(pairs_BTP.flatten(1), kept_BTP.flatten(1))[:, : shape[1]]
    if noise.substitution:
        ids_BT = torch.where(chosen_tokens(ids_BT, noise.substitution), random_tokens(), ids_BT)
    if noise.masking:
        ids_BT = ids_BT.masked_fill(chosen_tokens(ids_BT, noise.masking), vocab_size)
    return ids_BT


def _keep(ids_BT: Tensor, kept_BT: Tensor) -> Tensor:
    """Move what is kept to the front of each row, in its order."""
    return ids_BT.gather(1, (~kept_BT).long().argsort(dim=1, stable=True))
