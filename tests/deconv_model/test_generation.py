from dataclasses import replace

import numpy as np
import pytest
import torch

from deconv_model.config import LevelConfig, ModelConfig, StackConfig
from deconv_model.generation import generate, score_documents
from deconv_model.language_model import LanguageModel
from tests.deconv_model.small_models import CONFIGS, CONTEXT, VOCABULARY, random_ids, randomised_model

torch.set_num_threads(1)

MODEL = randomised_model(CONFIGS["three levels, attention everywhere"])
PROMPT = [3, 1, 4]


def _greedy_reference(model: LanguageModel, prompt: list[int], new_tokens: int, half: int) -> list[int]:
    """Read the whole window again for each token."""
    ids = list(prompt)
    start = 0
    for _ in range(new_tokens):
        while len(ids) - start > CONTEXT:
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
    assert len(generate(model, PROMPT, max_new_tokens=9)) == 9
    document = random_ids(11).numpy()
    score = score_documents(model, [document], start_id=0)
    assert score[0] == pytest.approx(_reference_score(model, document, start_id=0), abs=1e-9)


def test_samples_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = generate(MODEL, PROMPT, max_new_tokens=30, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert generate(MODEL, PROMPT, max_new_tokens=30, seed=1) == first
    assert generate(MODEL, PROMPT, max_new_tokens=30, seed=2) != first


def test_samples_have_the_probabilities_of_the_model() -> None:
    probabilities = (MODEL(torch.tensor([PROMPT]))[0, -1] / 4.0).softmax(0)
    draws = [generate(MODEL, PROMPT, max_new_tokens=1, temperature=4.0, seed=seed)[0] for seed in range(600)]
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
    model = randomised_model(replace(MODEL.config, dropout=0.5, embedding_dropout=0.5)).train()
    document = random_ids(20).numpy()
    assert generate(model, PROMPT, max_new_tokens=9, temperature=0) == generate(
        MODEL, PROMPT, max_new_tokens=9, temperature=0
    )
    assert score_documents(model, [document], start_id=0) == score_documents(MODEL, [document], start_id=0)
    assert model.training
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "at least one id"),
        ([0, VOCABULARY], {}, r"in \[0, 30\), got 0 to 30"),
        ([-1], {}, "got -1 to -1"),
        ([0], {"temperature": -0.1}, "temperature"),
        ([0], {"top_k": -1}, "top_k"),
        ([0], {"max_new_tokens": -1}, "max_new_tokens"),
    ],
)
def test_impossible_requests_are_refused(prompt: list[int], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(MODEL, prompt, **{"max_new_tokens": 1, **options})


def _reference_score(model: LanguageModel, document: np.ndarray, start_id: int) -> float:
    """Predict each token from its own window: the first one, moved by half a context each time, that holds it."""
    ids = [start_id, *document.tolist()]
    context = model.config.context_length
    nats = 0.0
    for position in range(1, len(ids)):
        start = 0
        while position - start > context:
            start += context // 2
        log_p = model(torch.tensor([ids[start:position]]))[0, -1].log_softmax(0)
        nats -= float(log_p[ids[position]].detach())
    return nats


def test_scores_of_short_and_long_documents_are_those_of_single_predictions() -> None:
    lengths = [5, 0, 1, CONTEXT, CONTEXT + 1, 90, 7, CONTEXT - 1, 3 * CONTEXT, 54, 55, 0]
    documents = [random_ids(length, seed=i).numpy().astype(np.uint16) for i, length in enumerate(lengths)]
    expected = [_reference_score(MODEL, document, start_id=2) for document in documents]
    for batch_tokens in (1, 50, 200, 8192):
        finished: list[int] = []
        scores = score_documents(MODEL, documents, start_id=2, batch_tokens=batch_tokens, progress=finished.append)
        assert scores.dtype == np.float64
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-9)
        assert sum(finished) == len(documents)
        assert min(finished) > 0


def test_no_documents_have_no_scores() -> None:
    scores = score_documents(MODEL, [], start_id=0)
    assert scores.shape == (0,)
    assert scores.dtype == np.float64
