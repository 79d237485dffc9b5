import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from deconv_model.config import TrainingConfig
from deconv_model.optim import build_optimizers, learning_rate_factor
from tests.deconv_model.tiny import TinyModel

CONFIG = TrainingConfig(steps=100)


def names_of(model, optimizer):
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in held}


def test_muon_gets_the_matrices_and_adamw_the_rest():
    model = TinyModel()
    optimizers = build_optimizers(model, CONFIG)
    assert names_of(model, optimizers["muon"]) == {"up", "down"}
    assert names_of(model, optimizers["adamw"]) == {"embedding.weight", "taps", "gain"}


def test_embeddings_are_found_by_type_and_by_name_and_frozen_ones_left_alone():
    model = nn.Module()
    model.words = nn.Embedding(5, 4)
    model.head = nn.Linear(4, 5, bias=False)
    model.head.weight = model.words.weight
    model.token_embedding = nn.Parameter(torch.zeros(5, 4))
    model.kernel = nn.Parameter(torch.zeros(3, 4, 2))
    model.frozen = nn.Parameter(torch.zeros(3, 4), requires_grad=False)
    optimizers = build_optimizers(model, CONFIG)
    assert list(optimizers) == ["adamw"]
    assert names_of(model, optimizers["adamw"]) == {"words.weight", "token_embedding", "kernel"}


def test_weight_decay_shrinks_the_matrices_alone():
    model = TinyModel()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in build_optimizers(model, replace(CONFIG, muon_lr=0.1, weight_decay=0.5)).values():
        optimizer.step()
    for name, parameter in model.named_parameters():
        shrunk = 0.95 if name in ("up", "down") else 1.0
        torch.testing.assert_close(parameter.detach(), shrunk * before[name])


def test_a_step_of_muon_changes_the_output_by_about_the_rate_for_all_shapes():
    """Orthogonal up to Newton-Schulz's tolerance, and sqrt(rows / columns) larger for matrices that widen."""
    torch.manual_seed(0)
    for rows, columns, size in ((64, 64, 1.0), (32, 128, 1.0), (128, 32, 2.0)):
        model = nn.Linear(columns, rows, bias=False)
        before = model.weight.detach().clone()
        model.weight.grad = torch.randn(rows, columns)
        build_optimizers(model, replace(CONFIG, muon_lr=0.02, weight_decay=0.0))["muon"].step()
        values = torch.linalg.svdvals(before - model.weight.detach()) / (0.02 * size)
        assert 0.6 < values.median() < 1.3
        assert values.max() < 1.4


def test_the_rate_rises_stays_and_falls():
    config = TrainingConfig(steps=101, warmup=10 / 101, constant_until=40 / 101, final_lr=0.1)
    factors = [learning_rate_factor(step, config) for step in range(101)]
    assert factors[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert factors[10:41] == pytest.approx([1.0] * 31)
    assert factors[70] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)
    falls = [before - after for before, after in itertools.pairwise(factors[40:])]
    assert falls == pytest.approx([0.9 / 60] * 60)


def test_the_cosine_falls_slowly_at_first_and_at_the_end():
    config = TrainingConfig(steps=101, schedule="cosine", warmup=0.0, constant_until=40 / 101, final_lr=0.1)
    factors = [learning_rate_factor(step, config) for step in range(101)]
    assert factors[:41] == pytest.approx([1.0] * 41)
    assert factors[55] == pytest.approx(1.0 - 0.9 * (1.0 - 0.5**0.5) / 2.0)
    assert factors[70] == pytest.approx(0.55)
    assert factors[85] == pytest.approx(1.0 - 0.9 * (1.0 + 0.5**0.5) / 2.0)
    assert factors[100] == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["trapezoid", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    "parts", [(0.0, 0.0, 0.0), (0.05, 0.4, 0.02), (0.0, 1.0, 0.5), (1.0, 1.0, 0.0), (0.5, 0.5, 1.0)]
)
def test_the_rate_is_a_part_of_the_peak_whatever_the_numbers(steps, parts, schedule):
    warmup, constant_until, final_lr = parts
    config = TrainingConfig(
        steps=steps, schedule=schedule, warmup=warmup, constant_until=constant_until, final_lr=final_lr
    )
    factors = [learning_rate_factor(step, config) for step in range(steps)]
    assert all(0.0 <= factor <= 1.0 for factor in factors)
    assert max(factors) > 0.0
    if steps > 2 and constant_until < 1.0:
        assert factors[-1] == pytest.approx(final_lr)
