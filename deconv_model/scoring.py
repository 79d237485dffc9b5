"""How likely a language model finds given documents: the log-probability of each token, or of each document.

Longer documents than the context are read through windows (:mod:`deconv_model.windows`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from deconv_model.causal_model import CausalModel, DecodingSizes, StateT, device_of, evaluation_mode
from deconv_model.config import require
from deconv_model.windows import window_step

FloatArray = NDArray[np.float64]


class _Window(NamedTuple):
    document: int
    start: int  # of the window in the document
    length: int
    first_scored: int  # position in the window from which on losses count


def score(
    model: CausalModel[StateT],
    documents: Sequence[ArrayLike],
    *,
    start_id: int,
    batch_tokens: int = 8192,
    progress: Callable[[int], None] | None = None,
) -> list[FloatArray]:
    """Return the natural log-probability of each token of each document, given those before it in the document.

    That of a continuation of a prompt is the sum over its own tokens, in the document of both.

    Args:
        model: As in :func:`score_documents`, like all arguments.
        documents: As there.
        start_id: As there.
        batch_tokens: As there.
        progress: As there.

    Returns:
        Float64 [tokens] for each document.

    Raises:
        ValueError: As :func:`score_documents`.
    """
    log_probabilities = [np.zeros(np.shape(document), dtype=np.float64) for document in documents]
    for window, losses in _scored_windows(model, documents, start_id, batch_tokens, progress):
        end = window.start + window.length
        log_probabilities[window.document][window.start + window.first_scored : end] = -losses
    return log_probabilities


def score_documents(
    model: CausalModel[StateT],
    documents: Sequence[ArrayLike],
    *,
    start_id: int,
    batch_tokens: int = 8192,
    progress: Callable[[int], None] | None = None,
) -> FloatArray:
    """Return the negative log-likelihood of each document in nats, float64 [documents].

    A document's context begins with ``start_id``; then each of its tokens is predicted, its own end included. A
    document longer than the context is read through sliding windows, and each token is scored once, in the first
    window that holds it: with at least half a context before it, where there is that much.

    Args:
        model: Used in evaluation mode; its mode is restored.
        documents: Token ids, 1-D each; may be empty.
        start_id: The id that ends a document, which stands before each.
        batch_tokens: Tokens in a batch, at most (but for one window). Changes the result by rounding only.
        progress: Called with the number of documents that were finished since the last call.

    Raises:
        ValueError: An id is not in the vocabulary, or ``batch_tokens`` is less than 1.
    """
    nats = np.zeros(len(documents), dtype=np.float64)
    for window, losses in _scored_windows(model, documents, start_id, batch_tokens, progress):
        nats[window.document] += losses.sum(dtype=np.float64)
    return nats


def _scored_windows(
    model: CausalModel[StateT],
    documents: Sequence[ArrayLike],
    start_id: int,
    batch_tokens: int,
    progress: Callable[[int], None] | None,
) -> Iterator[tuple[_Window, np.ndarray]]:
    """Yield each window with the losses of the tokens that it scores; it alone scores them."""
    arrays = [np.asarray(document) for document in documents]
    _check(arrays, start_id, batch_tokens, model.config.vocab_size)
    windows = [window for i, document in enumerate(arrays) for window in _windows(i, len(document), model.config)]
    windows.sort(key=lambda window: window.length)  # stable, so the order of batches is a function of the input
    open_windows = np.zeros(len(arrays), dtype=np.int64)
    np.add.at(open_windows, [window.document for window in windows], 1)
    _report(progress, int((open_windows == 0).sum()))
    with evaluation_mode(model):
        for batch in _batches(windows, batch_tokens):
            for window, losses in zip(batch, _window_losses(model, arrays, batch, start_id), strict=True):
                yield window, losses[window.first_scored : window.length]
            touched = np.array([window.document for window in batch])
            np.subtract.at(open_windows, touched, 1)
            _report(progress, int((open_windows[np.unique(touched)] == 0).sum()))


def _check(documents: Sequence[np.ndarray], start_id: int, batch_tokens: int, vocab_size: int) -> None:
    require(batch_tokens >= 1, f"batch_tokens must be at least 1, got {batch_tokens}")
    require(0 <= start_id < vocab_size, f"start_id must be in [0, {vocab_size}), got {start_id}")
    for i, document in enumerate(documents):
        require(
            document.dtype.kind in "iu" or not document.size,
            f"documents must hold whole numbers, got {document.dtype} in documents[{i}]",
        )
        least, most = (document.min(), document.max()) if len(document) else (0, 0)
        require(
            bool(0 <= least <= most < vocab_size),
            f"documents must hold ids in [0, {vocab_size}), got {least} to {most} in documents[{i}]",
        )


def _windows(document: int, length: int, config: DecodingSizes) -> Iterator[_Window]:
    scored = 0
    start = 0
    while scored < length:
        end = min(length, start + config.context_length)
        yield _Window(document, start, end - start, scored - start)
        scored = end
        start += window_step(config)


def _batches(windows: list[_Window], batch_tokens: int) -> Iterator[list[_Window]]:
    """Group windows that ascend in length: windows times the longest stay within the tokens of a batch."""
    batch: list[_Window] = []
    for window in windows:
        if batch and (len(batch) + 1) * window.length > batch_tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


@torch.no_grad()
def _window_losses(
    model: CausalModel[StateT], documents: Sequence[np.ndarray], batch: list[_Window], start_id: int
) -> np.ndarray:
    """Return the losses [windows, longest]; a window's row is padded at its end, which nothing before it can see."""
    ids = np.full((len(batch), batch[-1].length), start_id, dtype=np.int64)
    targets = ids.copy()
    for row, window in enumerate(batch):
        document = documents[window.document]
        piece = document[window.start : window.start + window.length]
        targets[row, : window.length] = piece
        ids[row, 1 : window.length] = piece[:-1]
        if window.start:
            ids[row, 0] = document[window.start - 1]
    device = device_of(model)
    losses = model.token_losses(torch.from_numpy(ids).to(device), torch.from_numpy(targets).to(device))
    return losses.cpu().numpy()


def _report(progress: Callable[[int], None] | None, finished: int) -> None:
    if progress is not None and finished:
        progress(finished)
