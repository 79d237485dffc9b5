import math

import numpy as np
import pytest
import torch
from torch import Tensor

from deconv_model.sampling import Sampler, SamplingOptions, kept_candidates, penalise_repetition

torch.set_num_threads(1)

CPU = torch.device("cpu")
VOCABULARY = 1000


def _logits(rows: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return logits from flat to peaked."""
    noise = torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return noise * torch.tensor([0.1, 1.0, 3.0, 9.0], dtype=dtype)[:rows, None]


def _reference(logits: np.ndarray, options: SamplingOptions) -> dict[int, float]:
    """Filter one distribution id by id; return the probabilities of the ids that are left."""
    order = np.argsort(-logits, kind="stable").tolist()
    left = {i: math.exp((logits[i] - logits[order[0]]) / options.temperature) for i in order}
    if options.top_k:
        left = {i: left[i] for i in order[: options.top_k]}
    total, mass = sum(left.values()), 0.0
    for i in list(left):
        if options.top_p < 1.0 and mass / total >= options.top_p:
            del left[i]
        else:
            mass += left[i]
    left = {i: p for i, p in left.items() if p >= options.min_p * left[order[0]]}
    return {i: p / sum(left.values()) for i, p in left.items()}


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(top_k=1),
        SamplingOptions(top_k=7, temperature=2.0),
        SamplingOptions(top_k=VOCABULARY + 1),
        SamplingOptions(top_p=0.9),
        SamplingOptions(top_p=0.3, temperature=0.5),
        SamplingOptions(top_p=1e-9),
        SamplingOptions(min_p=0.1),
        SamplingOptions(min_p=1.0, temperature=3.0),
        SamplingOptions(top_k=300, top_p=0.8),
        SamplingOptions(top_p=0.8, min_p=0.05, temperature=1.5),
        SamplingOptions(top_k=50, top_p=0.7, min_p=0.02, temperature=0.7),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_filters_keep_what_their_definitions_say(options: SamplingOptions, dtype: torch.dtype) -> None:
    logits = _logits(dtype=dtype)
    probabilities, candidates = kept_candidates(logits, options)
    assert (probabilities.diff(dim=-1) <= 0).all()
    for row in range(len(logits)):
        kept = probabilities[row] > 0
        expected = _reference(logits[row].double().numpy(), options)
        assert candidates[row][kept].tolist() == list(expected)
        relative = probabilities[row][kept] / probabilities[row].sum()
        np.testing.assert_allclose(relative, list(expected.values()), rtol=1e-9)


def test_the_repetition_penalty_makes_seen_ids_less_likely_whatever_their_sign() -> None:
    logits = torch.tensor([[3.0, -3.0, 0.0, 3.0, -3.0]])
    seen = torch.tensor([[True, True, True, False, False]])
    assert penalise_repetition(logits, seen, 1.5).tolist() == [[2.0, -4.5, 0.0, 3.0, -3.0]]


def test_ids_of_the_prompt_and_drawn_ids_are_penalised_each_in_its_own_sequence() -> None:
    sampler = Sampler(SamplingOptions(temperature=0, repetition_penalty=10.0), [[0], [1, 1]], 4, CPU)
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert sampler.sample(logits.repeat(2, 1), [0, 1]) == [1, 0]
    assert sampler.sample(logits, [1]) == [2]
    assert sampler.sample(logits.repeat(2, 1), [0, 1]) == [2, 3]
    assert logits.tolist() == [[4.0, 3.0, 2.0, 1.0]]


def test_the_penalty_comes_before_the_filters() -> None:
    sampler = Sampler(SamplingOptions(top_k=1, repetition_penalty=10.0), [[0]], 3, CPU)
    assert sampler.sample(torch.tensor([[4.0, 3.0, 2.0]]), [0]) == [1]


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(temperature=0.7, seed=5),
        SamplingOptions(top_k=40, seed=5),
        SamplingOptions(top_k=VOCABULARY, seed=5),
    ],
    ids=str,
)
def test_draws_are_those_of_multinomial(options: SamplingOptions) -> None:
    # What a seed gives must not change from one release to the next.
    sampler = Sampler(options, [[0]], VOCABULARY, CPU)
    generator = torch.Generator().manual_seed(5)
    for _ in range(5):
        for logits in _logits():
            values, ids = logits, torch.arange(VOCABULARY)
            if options.top_k == 40:
                values, ids = logits.topk(40)
            probabilities = (values / options.temperature).softmax(0)
            expected = int(ids[torch.multinomial(probabilities, 1, generator=generator)])
            assert sampler.sample(logits[None], [0]) == [expected]


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(seed=8),
        SamplingOptions(top_k=20, seed=8),
        SamplingOptions(top_p=0.9, seed=8),
        SamplingOptions(min_p=0.01, seed=8),
        SamplingOptions(top_k=300, top_p=0.5, min_p=0.1, seed=8),
    ],
    ids=str,
)
def test_what_a_sequence_draws_does_not_depend_on_the_others(options: SamplingOptions) -> None:
    logits = _logits()  # the flat rows need more candidates than the short list has, the others do not
    together = Sampler(options, [[0]] * 4, VOCABULARY, CPU)
    draws = [together.sample(logits, [0, 1, 2, 3]) for _ in range(20)]
    for row in range(4):
        alone = Sampler(SamplingOptions(**{**vars(options), "seed": 8 + row}), [[0]], VOCABULARY, CPU)
        assert [alone.sample(logits[row : row + 1], [0])[0] for _ in range(20)] == [each[row] for each in draws]
    assert len({tuple(column) for column in zip(*draws, strict=True)}) == 4


def test_draws_have_the_probabilities_that_are_left() -> None:
    options = SamplingOptions(temperature=1.5, top_p=0.6, min_p=0.2)
    logits = torch.tensor([1.0, 2.0, -1.0, 2.5, 0.0], dtype=torch.float64)
    draws = Sampler(options, [[0]] * 4000, 5, CPU).sample(logits.repeat(4000, 1), range(4000))
    expected = _reference(logits.numpy(), options)
    assert set(draws) == set(expected) == {1, 3}
    for i, probability in expected.items():
        assert abs(draws.count(i) / 4000 - probability) < 4.5 * math.sqrt(probability * (1 - probability) / 4000)


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_coldest_draw_is_the_likeliest_id(filters: dict, dtype: torch.dtype) -> None:
    logits = _logits(dtype=dtype)
    options = SamplingOptions(temperature=5e-324, **filters)
    assert Sampler(options, [[0]] * 4, VOCABULARY, CPU).sample(logits, range(4)) == logits.argmax(dim=-1).tolist()
    if filters:
        assert (kept_candidates(logits, options)[0][:, 0] == 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, "temperature must be at least 0 and finite, got -0.5"),
        ({"temperature": math.inf}, "temperature must be at least 0 and finite, got inf"),
        ({"temperature": math.nan}, "temperature must be at least 0 and finite, got nan"),
        ({"top_k": 2.5}, "top_k must be a whole number of at least 0, got 2.5"),
        ({"seed": 1.5}, "seed must be a whole number in"),
        ({"top_k": -1}, "top_k must be a whole number of at least 0, got -1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\], got -0.1"),
        ({"min_p": 1.1}, r"min_p must be in \[0, 1\], got 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0 and finite, got 0.0"),
        ({"seed": -1}, "seed must be a whole number in"),
        ({"seed": 2**63}, "seed must be a whole number in"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**options)
