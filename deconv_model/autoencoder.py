"""The convolutional autoencoder: a sequence to one latent vector, or to a short row of them, and back.

"Deconvolutional Paragraph Representation Learning" (Zhang et al. 2017, arXiv:1708.04729): strided convolutions lead
down, transposed convolutions up, and all positions of the output are computed at once, from the latent alone. A softmax
over the cosines with the rows of the embedding, which is also that of the input, gives the tokens. No position is
hidden from any other: convolutions are padded on both sides, and nothing leads past the latent.

Shape suffixes: B sequences, T positions, M positions of the coarsest level, C channels, D channels of a latent,
V token ids, R positions that have a target.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deconv_model.autoencoder_config import AutoencoderConfig
from deconv_model.blocks import RMSNorm, at_least_float32, new_matrix
from deconv_model.config import require
from deconv_model.softmax import capped_cross_entropy, capped_logits


class Autoencoder(nn.Module):
    """Encoder, latent and decoder over token ids.

    Initial weights depend on torch's global generator only: call ``torch.manual_seed`` first. Sequences may have any
    length up to the context; shorter ones are filled up with blanks inside, to whole strides for a spatial latent and
    to the whole context for a vector. A vector model that is to keep short sequences must be trained on some.

    Args:
        config: Sizes, loss and temperature.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.widths[0]
        self.embedding = nn.Parameter(torch.randn(config.vocab_size + 1, width) * width**-0.5)  # the last is the blank
        self.encoder = nn.Sequential()
        self.decoder = nn.Sequential()
        levels = list(zip(config.widths, config.level_blocks, (1, *config.strides), strict=True))
        for level, (width, blocks, stride) in enumerate(levels):
            if level:
                kernel_size = config.resampling_kernel * stride
                self.encoder.append(_StridedConvolution(config.widths[level - 1], width, stride, kernel_size))
            self.encoder.extend(_Block(width, config) for _ in range(blocks))
        for level, (width, blocks, stride) in reversed(list(enumerate(levels))):
            self.decoder.extend(_Block(width, config) for _ in range(blocks))
            if level:
                kernel_size = config.resampling_kernel * stride
                self.decoder.append(_TransposedConvolution(width, config.widths[level - 1], stride, kernel_size))
        # For a vector, one matrix spans the coarsest level: it has weights of its own for each position.
        spanned = config.widths[-1] * (config.context_length // config.total_stride if self._is_vector else 1)
        # An orthogonal map and its inverse: what a position puts into the latent comes back at that position, from the
        # first step on. A vector takes far longer to learn where is what from two unrelated random matrices.
        to_latent = nn.init.orthogonal_(torch.empty(config.latent_size, spanned))
        self.to_latent = _NormedLinear(to_latent)
        self.from_latent = _NormedLinear(to_latent.t().clone())

    @property
    def _is_vector(self) -> bool:
        return self.config.latent == "vector"

    def encode(self, ids_BT: Tensor) -> Tensor:
        """Return the latents: [B, D] for a vector; [B, M, D], M = T / total stride rounded up, for a spatial latent.

        Raises:
            ValueError: The sequences are empty or longer than the context, or an id is neither a token nor the blank.
        """
        config = self.config
        length = ids_BT.shape[1]
        self._check_length(length, config.context_length)
        self._check_ids("ids", ids_BT)
        whole = config.context_length if self._is_vector else -(-length // config.total_stride) * config.total_stride
        x_BTC = F.embedding(F.pad(ids_BT, (0, whole - length), value=config.blank_id), self.embedding)
        x_BMC = self.encoder(F.rms_norm(at_least_float32(x_BTC), x_BTC.shape[-1:], eps=1e-6))
        latents: Tensor = self.to_latent(x_BMC.flatten(1) if self._is_vector else x_BMC)
        return latents

    def decode(self, latents: Tensor, length: int | None = None) -> Tensor:
        """Return the logits of all tokens, [B, T, V] in float32 (float64 for a float64 model).

        Args:
            latents: Of :meth:`encode`: [B, D] or [B, M, D].
            length: Positions to decode; ``None`` means all that the latents stand for.

        Raises:
            ValueError: The latents have another shape, or stand for fewer positions than ``length``.
        """
        return capped_logits(self._unit_features(latents, length), self._unit_rows(), 0.0) / self.config.temperature

    def reconstruct(self, ids_BT: Tensor) -> Tensor:
        """Return the most probable token at each position after a pass through the latent, [B, T].

        Raises:
            ValueError: As :meth:`encode`.
        """
        return self.denoise(ids_BT, ids_BT.shape[1])

    @torch.no_grad()
    def denoise(self, ids_BT: Tensor, length: int | None = None) -> Tensor:
        """Return what damaged sequences most probably were, [B, length], by a model that was trained on noise.

        Args:
            ids_BT: Damaged sequences; the blank may be anywhere.
            length: Of the clean sequences; ``None`` means that of the damaged ones.

        Raises:
            ValueError: As :meth:`encode` and :meth:`decode`.
        """
        return self.decode(self.encode(ids_BT), ids_BT.shape[1] if length is None else length).argmax(dim=-1)

    def token_losses(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the loss of each position, [B, T] in float32 (float64 for a float64 model).

        Args:
            ids_BT: Inputs, as they are or damaged (:func:`~deconv_model.noise.add_noise`).
            targets_BT: The ids to decode; a position whose target is the blank costs nothing.

        Raises:
            ValueError: As :meth:`encode` and :meth:`decode`, or a target is neither a token nor the blank.
        """
        config = self.config
        self._check_ids("targets", targets_BT)
        x_BTC = self._unit_features(self.encode(ids_BT), targets_BT.shape[1])
        is_token_BT = targets_BT != config.blank_id
        x_RC, targets_R = x_BTC[is_token_BT], targets_BT[is_token_BT]
        if not len(targets_R):
            return (x_BTC * 0.0).sum(dim=-1)  # the softmax takes at least one row; this has a gradient all the same
        if config.loss == "embedding":
            # Rows that were drawn to the outputs would all become the same one, which costs nothing.
            losses_R = 1.0 - (x_RC * F.embedding(targets_R, self._unit_rows().detach())).sum(dim=-1)
        else:
            losses_R = capped_cross_entropy(x_RC / config.temperature, self._unit_rows(), targets_R, 0.0)
        return torch.zeros_like(targets_BT, dtype=losses_R.dtype).masked_scatter(is_token_BT, losses_R)

    def _unit_features(self, latents: Tensor, length: int | None) -> Tensor:
        """Return the unit vectors [B, length, C] whose cosines with the rows of the embedding count."""
        config = self.config
        shape = (config.latent_size,) if self._is_vector else (-1, config.latent_size)
        if latents.ndim != 1 + len(shape) or latents.shape[-1] != config.latent_size:
            wanted = ", ".join(["B", "M", str(config.latent_size)][:: 2 if self._is_vector else 1])
            raise ValueError(f"latents must be [{wanted}] for a {config.latent} latent, got {list(latents.shape)}")
        x_BMC = self.from_latent(latents)
        if self._is_vector:
            x_BMC = x_BMC.unflatten(1, (-1, config.widths[-1]))
        positions = x_BMC.shape[1] * config.total_stride
        self._check_length(positions if length is None else length, positions)
        return F.normalize(at_least_float32(self.decoder(x_BMC)[:, :length]), dim=-1)

    def _unit_rows(self) -> Tensor:
        return F.normalize(self.embedding[:-1], dim=-1)

    def _check_length(self, length: int, longest: int) -> None:
        require(1 <= length <= longest, f"length must be from 1 to {longest}, got {length}")

    def _check_ids(self, name: str, ids_BT: Tensor) -> None:
        lowest, highest = (int(bound) for bound in ids_BT.aminmax())
        blank = self.config.blank_id
        require(
            lowest >= 0 and highest <= blank,
            f"{name} must be from 0 to vocab_size = {blank}, got {lowest} to {highest}",
        )


class _NormedLinear(nn.Module):
    """A matrix product with the normalised input."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.norm = RMSNorm(weight.shape[1])
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.weight)


class _StridedConvolution(nn.Module):
    """A dense convolution of the normalised input, as one matrix product over windows."""

    def __init__(self, channels: int, out_channels: int, stride: int, kernel_size: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels)
        self.stride = stride
        self.kernel_size = kernel_size
        self.weight = new_matrix(out_channels, kernel_size * channels)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return F.linear(_windows(self.norm(x_BTC), self.kernel_size, self.stride), self.weight)


class _TransposedConvolution(nn.Module):
    """The way back: each position becomes ``kernel_size`` positions, and where these overlap they are added."""

    def __init__(self, channels: int, out_channels: int, stride: int, kernel_size: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels)
        self.stride = stride
        self.overlap = kernel_size // stride
        self.weight = nn.Parameter(
            torch.randn(kernel_size * out_channels, channels) * (channels * self.overlap) ** -0.5
        )

    def forward(self, x_BMC: Tensor) -> Tensor:
        groups = F.linear(self.norm(x_BMC), self.weight).chunk(self.overlap, dim=2)
        shifted = [F.pad(group, (0, 0, j, self.overlap - 1 - j)) for j, group in enumerate(groups)]
        sums = sum(shifted[1:], shifted[0])
        batch, count, _ = x_BMC.shape
        first = (self.overlap - 1) * self.stride // 2  # as much is cropped as the strided convolution pads
        return sums.reshape(batch, sums.shape[1] * self.stride, -1)[:, first : first + count * self.stride]


class _Block(nn.Module):
    """``x + Wout(silu(u) * v)``, where ``u, v`` is a dense convolution of the normalised input.

    ``Wout`` starts at zero, so a new block is the identity.
    """

    def __init__(self, channels: int, config: AutoencoderConfig) -> None:
        super().__init__()
        hidden = config.expansion * channels
        self.convolution = _StridedConvolution(channels, 2 * hidden, 1, config.kernel_size)
        self.project_out = nn.Parameter(torch.zeros(channels, hidden))

    def forward(self, x_BTC: Tensor) -> Tensor:
        u, v = self.convolution(x_BTC).chunk(2, dim=-1)
        return x_BTC + F.linear(F.silu(u) * v, self.project_out)


def _windows(x_BTC: Tensor, kernel_size: int, stride: int) -> Tensor:
    """Return what each position of a convolution sees, [B, T / stride, kernel_size * C], with zeros beyond the ends."""
    before = (kernel_size - stride) // 2
    x_BTC = F.pad(x_BTC, (0, 0, before, kernel_size - stride - before))
    if kernel_size == stride:
        return x_BTC.unflatten(1, (-1, stride)).flatten(2)
    return x_BTC.unfold(1, kernel_size, stride).transpose(2, 3).flatten(2)  # unfold puts the taps last
