"""Continuing texts: tokens become text as they are made, and strings in the text end it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tokenizers import Tokenizer

from deconv_model.causal_model import CausalModel, StateT
from deconv_model.config import require
from deconv_model.generation import stream_batch
from deconv_model.sampling import DEFAULT_OPTIONS, SamplingOptions

_BROKEN = "\ufffd"  # what a tokenizer makes of bytes that are no character, or not yet one


class TextStream:
    """Turns ids into text piece by piece, up to the first stop string.

    The pieces together are the decoded ids. A piece never ends inside a character, whose bytes may belong to several
    tokens, nor with text that may turn out to be the beginning of a stop string; such text comes with a later piece.
    (A decoder with byte fallback makes a whole run of bytes unreadable if one of them is wrong; here, what was readable
    before that one stays.)

    Args:
        tokenizer: Decodes; of bytes or not.
        stop_strings: End the text before the one that is complete first in it, wherever tokens begin and end; of those
            that are complete at once, before the longest.

    Attributes:
        stopped: Whether a stop string has come.

    Raises:
        ValueError: A stop string is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: str | Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stops = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
        require("" not in self._stops, f"stop_strings must not hold an empty string, got {list(self._stops)}")
        # Only the last ids are decoded, from a border between characters on. The ids up to the border after that one
        # are there because some tokenizers decode the first id of all in another way.
        self._ids: list[int] = []
        self._border = 0
        self._decoded = 0  # characters of the ids' text that have been taken
        self._held = ""

    def push(self, token: int) -> str:
        """Take the next id; return the text that has become certain."""
        if self.stopped:
            return ""
        self._ids.append(token)
        text = self._decode()
        certain = text.rstrip(_BROKEN)
        piece = certain[self._decoded :]
        self._decoded += len(piece)
        if piece and certain == text:
            self._ids = self._ids[self._border :]
            self._border = len(self._ids)
            self._decoded = len(self._decode())
        return self._release(piece)

    def finish(self) -> str:
        """Return what was held back: nothing follows."""
        if self.stopped:
            return ""
        piece = self._decode()[self._decoded :]
        self._ids, self._border, self._decoded = [], 0, 0
        released = self._release(piece)
        released, self._held = released + self._held, ""
        return released

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=False)
        return text

    def _release(self, piece: str) -> str:
        """Return the held text and the piece, up to a stop string or to what may be the beginning of one."""
        text = self._held + piece
        matches = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            self.stopped = True
            self._held = ""
            return text[: min(matches)[1]]
        longest = max((_overlap(text, stop) for stop in self._stops), default=0)
        certain = len(text) - longest
        self._held = text[certain:]
        return text[:certain]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest beginning of ``stop`` that is an end of ``text``, which does not hold it."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def stream_text(
    model: CausalModel[StateT],
    tokenizer: Tokenizer,
    prompt: str,
    *,
    end_id: int,
    max_new_tokens: int,
    options: SamplingOptions = DEFAULT_OPTIONS,
    stop_strings: str | Sequence[str] = (),
) -> Iterator[str]:
    """Sample a continuation of a text and yield it in pieces as it is made (see :class:`TextStream`).

    Args:
        model: In evaluation mode from the first piece on until the iterator ends or is closed.
        tokenizer: Text in the prompt that spells a special token is text to it from now on.
        prompt: What to continue; may be empty.
        end_id: The id that ends a document: it stands before the prompt, and ends the continuation.
        max_new_tokens: Tokens at most.
        options: How they are drawn.
        stop_strings: End the continuation, and are not part of it. They are looked for in the continuation only.

    Raises:
        ValueError: An argument is out of range; at the call.
    """
    pieces = _stream_texts(model, tokenizer, [prompt], end_id, max_new_tokens, options, stop_strings)
    return (piece for _, piece in pieces)


def generate_texts(
    model: CausalModel[StateT],
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    end_id: int,
    max_new_tokens: int,
    options: SamplingOptions = DEFAULT_OPTIONS,
    stop_strings: str | Sequence[str] = (),
) -> list[str]:
    """Sample a continuation of each text, all in one batch; arguments as in :func:`stream_text`.

    Continuation i is, but for rounding, that of :func:`stream_text` with ``options.seed + i``.

    Returns:
        The continuations, without the prompts.

    Raises:
        ValueError: An argument is out of range.
    """
    texts = [""] * len(prompts)
    for row, piece in _stream_texts(model, tokenizer, prompts, end_id, max_new_tokens, options, stop_strings):
        texts[row] += piece
    return texts


def _stream_texts(
    model: CausalModel[StateT],
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    end_id: int,
    max_new_tokens: int,
    options: SamplingOptions,
    stop_strings: str | Sequence[str],
) -> Iterator[tuple[int, str]]:
    """Return an iterator over numbers of prompts and pieces of their continuations; arguments are checked at once."""
    texts = [TextStream(tokenizer, stop_strings) for _ in prompts]
    new: dict[int, str] = {}

    def until(row: int, token: int) -> bool:
        new[row] = texts[row].push(token)
        return texts[row].stopped

    tokenizer.encode_special_tokens = True
    encodings = tokenizer.encode_batch(list(prompts), add_special_tokens=False)
    made = stream_batch(
        model,
        [encoding.ids for encoding in encodings],
        max_new_tokens=max_new_tokens,
        options=options,
        stop_id=end_id,
        start_id=end_id,
        until=until,
    )

    def pieces() -> Iterator[tuple[int, str]]:
        for row, _ in made:
            if piece := new.pop(row, ""):
                yield row, piece
        for row, text in enumerate(texts):
            if rest := text.finish():
                yield row, rest

    return pieces()
