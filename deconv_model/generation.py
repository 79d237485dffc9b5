"""Sampling from a language model and scoring documents with it.

Both read a sequence that is longer than the context through the same windows: each is ``context_length`` long and
begins about half of that after the one before, at a multiple of all strides, so that a token keeps its phase.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deconv_model.blocks import DecodingState
from deconv_model.config import ModelConfig
from deconv_model.language_model import LanguageModel


def window_step(config: ModelConfig) -> int:
    """Return how many tokens after a window the next one begins: at most half the context, whole strides if it can."""
    half = config.context_length // 2
    return half // config.total_stride * config.total_stride or half


def window_start(length: int, config: ModelConfig) -> int:
    """Return where the window that reads the last of ``length`` tokens begins."""
    excess = length - config.context_length
    step = window_step(config)
    return 0 if excess <= 0 else -(-excess // step) * step


def generate(
    model: LanguageModel,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    stop_id: int | None = None,
) -> list[int]:
    """Sample a continuation of a prompt.

    A step costs the same at any position, but for attention (see :meth:`LanguageModel.step`). When the context is
    full, the next window begins: its first half, the last half context, is read again at once. So the model sees
    between a half and a whole context, whatever the length.

    Args:
        model: Used in evaluation mode; its mode is restored.
        prompt_ids: At least one id. A prompt longer than the context is read through its last window only.
        max_new_tokens: New ids at most.
        temperature: Divides the logits; 0 takes the most likely id, the smallest of equals.
        top_k: Samples among this many most likely ids; 0 means all.
        seed: The same seed, model, prompt and options give the same ids. The global generator is left alone.
        stop_id: Ends the continuation; it is returned as the last id.

    Returns:
        The new ids only.

    Raises:
        ValueError: The prompt is empty or holds an unknown id, or an option cannot work.
    """
    vocab_size = model.config.vocab_size
    if not prompt_ids:
        raise ValueError("prompt_ids must hold at least one id")
    if not all(0 <= token < vocab_size for token in prompt_ids):
        raise ValueError(f"prompt_ids must be in [0, {vocab_size}), got {min(prompt_ids)} to {max(prompt_ids)}")
    if max_new_tokens < 0 or temperature < 0 or top_k < 0:
        raise ValueError(
            f"max_new_tokens, temperature and top_k must be at least 0, got {max_new_tokens}, {temperature} and {top_k}"
        )
    device = model.embedding.device
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt_ids)
    end = len(ids) + max_new_tokens
    was_training = model.training
    model.eval()
    try:
        state: DecodingState | None = None
        while len(ids) < end:
            start = window_start(len(ids), model.config)
            if state is None or start != window_start(len(ids) - 1, model.config):
                logits_BV, state = model.prefill(torch.tensor([ids[start:]], device=device))
            else:
                logits_BV = model.step(torch.tensor(ids[-1:], device=device), state)
            ids.append(_sample(logits_BV[0].cpu(), temperature, top_k, generator))
            if ids[-1] == stop_id:
                break
    finally:
        model.train(was_training)
    return ids[len(prompt_ids) :]


def _sample(logits_V: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V.double() / temperature
    if 0 < top_k < len(logits_V):
        kept = logits_V.topk(top_k)
        return int(kept.indices[torch.multinomial(kept.values.softmax(0), 1, generator=generator)])
    return int(torch.multinomial(logits_V.softmax(0), 1, generator=generator))


class _Window(NamedTuple):
    document: int
    start: int  # of the window in the document
    length: int
    first_scored: int  # position in the window from which on losses count


def score_documents(
    model: LanguageModel,
    documents: Sequence[np.ndarray],
    *,
    start_id: int,
    batch_tokens: int = 8192,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
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
    """
    windows = [window for i, document in enumerate(documents) for window in _windows(i, len(document), model.config)]
    windows.sort(key=lambda window: window.length)  # stable, so the order of batches is a function of the input
    open_windows = np.zeros(len(documents), dtype=np.int64)
    np.add.at(open_windows, [window.document for window in windows], 1)
    nats = np.zeros(len(documents), dtype=np.float64)
    _report(progress, int((open_windows == 0).sum()))
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(windows, batch_tokens):
            for window, losses in zip(batch, _window_losses(model, documents, batch, start_id), strict=True):
                nats[window.document] += losses[window.first_scored : window.length].sum(dtype=np.float64)
            touched = np.array([window.document for window in batch])
            np.subtract.at(open_windows, touched, 1)
            _report(progress, int((open_windows[np.unique(touched)] == 0).sum()))
    finally:
        model.train(was_training)
    return nats


def _windows(document: int, length: int, config: ModelConfig) -> Iterator[_Window]:
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
    model: LanguageModel, documents: Sequence[np.ndarray], batch: list[_Window], start_id: int
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
    device = model.embedding.device
    losses = model.token_losses(torch.from_numpy(ids).to(device), torch.from_numpy(targets).to(device))
    return losses.cpu().numpy()


def _report(progress: Callable[[int], None] | None, finished: int) -> None:
    if progress is not None and finished:
        progress(finished)
