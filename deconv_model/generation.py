"""Sampling continuations of prompts from a language model: one or a batch, at once or token by token.

Longer sequences than the context are read through windows (:mod:`deconv_model.windows`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import index

from deconv_model.causal_model import CausalModel, StateT, device_of, evaluation_mode
from deconv_model.config import require
from deconv_model.sampling import DEFAULT_OPTIONS, Sampler, SamplingOptions
from deconv_model.windows import WindowReader


def generate(
    model: CausalModel[StateT],
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop_id: int | None = None,
    start_id: int | None = None,
) -> list[int]:
    """Sample a continuation of a prompt.

    Args:
        model: Used in evaluation mode; its mode is restored.
        prompt_ids: What to continue. A prompt longer than the context is read through its last window only.
        max_new_tokens: New ids at most.
        temperature: See :class:`~deconv_model.sampling.SamplingOptions`, as for the options up to ``seed``.
        top_k: As there.
        top_p: As there.
        min_p: As there.
        repetition_penalty: As there.
        seed: The same seed, model, prompt and options give the same ids. The global generator is left alone.
        stop_id: Ends the continuation; it is returned as the last id.
        start_id: Stands before the prompt, as the end of a document does before the next one. Without it, an empty
            prompt begins with ``stop_id``.

    Returns:
        The new ids only.

    Raises:
        ValueError: The prompt holds an unknown id, or none and there is nothing to begin with, or an option is out of
            range.
    """
    options = SamplingOptions(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    return list(
        stream(model, prompt_ids, max_new_tokens=max_new_tokens, options=options, stop_id=stop_id, start_id=start_id)
    )


def generate_batch(
    model: CausalModel[StateT],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    options: SamplingOptions = DEFAULT_OPTIONS,
    stop_id: int | None = None,
    start_id: int | None = None,
) -> list[list[int]]:
    """Sample a continuation of each prompt; the prompts may differ in length.

    Continuation i is, but for rounding, that of :func:`generate` with prompt i and ``options.seed + i``.

    Returns:
        The new ids of each prompt.

    Raises:
        ValueError: As :func:`generate`.
    """
    new: list[list[int]] = [[] for _ in prompts]
    for row, token in stream_batch(
        model, prompts, max_new_tokens=max_new_tokens, options=options, stop_id=stop_id, start_id=start_id
    ):
        new[row].append(token)
    return new


def stream(
    model: CausalModel[StateT],
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    options: SamplingOptions = DEFAULT_OPTIONS,
    stop_id: int | None = None,
    start_id: int | None = None,
) -> Iterator[int]:
    """Sample a continuation of a prompt and yield each id as soon as it is made.

    The model is in evaluation mode from the first id on until the iterator ends or is closed.

    Raises:
        ValueError: As :func:`generate`, and at the call.
    """
    made = stream_batch(
        model, [prompt_ids], max_new_tokens=max_new_tokens, options=options, stop_id=stop_id, start_id=start_id
    )
    return (token for _, token in made)


def stream_batch(
    model: CausalModel[StateT],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    options: SamplingOptions = DEFAULT_OPTIONS,
    stop_id: int | None = None,
    start_id: int | None = None,
    until: Callable[[int, int], bool] | None = None,
) -> Iterator[tuple[int, int]]:
    """Sample a continuation of each prompt and yield the number of the prompt and the new id as soon as it is made.

    All sequences are read up to the same position. Those whose prompt ends there go on with the id that was drawn for
    them, the others with their prompt. Those that have ended leave the batch.

    Args:
        model: In evaluation mode from the first id on until the iterator ends or is closed.
        prompts: What to continue; may differ in length.
        max_new_tokens: New ids of each prompt at most.
        options: How ids are drawn; prompt i draws with ``options.seed + i``.
        stop_id: As in :func:`generate`.
        start_id: As in :func:`generate`.
        until: Called with what is about to be yielded, but not with ``stop_id``; True ends that continuation.

    Raises:
        ValueError: As :func:`generate`, and at the call.
    """
    require(
        isinstance(max_new_tokens, int) and max_new_tokens >= 0,
        f"max_new_tokens must be a whole number of at least 0, got {max_new_tokens}",
    )
    vocab_size = model.config.vocab_size
    sequences = [complete_prompt(prompt, vocab_size, stop_id=stop_id, start_id=start_id) for prompt in prompts]
    sampler = Sampler(options, sequences, vocab_size, device_of(model))
    return _continue(model, sequences, max_new_tokens, sampler, stop_id, until)


def complete_prompt(
    prompt_ids: Sequence[int], vocab_size: int, *, stop_id: int | None, start_id: int | None
) -> list[int]:
    """Return the ids that a model reads before the first new one: those of the prompt, after the one it begins with.

    Raises:
        ValueError: There are none, or one is not in the vocabulary.
    """
    for name, token in (("stop_id", stop_id), ("start_id", start_id)):
        require(token is None or 0 <= token < vocab_size, f"{name} must be in [0, {vocab_size}), got {token}")
    ids = [index(token) for token in prompt_ids]
    require(
        not ids or (min(ids) >= 0 and max(ids) < vocab_size),
        f"prompt_ids must be in [0, {vocab_size}), got {min(ids, default=0)} to {max(ids, default=0)}",
    )
    first = stop_id if start_id is None and not ids else start_id
    if first is not None:
        ids.insert(0, first)
    require(bool(ids), "prompt_ids must hold at least one id where neither start_id nor stop_id is given")
    return ids


def _continue(
    model: CausalModel[StateT],
    sequences: list[list[int]],
    max_new_tokens: int,
    sampler: Sampler,
    stop_id: int | None,
    until: Callable[[int, int], bool] | None,
) -> Iterator[tuple[int, int]]:
    ends = [len(ids) + max_new_tokens for ids in sequences]
    going = list(range(len(sequences))) if max_new_tokens else []
    reader = WindowReader(model)
    with evaluation_mode(model):
        while going:
            logits_BV = reader.read([sequences[row] for row in going])
            places = [i for i, row in enumerate(going) if len(sequences[row]) == reader.length]
            rows = [going[i] for i in places]
            tokens = sampler.sample(logits_BV if len(rows) == len(going) else logits_BV[places], rows)
            ended = set()
            for row, token in zip(rows, tokens, strict=True):
                sequences[row].append(token)
                if token == stop_id or (until is not None and until(row, token)) or len(sequences[row]) == ends[row]:
                    ended.add(row)
            if ended:
                kept = [i for i, row in enumerate(going) if row not in ended]
                going = [going[i] for i in kept]
                reader.reorder(kept)
            yield from zip(rows, tokens, strict=True)
