from dataclasses import replace

import numpy as np
import pytest
import torch

from deconv_model.config import ModelConfig
from deconv_model.language_model import LanguageModel
from deconv_model.scoring import score, score_documents
from tests.deconv_model.small_models import CONFIGS, CONTEXT, VOCABULARY, random_ids, randomised_model

torch.set_num_threads(1)

CONFIG = CONFIGS["three levels, attention everywhere"]
MODEL = randomised_model(CONFIG)


def _reference(model: LanguageModel, document: np.ndarray, start_id: int) -> np.ndarray:
    """Predict each token from the first window that holds it; each is moved by half a context."""
    ids = [start_id, *document.tolist()]
    context = model.config.context_length
    predictions: dict[int, np.ndarray] = {}  # of the positions of all windows so far
    for start in range(0, max(1, len(ids) - 1 - context // 2), context // 2):
        logits = model(torch.tensor([ids[start : start + context]]))[0].log_softmax(-1).detach().numpy()
        predictions = dict(enumerate(logits, start + 1)) | predictions
    return np.array([predictions[position][ids[position]] for position in range(1, len(ids))])


def test_scores_of_short_and_long_documents_are_those_of_single_predictions() -> None:
    lengths = [5, 0, 1, CONTEXT, CONTEXT + 1, 90, 7, CONTEXT - 1, 3 * CONTEXT, 54, 55, 0]
    documents = [random_ids(length, seed=i).numpy().astype(np.uint16) for i, length in enumerate(lengths)]
    expected = [_reference(MODEL, document, start_id=2) for document in documents]
    for batch_tokens in (1, 50, 200, 8192):
        finished: list[int] = []
        nats = score_documents(MODEL, documents, start_id=2, batch_tokens=batch_tokens, progress=finished.append)
        assert nats.dtype == np.float64
        np.testing.assert_allclose(nats, [-each.sum() for each in expected], rtol=0, atol=1e-9)
        assert sum(finished) == len(documents)
        assert min(finished) > 0
    finished.clear()
    scores = score(MODEL, documents, start_id=2, batch_tokens=200, progress=finished.append)
    assert [each.shape for each in scores] == [(length,) for length in lengths]
    assert all(each.dtype == np.float64 for each in scores)
    np.testing.assert_allclose(np.concatenate(scores), np.concatenate(expected), rtol=0, atol=1e-10)
    assert sum(finished) == len(documents)


def test_a_context_of_a_single_stride_still_moves() -> None:
    level = CONFIGS["two levels, coarse attention"].levels
    model = randomised_model(ModelConfig(vocab_size=VOCABULARY, context_length=2, levels=level))
    document = random_ids(11).numpy()
    (scores,) = score(model, [document], start_id=0)
    np.testing.assert_allclose(scores, _reference(model, document, start_id=0), rtol=0, atol=1e-10)


def test_dropout_is_off_and_the_mode_restored() -> None:
    model = randomised_model(replace(CONFIG, dropout=0.5, embedding_dropout=0.5)).train()
    document = random_ids(20).numpy()
    assert score_documents(model, [document], start_id=0) == score_documents(MODEL, [document], start_id=0)
    assert all(module.training for module in model.modules())


def test_no_documents_have_no_scores() -> None:
    nats = score_documents(MODEL, [], start_id=0)
    assert nats.shape == (0,)
    assert nats.dtype == np.float64
    assert score(MODEL, [], start_id=0) == []


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([[0], [3, 30]], {}, r"documents must hold ids in \[0, 30\), got 3 to 30 in documents\[1\]"),
        ([[-1, 2]], {}, r"got -1 to 2 in documents\[0\]"),
        ([[0]], {"start_id": 30}, r"start_id must be in \[0, 30\), got 30"),
        ([[0]], {"batch_tokens": 0}, "batch_tokens must be at least 1, got 0"),
    ],
)
def test_impossible_requests_are_refused(documents: list[list[int]], options: dict, message: str) -> None:
    arrays = [np.array(document) for document in documents]
    for function in (score, score_documents):
        with pytest.raises(ValueError, match=message):
            function(MODEL, arrays, **{"start_id": 0, **options})


def test_plain_lists_are_documents_and_fractions_are_not() -> None:
    np.testing.assert_array_equal(
        score_documents(MODEL, [[1, 2, 3], []], start_id=2),
        score_documents(MODEL, [np.array([1, 2, 3]), np.array([], dtype=np.uint16)], start_id=2),
    )
    with pytest.raises(ValueError, match=r"documents must hold whole numbers, got float64 in documents\[1\]"):
        score(MODEL, [np.array([1]), np.array([0.5])], start_id=2)
