import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deconv_model.config import LevelConfig, LSTMConfig, ModelConfig, StackConfig
from deconv_model.language_model import LanguageModel, count_parameters
from tests.deconv_model.small_models import ALL_CONFIGS, CONFIGS, CONTEXT, VOCABULARY, random_ids, randomised_model

torch.set_num_threads(1)

all_shapes = pytest.mark.parametrize("config", ALL_CONFIGS.values(), ids=ALL_CONFIGS.keys())


@all_shapes
@pytest.mark.parametrize("length", [CONTEXT, CONTEXT - 1, 13])
def test_an_output_sees_its_own_input_and_none_after_it(config: ModelConfig | LSTMConfig, length: int) -> None:
    model = randomised_model(config)
    ids = random_ids(1, length)
    original = model(ids)
    changed = ids.repeat(length, 1)
    positions = torch.arange(length)
    changed[positions, positions] = (changed[positions, positions] + 1) % VOCABULARY
    for position, row in enumerate(changed):
        logits = model(row[None])
        assert torch.equal(logits[:, :position], original[:, :position])
        assert (logits[:, position] != original[:, position]).any()


def test_the_coarse_level_carries_tokens_farther_than_the_fine_convolutions() -> None:
    model = randomised_model(CONFIGS["two levels, coarse attention"])
    ids = random_ids(1, CONTEXT)
    changed = ids.clone()
    changed[0, 0] = (changed[0, 0] + 1) % VOCABULARY
    assert (model(ids)[0, -1] != model(changed)[0, -1]).any()


@all_shapes
def test_a_shorter_sequence_gives_the_beginning_of_the_outputs(config: ModelConfig | LSTMConfig) -> None:
    model = randomised_model(config)
    ids = random_ids(2, CONTEXT)
    whole = model(ids)
    for length in range(1, CONTEXT):
        assert (model(ids[:, :length]) - whole[:, :length]).abs().max() < 1e-12


@all_shapes
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_prefill_and_steps_give_the_logits_of_the_whole(
    config: ModelConfig | LSTMConfig, dtype: torch.dtype, tolerance: float
) -> None:
    model = randomised_model(config, dtype)
    ids = random_ids(2, CONTEXT)
    expected = model(ids)
    for prompt in (1, 2, 5, 17, CONTEXT):
        logits, state = model.prefill(ids[:, :prompt])
        assert (logits - expected[:, prompt - 1]).abs().max() < tolerance
        for position in range(prompt, CONTEXT):
            logits = model.step(ids[:, position], state)
            assert (logits - expected[:, position]).abs().max() < tolerance
        with pytest.raises(ValueError, match="context_length = 36"):
            model.step(ids[:, 0], state)


@all_shapes
@pytest.mark.parametrize("cap", [15.0, 0.0])
def test_token_losses_are_the_cross_entropy_of_the_logits(config: ModelConfig | LSTMConfig, cap: float) -> None:
    model = randomised_model(replace(config, logit_cap=cap))
    ids, targets = random_ids(2, 31), random_ids(2, 31, seed=2)
    losses = model.token_losses(ids, targets)
    expected = F.cross_entropy(model(ids).transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(losses, expected)

    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(losses.mean(), list(parameters.values()))
    expected_gradients = torch.autograd.grad(expected.mean(), list(parameters.values()))
    torch.testing.assert_close(
        dict(zip(parameters, gradients, strict=True)), dict(zip(parameters, expected_gradients, strict=True))
    )


def test_the_cap_bounds_the_logits() -> None:
    model = randomised_model(replace(CONFIGS["two levels, coarse attention"], logit_cap=2.0), spread=3.0)
    largest = model(random_ids(2, CONTEXT)).abs().max()
    assert 1.9 < largest <= 2.0


def test_bfloat16_matrix_products_come_close_and_losses_stay_float32() -> None:
    model = randomised_model(CONFIGS["three levels, attention everywhere"], torch.float32, spread=0.1)
    ids, targets = random_ids(4, CONTEXT), random_ids(4, CONTEXT, seed=2)
    expected = model.token_losses(ids, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.token_losses(ids, targets)
        logits = model(ids)
    assert losses.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=0.02)
    gradients = torch.autograd.grad(losses.mean(), list(model.parameters()))
    expected_gradients = torch.autograd.grad(expected.mean(), list(model.parameters()))
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == torch.float32
        assert F.cosine_similarity(gradient.flatten(), expected_gradient.flatten(), dim=0) > 0.99


def _train(config: ModelConfig, sequences: Tensor, batch_size: int) -> list[float]:
    """Train on each sequence once; return the loss of each step before its update."""
    torch.manual_seed(0)
    model = LanguageModel(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    history = []
    for batch in sequences.split(batch_size):
        loss = model.token_losses(batch[:, :-1], batch[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


@pytest.mark.parametrize("name", ["two levels, coarse attention, pointer", "three levels, attention everywhere"])
def test_random_tokens_teach_nothing_and_a_pattern_is_learnt(name: str) -> None:
    uniform = math.log(VOCABULARY)
    history = _train(CONFIGS[name], random_ids(50 * 16, CONTEXT + 1), batch_size=16)
    late = sum(history[-10:]) / 10
    assert uniform - 0.02 < late < uniform + 0.1

    starts, steps = random_ids(50 * 16, 1), 1 + random_ids(50 * 16, 1, seed=2) % 3
    counting = (starts + steps * torch.arange(CONTEXT + 1)) % VOCABULARY
    history = _train(CONFIGS[name], counting, batch_size=16)
    assert abs(history[0] - uniform) < 0.3
    assert history[-1] < uniform - 1.0


def test_initial_weights_follow_the_global_seed() -> None:
    config = CONFIGS["three levels, attention everywhere"]
    torch.manual_seed(3)
    first = LanguageModel(config).state_dict()
    torch.manual_seed(3)
    same = LanguageModel(config).state_dict()
    other = LanguageModel(config).state_dict()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_dropped_ids_are_the_same_in_all_sequences_and_none_in_evaluation() -> None:
    config = replace(CONFIGS["one level, long taps"], embedding_dropout=0.5)
    model = randomised_model(config)
    undropped = model(random_ids(1, CONTEXT))
    model.train()
    torch.manual_seed(0)
    twice = model(random_ids(1, CONTEXT).repeat(2, 1))
    assert torch.equal(twice[0], twice[1])
    assert not torch.equal(twice[:1], undropped)
    assert not torch.equal(model(random_ids(1, CONTEXT)), twice[:1])
    torch.manual_seed(0)
    assert torch.equal(model(random_ids(1, CONTEXT)), twice[:1])


def test_kept_ids_make_up_for_the_dropped_ones() -> None:
    model = randomised_model(replace(CONFIGS["one level, long taps"], embedding_dropout=0.75))
    embedded: list[Tensor] = []
    model.trunk.register_forward_pre_hook(lambda _, inputs: embedded.append(inputs[0].detach()))
    ids = torch.arange(VOCABULARY)[None]
    model(ids)
    torch.manual_seed(0)
    model.train()(ids)
    whole, dropped = embedded
    kept = dropped[0].any(dim=1)
    assert 0 < kept.sum() < VOCABULARY / 2
    torch.testing.assert_close(dropped[0, kept], 4 * whole[0, kept])


def test_dropout_acts_in_training_only_and_follows_the_global_generator() -> None:
    model = randomised_model(replace(CONFIGS["two levels, coarse attention"], dropout=0.5))
    ids = random_ids(1, CONTEXT)
    assert torch.equal(model(ids), model(ids))
    model.train()
    torch.manual_seed(0)
    first = model(ids)
    assert not torch.equal(model(ids), first)
    torch.manual_seed(0)
    assert torch.equal(model(ids), first)


def test_parameters_are_matrices_taps_and_gains_of_the_counted_size() -> None:
    config = ModelConfig(
        vocab_size=4096,
        context_length=512,
        levels=(
            LevelConfig(
                width=256, encoder=StackConfig(layers=1, hidden=384), decoder=StackConfig(layers=2, hidden=448)
            ),
            LevelConfig(width=320, stride=2, encoder=StackConfig(layers=2, hidden=512, heads=5)),
        ),
    )
    with torch.device("meta"):
        model = LanguageModel(config)
    full_rate = 256 * 768 + 384 * (4 + 256) + 2 * (256 * 896 + 448 * (4 + 256))
    coarse = 2 * (320 * 960 + 320 * 320 + 320 * 1024 + 512 * (4 + 320))
    norms = 3 * 256 + 4 * 320 + (256 + 320) + 256
    resampling = 320 * 512 + 512 * 320
    other = full_rate + coarse + norms + resampling
    assert count_parameters(model) == {"total": 4096 * 256 + other, "embedding": 4096 * 256, "other": other}
    assert max(parameter.ndim for parameter in model.parameters()) == 2


@pytest.mark.parametrize("length", [0, CONTEXT + 1])
def test_a_sequence_of_impossible_length_is_refused(length: int) -> None:
    model = randomised_model(CONFIGS["two levels, coarse attention"])
    ids = random_ids(2, length)
    with pytest.raises(ValueError, match=f"sequence of {length} tokens: must be 1 to context_length = 36"):
        model(ids)
    with pytest.raises(ValueError, match="context_length"):
        model.token_losses(ids, ids)
    with pytest.raises(ValueError, match="context_length"):
        model.prefill(ids)


@pytest.mark.parametrize("bad", [-1, VOCABULARY])
def test_an_id_outside_the_vocabulary_is_refused(bad: int) -> None:
    model = randomised_model(CONFIGS["two levels, coarse attention"])
    ids = random_ids(2, 5)
    ids[1, 3] = bad
    with pytest.raises(ValueError, match=r"ids must be in \[0, vocab_size = 30\), got"):
        model(ids)
    _, state = model.prefill(ids[:1])
    with pytest.raises(ValueError, match="vocab_size"):
        model.step(ids[1:, 3], state)
