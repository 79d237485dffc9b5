from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from deconv_model.beams import Hypothesis, beam_search, length_penalty
from deconv_model.config import ModelConfig
from deconv_model.generation import generate
from deconv_model.language_model import LanguageModel
from tests.deconv_model.small_models import CONFIGS, VOCABULARY, random_ids, randomised_model

torch.set_num_threads(1)

LENGTH = 4
FEW = 4  # ids of a vocabulary small enough to try all sequences
TINY = [
    randomised_model(ModelConfig(vocab_size=FEW, context_length=36, levels=CONFIGS[name].levels), seed=seed)
    for seed, name in enumerate(["two levels, coarse attention", "three levels, attention everywhere"])
]


def _all_hypotheses(model: nn.Module, prompt: list[int], alpha: float, stop_id: int | None) -> list[Hypothesis]:
    """Try every sequence; best first."""

    def grow(ids: list[int], log_probability: float) -> Iterator[Hypothesis]:
        if len(ids) == LENGTH or (ids and ids[-1] == stop_id):
            yield Hypothesis(ids, log_probability, log_probability / length_penalty(len(ids), alpha))
            return
        log_p = model(torch.tensor([[*prompt, *ids]]))[0, -1].log_softmax(0).tolist()
        for token in range(FEW):
            yield from grow([*ids, token], log_probability + log_p[token])

    return sorted(grow([], 0.0), key=lambda hypothesis: -hypothesis.score)


@torch.no_grad()
@pytest.mark.parametrize("model", TINY, ids=["two levels", "three levels"])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 3.0])
@pytest.mark.parametrize("stop_id", [None, 2])
def test_a_beam_with_room_for_everything_finds_the_best_sequences(
    model: LanguageModel, alpha: float, stop_id: int | None
) -> None:
    expected = _all_hypotheses(model, [1, 3], alpha, stop_id)
    for n_best in (1, 7, FEW**LENGTH):
        found = beam_search(
            model, [1, 3], max_new_tokens=LENGTH, beams=FEW**LENGTH, alpha=alpha, n_best=n_best, stop_id=stop_id
        )
        assert len(found) == min(n_best, len(expected))
        for one, other in zip(found, expected, strict=False):
            assert one.ids == other.ids
            assert one.log_probability == pytest.approx(other.log_probability, abs=1e-9)
            assert one.score == pytest.approx(other.score, abs=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 5.0])
def test_one_beam_is_greedy_also_past_the_context(alpha: float) -> None:
    model = randomised_model(CONFIGS["three levels, attention everywhere"])
    prompt = random_ids(20).tolist()
    free = generate(model, prompt, max_new_tokens=60, temperature=0)
    (found,) = beam_search(model, prompt, max_new_tokens=60, beams=1, alpha=alpha)
    assert found.ids == free
    stop = free[7]
    (found,) = beam_search(model, prompt, max_new_tokens=60, beams=1, alpha=alpha, stop_id=stop)
    assert found.ids == free[: free.index(stop) + 1]


def _beam_search_to_the_end(
    model: nn.Module, prompt: list[int], length: int, beams: int, alpha: float, stop_id: int
) -> list[Hypothesis]:
    """Search without a state and without stopping early."""
    live = [Hypothesis([], 0.0, 0.0)]
    ended: list[Hypothesis] = []
    for size in range(1, length + 1):
        steps = []
        for hypothesis in live:
            log_p = model(torch.tensor([[*prompt, *hypothesis.ids]]))[0, -1].log_softmax(0).tolist()
            for token, value in enumerate(log_p):
                total = hypothesis.log_probability + value
                steps.append(Hypothesis([*hypothesis.ids, token], total, total / length_penalty(size, alpha)))
        steps.sort(key=lambda hypothesis: -hypothesis.log_probability)
        best = steps[: beams - len(ended)]
        live = [hypothesis for hypothesis in best if hypothesis.ids[-1] != stop_id]
        ended += [hypothesis for hypothesis in best if hypothesis.ids[-1] == stop_id]
    return sorted(ended + live, key=lambda hypothesis: -hypothesis.score)


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_narrow_beams_find_what_a_search_to_the_end_without_a_state_finds(config: ModelConfig, alpha: float) -> None:
    model = randomised_model(config)
    prompt = random_ids(5, seed=2).tolist()
    stop = int(model(torch.tensor([prompt]))[0, -1].argsort()[-3])  # likely enough to end some hypotheses
    expected = _beam_search_to_the_end(model, prompt, 12, 4, alpha, stop)
    found = beam_search(model, prompt, max_new_tokens=12, beams=4, alpha=alpha, n_best=4, stop_id=stop)
    assert [hypothesis.ids for hypothesis in found] == [hypothesis.ids for hypothesis in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-9)


class _Fixed(nn.Module):
    """Gives the next id fixed probabilities, whatever came before; counts the positions it has read."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        size = len(probabilities)
        self.config = ModelConfig(vocab_size=size, context_length=64, levels=CONFIGS["one level, long taps"].levels)
        self.log_p = nn.Parameter(torch.tensor(probabilities, dtype=torch.float64).log())
        self.calls = 0

    def prefill(self, ids_BT: Tensor) -> tuple[Tensor, "_Fixed"]:
        return self.step(ids_BT[:, 0], self), self

    def step(self, ids_B: Tensor, state: "_Fixed") -> Tensor:
        self.calls += 1
        return self.log_p.expand(len(ids_B), -1)

    def reorder(self, rows_B: Tensor) -> None:
        pass

    def forward(self, ids_BT: Tensor) -> Tensor:
        raise NotImplementedError

    def token_losses(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        raise NotImplementedError


def test_the_search_is_over_when_and_only_when_nothing_can_get_better() -> None:
    # Ending at once scores ln 0.3 = -1.2; never ending 20 ln 0.7 = -7.1, at alpha 3 over a penalty of 72.
    model = _Fixed([0.7, 0.3])
    search = {"max_new_tokens": 20, "beams": 3, "stop_id": 1}
    (found,) = beam_search(model, [0], alpha=0.0, **search)
    assert found.ids == [1]
    assert model.calls == 4  # 0.7 ** 4 < 0.3 < 0.7 ** 3
    model.calls = 0
    (found,) = beam_search(model, [0], alpha=3.0, **search)
    assert found.ids == [0] * 20
    assert model.calls == 20


def test_a_hypothesis_that_is_behind_may_win_by_its_length() -> None:
    # After one id, ln 0.4 is ahead of ln 0.35; but ln(0.35 ** 2 * 0.4) = -3.0 is over a penalty of 17.8.
    (found,) = beam_search(_Fixed([0.35, 0.25, 0.4]), [0], max_new_tokens=20, beams=3, alpha=10.0, stop_id=2)
    assert found.ids == [0, 0, 2]


def test_the_best_come_first_and_no_room_means_no_ids() -> None:
    found = beam_search(TINY[0], [1], max_new_tokens=9, beams=6, n_best=6)
    assert [hypothesis.score for hypothesis in found] == sorted((h.score for h in found), reverse=True)
    assert len({tuple(hypothesis.ids) for hypothesis in found}) == 6
    assert [hypothesis.ids for hypothesis in beam_search(TINY[0], [1], max_new_tokens=0, beams=2)] == [[]]


def test_the_start_id_stands_before_the_prompt() -> None:
    expected = beam_search(TINY[0], [2, 1], max_new_tokens=5, beams=3)
    assert beam_search(TINY[0], [1], max_new_tokens=5, beams=3, start_id=2) == expected
    alone = beam_search(TINY[0], [2], max_new_tokens=5, beams=3)
    assert beam_search(TINY[0], [], max_new_tokens=5, beams=3, start_id=2) == alone


def test_the_mode_is_restored() -> None:
    model = randomised_model(CONFIGS["two levels, coarse attention"]).train()
    beam_search(model, [1], max_new_tokens=3, beams=2)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "beams must be at least 1, got 0"),
        ({"n_best": 3}, r"n_best must be in \[1, 2\], as there are 2 beams, got 3"),
        ({"n_best": 0}, "n_best must be in"),
        ({"alpha": -0.1}, r"alpha must be in \[0, 10\], got -0.1"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
        ({"prompt_ids": []}, "at least one id"),
        ({"prompt_ids": [VOCABULARY]}, r"in \[0, 4\)"),
    ],
)
def test_impossible_requests_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        beam_search(TINY[0], **{"prompt_ids": [0], "max_new_tokens": 1, "beams": 2, **options})
