from dataclasses import asdict, replace
from itertools import islice
from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deconv_model.config import LevelConfig, ModelConfig, StackConfig
from deconv_model.generation import generate, generate_batch, stream, stream_batch
from deconv_model.language_model import LanguageModel
from deconv_model.sampling import SamplingOptions
from deconv_model.windows import WindowReader, window_step
from tests.deconv_model.small_models import CONFIGS, CONTEXT, VOCABULARY, random_ids, randomised_model

torch.set_num_threads(1)

CONFIG = CONFIGS["three levels, attention everywhere"]
MODEL = randomised_model(CONFIG)
PROMPT = [3, 1, 4]
GREEDY = SamplingOptions(temperature=0)


def _greedy_reference(model: LanguageModel, prompt: list[int], new_tokens: int, half: int) -> list[int]:
    """Read the whole window again for each token."""
    ids = list(prompt)
    start = 0
    for _ in range(new_tokens):
        while len(ids) - start > model.config.context_length:
            start += half
        ids.append(int(model(torch.tensor([ids[start:]]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("prompt", [PROMPT, random_ids(50).tolist(), random_ids(100, seed=4).tolist()], ids=len)
def test_greedy_steps_far_past_the_context_are_those_of_the_whole_windows(prompt: list[int]) -> None:
    ids = generate(MODEL, prompt, max_new_tokens=80, temperature=0)
    assert ids == _greedy_reference(MODEL, prompt, 80, half=18)
    assert len(set(ids)) > 3


def test_windows_move_by_whole_strides() -> None:
    # Half the context of 36 is no multiple of a stride of 4: windows move by 16.
    coarse = LevelConfig(width=8, stride=4, encoder=StackConfig(layers=1, hidden=8))
    fine = LevelConfig(width=8, encoder=coarse.encoder, decoder=coarse.encoder)
    model = randomised_model(ModelConfig(vocab_size=VOCABULARY, context_length=CONTEXT, levels=(fine, coarse)))
    ids = generate(model, PROMPT, max_new_tokens=90, temperature=0)
    assert ids == _greedy_reference(model, PROMPT, 90, half=16)


def test_a_context_of_a_single_stride_still_moves() -> None:
    level = CONFIGS["two levels, coarse attention"].levels
    model = randomised_model(ModelConfig(vocab_size=VOCABULARY, context_length=2, levels=level))
    assert generate(model, PROMPT, max_new_tokens=9, temperature=0) == _greedy_reference(model, PROMPT, 9, half=1)


def test_samples_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = generate(MODEL, PROMPT, max_new_tokens=30, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert generate(MODEL, PROMPT, max_new_tokens=30, seed=1) == first
    assert generate(MODEL, PROMPT, max_new_tokens=30, seed=2) != first


def test_samples_have_the_probabilities_of_the_model() -> None:
    probabilities = (MODEL(torch.tensor([PROMPT]))[0, -1] / 4.0).softmax(0)
    warm = SamplingOptions(temperature=4.0)
    draws = [ids[0] for ids in generate_batch(MODEL, [PROMPT] * 600, max_new_tokens=1, options=warm)]
    frequencies = np.bincount(draws, minlength=VOCABULARY) / len(draws)
    spread = (probabilities * (1 - probabilities) / len(draws)).sqrt().detach().numpy()
    assert (np.abs(frequencies - probabilities.detach().numpy()) < 4.5 * spread + 1e-3).all()


def test_top_k_keeps_the_likeliest_ids() -> None:
    likeliest = MODEL(torch.tensor([PROMPT]))[0, -1].topk(3).indices.tolist()
    draws = [generate(MODEL, PROMPT, max_new_tokens=1, temperature=20.0, top_k=3, seed=seed)[0] for seed in range(60)]
    assert set(draws) == set(likeliest)
    greedy = generate(MODEL, PROMPT, max_new_tokens=20, temperature=0)
    assert generate(MODEL, PROMPT, max_new_tokens=20, top_k=1, seed=9) == greedy
    assert len(generate(MODEL, PROMPT, max_new_tokens=5, top_k=10 * VOCABULARY)) == 5


def test_the_stop_id_is_the_last_one() -> None:
    free = generate(MODEL, PROMPT, max_new_tokens=40, seed=5)
    stop = free[10]
    assert generate(MODEL, PROMPT, max_new_tokens=40, seed=5, stop_id=stop) == free[: free.index(stop) + 1]
    assert generate(MODEL, [stop], max_new_tokens=0) == []


def test_dropout_is_off_and_the_mode_restored() -> None:
    model = randomised_model(replace(CONFIG, dropout=0.5, embedding_dropout=0.5)).train()
    expected = generate(MODEL, PROMPT, max_new_tokens=9, temperature=0)
    assert generate(model, PROMPT, max_new_tokens=9, temperature=0) == expected
    assert all(module.training for module in model.modules())
    pieces = stream(model, PROMPT, max_new_tokens=9, options=GREEDY)
    assert [next(pieces), next(pieces)] == expected[:2]
    assert not model.training
    del pieces
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_model_that_has_generated_can_be_trained_on(config: ModelConfig) -> None:
    model = randomised_model(config)
    generate(model, PROMPT, max_new_tokens=CONTEXT)
    model.token_losses(random_ids(2, CONTEXT), random_ids(2, CONTEXT)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "at least one id"),
        ([0, VOCABULARY], {}, r"in \[0, 30\), got 0 to 30"),
        ([-1], {}, "got -1 to -1"),
        ([0], {"temperature": -0.1}, "temperature"),
        ([0], {"top_k": -1}, "top_k"),
        ([0], {"max_new_tokens": 2.5}, "max_new_tokens must be a whole number of at least 0, got 2.5"),
        ([0], {"max_new_tokens": -1}, "max_new_tokens must be a whole number of at least 0, got -1"),
        ([0], {"stop_id": VOCABULARY}, r"stop_id must be in \[0, 30\), got 30"),
        ([0], {"start_id": -1}, r"start_id must be in \[0, 30\), got -1"),
    ],
)
def test_impossible_requests_are_refused(prompt: list[int], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(MODEL, prompt, **{"max_new_tokens": 1, **options})


def test_a_stream_refuses_at_the_call() -> None:
    with pytest.raises(ValueError, match="at least one id"):
        stream(MODEL, [], max_new_tokens=1)


def test_the_start_id_stands_before_the_prompt_and_an_empty_prompt_begins_with_the_stop_id() -> None:
    expected = generate(MODEL, [7, *PROMPT], max_new_tokens=20)
    assert generate(MODEL, PROMPT, max_new_tokens=20, start_id=7) == expected
    assert generate(MODEL, PROMPT, max_new_tokens=20, start_id=7, stop_id=VOCABULARY - 1) == expected
    alone = generate(MODEL, [7], max_new_tokens=20)
    assert generate(MODEL, [], max_new_tokens=20, start_id=7) == alone
    assert generate(MODEL, [], max_new_tokens=20, stop_id=7) == alone[: alone.index(7) + 1 if 7 in alone else 20]


def test_ids_are_streamed_as_they_are_made() -> None:
    ids = stream(MODEL, PROMPT, max_new_tokens=10**9, options=SamplingOptions(seed=4))
    assert list(islice(ids, 60)) == generate(MODEL, PROMPT, max_new_tokens=60, seed=4)


RAGGED = [random_ids(length, seed=length).tolist() for length in (9, 1, 100, CONTEXT, 3, CONTEXT + 1, 40, 9)]


@pytest.mark.parametrize(
    "options",
    [GREEDY, SamplingOptions(seed=3), SamplingOptions(temperature=2.0, top_k=9, repetition_penalty=1.3, seed=3)],
)
@pytest.mark.parametrize("new_tokens", [12, 60])
def test_a_prompt_in_a_ragged_batch_is_continued_as_alone(options: SamplingOptions, new_tokens: int) -> None:
    stop = generate(MODEL, RAGGED[0], max_new_tokens=30, temperature=0)[2]
    expected = []
    for i, prompt in enumerate(RAGGED):
        alone = {**asdict(options), "seed": options.seed + i}
        expected.append(generate(MODEL, prompt, max_new_tokens=new_tokens, stop_id=stop, **alone))
    assert generate_batch(MODEL, RAGGED, max_new_tokens=new_tokens, options=options, stop_id=stop) == expected
    assert len({len(ids) for ids in expected}) > 1


def test_an_empty_batch_has_no_continuations() -> None:
    assert generate_batch(MODEL, [], max_new_tokens=5) == []
    assert generate_batch(MODEL, RAGGED, max_new_tokens=0) == [[] for _ in RAGGED]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_of_ragged_growing_and_reordered_sequences_are_those_of_whole_windows(config: ModelConfig) -> None:
    model = randomised_model(config)
    step = window_step(config)
    random = Random(1)
    sequences = [random_ids(length, seed=length).tolist() for length in (5, 14, 2, 20, 75)]
    reader = WindowReader(model)
    for _ in range(70):
        logits = reader.read(sequences)
        end = min(map(len, sequences))
        assert reader.length == end
        start = 0
        while end - start > CONTEXT:
            start += step
        whole = model(torch.tensor([ids[start:end] for ids in sequences]))[:, -1]
        assert (logits - whole).abs().max() < 1e-10
        for ids in sequences:
            if len(ids) == end:
                ids += [random.randrange(VOCABULARY) for _ in range(random.choice([1, 1, 1, 2, 5]))]
        if random.random() < 0.3:
            rows = [random.randrange(len(sequences)) for _ in range(random.randint(2, 6))]
            sequences = [list(sequences[row]) for row in rows]
            reader.reorder(rows)
    assert end > 2 * CONTEXT


class _Counting(nn.Module):
    """Predicts the id after the last one it has read; writes down how many sequences and tokens it is given."""

    class State:
        def reorder(self, rows_B: Tensor) -> None:
            pass

    def __init__(self) -> None:
        super().__init__()
        self.config = ModelConfig(
            vocab_size=VOCABULARY,
            context_length=64,
            levels=(LevelConfig(width=1, encoder=StackConfig(layers=0, hidden=1)),),
        )
        self.anywhere = nn.Parameter(torch.zeros(1))
        self.calls: list[tuple[int, int]] = []

    def prefill(self, ids_BT: Tensor) -> tuple[Tensor, State]:
        self.calls.append((len(ids_BT), ids_BT.shape[1]))
        return torch.eye(VOCABULARY)[(ids_BT[:, -1] + 1) % VOCABULARY], self.State()

    def step(self, ids_B: Tensor, state: State) -> Tensor:
        self.calls.append((len(ids_B), 1))
        return torch.eye(VOCABULARY)[(ids_B + 1) % VOCABULARY]

    def forward(self, ids_BT: Tensor) -> Tensor:
        raise NotImplementedError

    def token_losses(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        raise NotImplementedError


def test_sequences_that_have_ended_cost_nothing_and_long_rests_of_prompts_are_read_at_once() -> None:
    model = _Counting()
    prompts = [[17], [11], [15] * 50]
    new = generate_batch(model, prompts, max_new_tokens=4, options=GREEDY, stop_id=20)
    assert new == [[18, 19, 20], [12, 13, 14, 15], [16, 17, 18, 19]]
    assert model.calls == [(3, 1), (3, 1), (3, 1), (2, 1), (1, 50), (1, 1), (1, 1), (1, 1)]


def test_a_callback_ends_a_continuation_with_the_id_it_is_given() -> None:
    asked: list[tuple[int, int]] = []

    def until(row: int, token: int) -> bool:
        asked.append((row, token))
        return token == 13

    made = list(stream_batch(_Counting(), [[10], [1], [18]], max_new_tokens=5, options=GREEDY, stop_id=20, until=until))
    assert [token for row, token in made if row == 0] == [11, 12, 13]
    assert [token for row, token in made if row == 1] == [2, 3, 4, 5, 6]
    assert [token for row, token in made if row == 2] == [19, 20]
    assert asked == [pair for pair in made if pair[1] != 20]
