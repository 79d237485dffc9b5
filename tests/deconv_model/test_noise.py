from typing import Any

import pytest
import torch
from torch import Tensor

from deconv_model.autoencoder_config import NoiseConfig
from deconv_model.noise import add_noise

VOCABULARY = 1000
BLANK = VOCABULARY


def _noisy(ids_BT: Tensor, seed: int = 0, **noise: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return add_noise(ids_BT, NoiseConfig(**noise), VOCABULARY, generator)


def _rows(batch: int = 200, length: int = 50) -> Tensor:
    """Return rows of ids that name their own place; random tokens are rarely among them."""
    return torch.arange(length).repeat(batch, 1)


def test_no_noise_changes_nothing() -> None:
    assert torch.equal(_noisy(_rows()), _rows())


def test_substitution_puts_any_token_at_its_share_of_places() -> None:
    clean = _rows()
    noisy = _noisy(clean, substitution=0.3)
    assert (noisy != clean).float().mean().item() == pytest.approx(0.3, abs=0.02)
    replaced = noisy[noisy != clean]
    assert replaced.min() >= 0
    assert replaced.max() < VOCABULARY
    assert replaced.unique().numel() > 900


def test_masking_puts_blanks_at_its_share_of_places() -> None:
    clean = _rows()
    noisy = _noisy(clean, masking=0.2)
    assert (noisy == BLANK).float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert torch.equal(noisy[noisy != BLANK], clean[noisy != BLANK])


def test_deletion_closes_the_gap_and_leaves_blanks_at_the_end() -> None:
    noisy = _noisy(_rows(), deletion=0.2)
    assert (noisy == BLANK).float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert (noisy.diff(dim=1) >= 0).all()  # order is kept, and blanks, the highest id, come last
    for row in noisy:
        left = row[row != BLANK]
        assert left.unique().numel() == left.numel()


def test_insertion_keeps_the_tokens_in_order_between_random_ones() -> None:
    noisy = _noisy(_rows(), insertion=0.2)
    assert noisy.shape == (200, 50)
    kept = inserted = 0
    for row in noisy.tolist():
        expected = 0
        for token in row:
            if token == expected:
                expected += 1
        kept += expected
        inserted += len(row) - expected
    assert inserted / kept == pytest.approx(0.2, abs=0.02)


def test_permutation_moves_no_token_farther_than_it_may() -> None:
    clean = _rows()
    noisy = _noisy(clean, permutation=3)
    assert torch.equal(noisy.sort(dim=1).values, clean)
    moves = (noisy - clean).abs()
    assert moves.max() == 3
    assert (moves > 0).float().mean() > 0.5


@pytest.mark.parametrize(
    ("noise", "end"),
    [
        ({"permutation": 3}, 30),
        ({"deletion": 0.5}, 30),
        ({"insertion": 1.0}, 60),
        ({"substitution": 1.0}, 30),
        ({"masking": 0.5}, 30),
    ],
)
def test_what_is_past_the_end_of_a_sequence_stays_blank(noise: dict[str, Any], end: int) -> None:
    clean = _rows(length=100)
    clean[:, 30:] = BLANK
    noisy = _noisy(clean, **noise)
    assert (noisy[:, end:] == BLANK).all()
    assert not torch.equal(noisy[:, :end], clean[:, :end])
    if "deletion" not in noise and "masking" not in noise:
        assert (noisy[:, :end] != BLANK).all()


def test_the_same_generator_gives_the_same_noise() -> None:
    noise = {"permutation": 2, "deletion": 0.1, "insertion": 0.1, "substitution": 0.1, "masking": 0.1}
    first = _noisy(_rows(), seed=3, **noise)
    assert torch.equal(first, _noisy(_rows(), seed=3, **noise))
    assert not torch.equal(first, _noisy(_rows(), seed=4, **noise))


def test_the_input_is_left_as_it_is() -> None:
    clean = _rows()
    _noisy(clean, permutation=2, deletion=0.1, insertion=0.1, substitution=0.1, masking=0.1)
    assert torch.equal(clean, _rows())


@pytest.mark.parametrize("name", ["deletion", "insertion", "substitution", "masking"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_probability_outside_0_to_1_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be in \[0, 1\], got {value}$"):
        NoiseConfig(**{name: value})


def test_a_negative_permutation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^permutation must be at least 0, got -1$"):
        NoiseConfig(permutation=-1)
