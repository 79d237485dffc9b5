import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deconv_model.autoencoder import Autoencoder
from deconv_model.autoencoder_config import AutoencoderConfig, NoiseConfig
from deconv_model.noise import add_noise
from deconv_model.optim import build_optimizers
from deconv_model.training_config import TrainingConfig

torch.set_num_threads(1)

VOCABULARY = 20
SPATIAL = AutoencoderConfig(
    vocab_size=VOCABULARY, context_length=24, latent="spatial", latent_size=10, widths=(12, 14, 16), strides=(2, 3)
)
VECTOR = replace(SPATIAL, latent="vector", latent_size=40)
OVERLAPPING = replace(SPATIAL, resampling_kernel=2, blocks=(0, 1, 2), kernel_size=4, expansion=2)
CONFIGS = {
    "spatial": SPATIAL,
    "vector": VECTOR,
    "overlapping": OVERLAPPING,
    "one level": replace(VECTOR, widths=(9,), strides=()),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def _model(config: AutoencoderConfig) -> Autoencoder:
    """Return a model in float64 none of whose weights is zero: output projections start there."""
    torch.manual_seed(0)
    model = Autoencoder(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def _ids(*shape: int) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def _train(model: Autoencoder, steps: int, batch: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """Train on pairs of inputs and targets."""
    optimizers = build_optimizers(model, TrainingConfig(steps=steps, muon_lr=0.03, adamw_lr=0.01))
    for _ in range(steps):
        loss = model.token_losses(*batch()).mean()
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()


@each_config
@pytest.mark.parametrize("length", [24, 17, 1])
def test_latents_and_outputs_have_the_promised_shapes_at_any_length(config: AutoencoderConfig, length: int) -> None:
    model, ids = _model(config), _ids(3, length)
    latents = model.encode(ids)
    vector = config.latent == "vector"
    assert latents.shape == ((3, 40) if vector else (3, -(-length // 6), 10))
    assert model.decode(latents).shape == (3, 24 if vector else latents.shape[1] * 6, VOCABULARY)
    assert model.decode(latents, length).shape == (3, length, VOCABULARY)
    assert model.token_losses(ids, ids).shape == (3, length)
    assert model.reconstruct(ids).shape == (3, length)
    assert model.denoise(ids, min(24, length + 1)).shape == (3, min(24, length + 1)) or not vector


@each_config
def test_a_sequence_does_not_notice_the_others_of_its_batch(config: AutoencoderConfig) -> None:
    model, ids = _model(config), _ids(3, 17)
    torch.testing.assert_close(model.decode(model.encode(ids))[1:2], model.decode(model.encode(ids[1:2])))


@pytest.mark.parametrize(("config", "filled"), [(SPATIAL, 18), (OVERLAPPING, 18), (VECTOR, 24)])
def test_a_sequence_that_ends_early_is_filled_up_with_blanks(config: AutoencoderConfig, filled: int) -> None:
    model, ids = _model(config), _ids(2, 17)
    blanks = ids.new_full((2, filled - 17), config.blank_id)
    whole = model.decode(model.encode(torch.cat([ids, blanks], dim=1)))
    torch.testing.assert_close(model.decode(model.encode(ids), 17), whole[:, :17])


@each_config
def test_every_token_reaches_the_latent_and_comes_back_through_it_alone(config: AutoencoderConfig) -> None:
    model, ids = _model(config), _ids(1, 24)
    latents = model.encode(ids)
    for position in range(24):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] + 1) % VOCABULARY
        assert not torch.equal(model.encode(changed), latents)
    logits = model.decode(latents)
    for place in torch.eye(latents[0].numel(), dtype=torch.float64).view(-1, *latents.shape[1:]):
        assert not torch.equal(model.decode(latents + place), logits)


def test_a_block_sees_both_sides() -> None:
    model, ids = _model(replace(SPATIAL, blocks=(0, 0, 1))), _ids(1, 24)
    changed = ids.clone()
    changed[0, 12] = (changed[0, 12] + 1) % VOCABULARY  # of the tokens 12 to 17, which make latent 2
    moved = (model.encode(changed) != model.encode(ids))[0].any(dim=1)
    assert moved.tolist() == [False, True, True, True]


@pytest.mark.parametrize("config", [SPATIAL, OVERLAPPING], ids=["side by side", "overlapping"])
def test_down_and_up_are_strided_and_transposed_convolutions(config: AutoencoderConfig) -> None:
    model = _model(config)
    stride, taps = 3, 3 * config.resampling_kernel
    padding = (taps - stride) // 2
    down: Any = next(part for part in model.encoder if getattr(part, "stride", 0) == 3)
    up: Any = next(part for part in model.decoder if getattr(part, "stride", 0) == 3)
    fine, coarse = torch.randn(2, 12, 14, dtype=torch.float64), torch.randn(2, 4, 16, dtype=torch.float64)

    padded = F.pad(down.norm(fine).transpose(1, 2), (padding, taps - stride - padding))
    kernel = down.weight.view(16, taps, 14).transpose(1, 2)
    torch.testing.assert_close(down(fine), F.conv1d(padded, kernel, stride=stride).transpose(1, 2))

    kernel = up.weight.view(taps, 14, 16).permute(2, 1, 0)
    full = F.conv_transpose1d(up.norm(coarse).transpose(1, 2), kernel, stride=stride)
    torch.testing.assert_close(up(coarse), full.transpose(1, 2)[:, padding : padding + 12])


def test_the_cross_entropy_is_that_of_the_cosines_over_the_temperature() -> None:
    model, ids = _model(SPATIAL), _ids(2, 17)
    logits = model.decode(model.encode(ids), 17)
    assert logits.abs().max() <= 1 / SPATIAL.temperature
    expected = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    torch.testing.assert_close(model.token_losses(ids, ids), expected)
    assert torch.equal(model.reconstruct(ids), logits.argmax(dim=-1))


def test_the_embedding_loss_is_one_minus_the_cosine_with_the_target() -> None:
    model, ids = _model(replace(SPATIAL, loss="embedding")), _ids(2, 17)
    cosines = model.decode(model.encode(ids), 17) * SPATIAL.temperature
    torch.testing.assert_close(model.token_losses(ids, ids), 1 - cosines.gather(2, ids[:, :, None])[:, :, 0])


@pytest.mark.parametrize("loss", ["cross_entropy", "embedding"])
def test_blank_targets_cost_nothing_and_teach_nothing(loss: Any) -> None:
    model, ids = _model(replace(SPATIAL, loss=loss)), _ids(2, 12)
    targets = ids.clone()
    targets[0, 5:] = SPATIAL.blank_id
    losses = model.token_losses(ids, targets)
    assert (losses[0, 5:] == 0).all()
    torch.testing.assert_close(losses[targets == ids], model.token_losses(ids, ids)[targets == ids])
    nothing = model.token_losses(ids, torch.full_like(ids, SPATIAL.blank_id))
    assert (nothing == 0).all()
    nothing.sum().backward()
    assert all(parameter.grad is None or (parameter.grad == 0).all() for parameter in model.parameters())


def test_a_new_vector_gives_every_position_back_its_own() -> None:
    model = Autoencoder(replace(VECTOR, latent_size=64))  # as wide as its coarsest level, 4 x 16
    torch.testing.assert_close(model.from_latent.weight @ model.to_latent.weight, torch.eye(64), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["cross_entropy", "embedding"])
@pytest.mark.parametrize("config", [SPATIAL, VECTOR], ids=["spatial", "vector"])
def test_both_latents_learn_to_keep_random_sequences_with_both_losses(config: AutoencoderConfig, loss: Any) -> None:
    torch.manual_seed(0)
    model = Autoencoder(replace(config, latent_size=4 * config.latent_size, widths=(16, 32, 64), blocks=0, loss=loss))
    generator = torch.Generator().manual_seed(2)

    def batch() -> tuple[Tensor, Tensor]:
        ids = torch.randint(VOCABULARY, (32, 24), generator=generator)
        return ids, ids

    _train(model, 80, batch)
    unseen = _ids(64, 24)
    assert (model.reconstruct(unseen) == unseen).float().mean() > 0.9


def test_noise_is_removed_where_the_rest_tells_what_was_there() -> None:
    torch.manual_seed(0)
    model = Autoencoder(replace(SPATIAL, latent_size=32, widths=(16, 32, 64), blocks=(0, 0, 1)))
    generator = torch.Generator().manual_seed(2)
    noise = NoiseConfig(substitution=0.15, masking=0.1)

    def batch() -> tuple[Tensor, Tensor]:  # each token is one more than the one before
        clean = (torch.randint(VOCABULARY, (32, 1), generator=generator) + torch.arange(24)) % VOCABULARY
        return add_noise(clean, noise, VOCABULARY, generator), clean

    _train(model, 60, batch)
    noisy, clean = batch()
    errors_before, errors_after = ((ids != clean).float().mean() for ids in (noisy, model.denoise(noisy)))
    assert errors_after < errors_before / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 1}, "vocab_size must be at least 2, got 1"),
        ({"context_length": 25}, r"context_length must be a multiple of the product of strides \(6\), got 25"),
        ({"context_length": 0}, "context_length must be a multiple of the product of strides .* got 0"),
        ({"latent": "matrix"}, "latent must be one of spatial, vector, got 'matrix'"),
        ({"latent_size": 0}, "latent_size must be at least 1, got 0"),
        ({"widths": ()}, r"widths must all be at least 1, got \(\)"),
        ({"widths": (12, 0, 16)}, r"widths must all be at least 1, got \(12, 0, 16\)"),
        ({"strides": (2,)}, r"strides must be one fewer than the 3 widths, got \(2,\)"),
        ({"strides": (2, 1)}, r"strides must all be at least 2, got \(2, 1\)"),
        ({"resampling_kernel": 0}, "resampling_kernel must be at least 1, got 0"),
        ({"blocks": -1}, "blocks must be at least 0, got -1"),
        ({"blocks": (1, 1)}, r"blocks must be one number or one for each of the 3 levels, got \(1, 1\)"),
        ({"kernel_size": 0}, "kernel_size must be at least 1, got 0"),
        ({"expansion": 0}, "expansion must be at least 1, got 0"),
        ({"loss": "hinge"}, "loss must be one of cross_entropy, embedding, got 'hinge'"),
        ({"temperature": 0.0}, r"temperature must be above 0, got 0\.0"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        replace(SPATIAL, **change)


@each_config
def test_a_configuration_survives_json(config: AutoencoderConfig) -> None:
    assert AutoencoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not an autoencoder configuration: .*'depth'"):
        AutoencoderConfig.from_dict({**SPATIAL.to_dict(), "depth": 3})


def test_inputs_that_cannot_work_are_refused() -> None:
    model, vector, ids = Autoencoder(SPATIAL), Autoencoder(VECTOR), _ids(2, 12)
    for bad in (-1, VOCABULARY + 1):
        with pytest.raises(ValueError, match=rf"^ids must be from 0 to vocab_size = 20, got .*{bad}"):
            model.encode(torch.where(ids == ids[0, 0], bad, ids))
        with pytest.raises(ValueError, match=r"^targets must be from 0 to vocab_size = 20"):
            model.token_losses(ids, torch.where(ids == ids[0, 0], bad, ids))
    for length in (0, 25):
        with pytest.raises(ValueError, match=rf"^length must be from 1 to 24, got {length}$"):
            model.encode(_ids(2, length))
    with pytest.raises(ValueError, match=r"^length must be from 1 to 12, got 13$"):
        model.decode(model.encode(ids), 13)
    with pytest.raises(ValueError, match=r"^latents must be \[B, M, 10\] for a spatial latent, got \[2, 40\]$"):
        model.decode(vector.encode(ids))
    with pytest.raises(ValueError, match=r"^latents must be \[B, 40\] for a vector latent, got \[2, 2, 10\]$"):
        vector.decode(model.encode(ids))


def test_bfloat16_products_leave_logits_and_losses_in_float32() -> None:
    model, ids = Autoencoder(SPATIAL), _ids(2, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = model.encode(ids)
        assert latents.dtype == torch.bfloat16
        assert model.decode(latents).dtype == torch.float32
        assert model.token_losses(ids, ids).dtype == torch.float32
