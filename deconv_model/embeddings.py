"""Word vectors that others have trained, as the start of a model's embedding.

    vectors = read_vectors(Path("glove.6B.300d.txt"), wanted_words(tokenizer))
    coverage = initialise_embedding(model, tokenizer, vectors)
    print(coverage)
    trainer = Trainer(model, ...)
    freeze_rows(model, coverage.rows_R)  # or not, and training tunes them

Frozen rows are held by a hook on the gradient, which belongs to the parameter object and is written to no file. Weights
that are copied into the model (``load_state_dict``, also that of :class:`~deconv_model.training.Trainer`) or moved to a
device leave it in place; a copy of the model, a loaded one and a new one have none, and sharding (``parallel: fsdp``)
replaces the parameter by one without. So on every start, and in every worker, call :func:`freeze_rows` again with the
same rows, after the Trainer was made and before the first step. To go on from a checkpoint, initialise before its
weights are loaded, or not at all if the rows were kept. An optimizer that has already moved a row keeps moving it from
its momentum, and weight decay moves any row (:func:`~deconv_model.optim.build_optimizers` gives embeddings none). With
a tied softmax a frozen row is frozen there too. A saved model is an ordinary one.

Shape suffixes: N words of the file that are kept, U of them used, D numbers of a vector, V token ids, C channels,
G channels that vectors fill, R rows.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deconv_model.config import require
from deconv_model.sharding import sharded_like

Format = Literal["auto", "word2vec", "word2vec-binary", "glove"]

# Bounds on what is held at once, whatever the file holds.
_LONGEST_LINE = 2**21
_LONGEST_WORD = 2**12
_LARGEST_SIZE = 2**16
_CHUNK = 2**18

_HEADER = re.compile(rb"\s*(\d{1,18})\s+(\d{1,9})\s*")
_NUMBER = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")

_RANDOM_PART = 0.1  # of the squared norm of rows that would be equal
_LISTED = 20


class EmbeddingModel(Protocol):
    """A model with a row [C] for each token id."""

    embedding: nn.Parameter


@dataclass(frozen=True, eq=False)
class WordVectors:
    """Vectors by word.

    Attributes:
        rows: The row of each word.
        vectors_ND: One row a word, float32 and finite.
    """

    rows: dict[str, int]
    vectors_ND: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Coverage:
    """Which tokens got a word vector; ``str`` of it is a report.

    Attributes:
        rows_R: Their ids, int64 in ascending order.
        tokens: Tokens of the tokenizer.
        lower_case: How many of ``rows_R`` got the vector of their word in lower case, for want of its own.
        variance: Part of the vectors' variance that the channels of the embedding hold.
        running_share: Part of the running tokens that are covered; ``None`` if their counts were not given.
        uncovered: The most frequent tokens without a vector and their counts, most frequent first.
    """

    rows_R: Tensor
    tokens: int
    lower_case: int
    variance: float
    running_share: float | None = None
    uncovered: tuple[tuple[str, int], ...] = ()

    @property
    def share(self) -> float:
        """Part of the tokenizer's tokens that are covered."""
        return len(self.rows_R) / self.tokens

    def __str__(self) -> str:
        lines = [
            f"word vectors cover {len(self.rows_R):,} of {self.tokens:,} tokens ({self.share:.1%}), "
            f"{self.lower_case:,} of them in lower case; {self.variance:.1%} of the variance is kept"
        ]
        if self.running_share is not None:
            lines.append(f"they cover {self.running_share:.1%} of the running tokens")
        if self.uncovered:
            most = ", ".join(f"{token!r} ({count:,})" for token, count in self.uncovered)
            lines.append(f"most frequent without a vector: {most}")
        return "\n".join(lines)


def read_vectors(
    path: Path, wanted: Callable[[str], bool] | Container[str] | None = None, *, format: Format = "auto"
) -> WordVectors:
    """Read the wanted words of a file of word vectors; of a word that comes twice, the first.

    The formats are those of word2vec (Mikolov et al. 2013), as text, which fastText writes too, or binary: a line
    "count size", then a word, a space and little-endian float32, with or without a newline after them; and that of
    GloVe (Pennington et al. 2014): text without a first line, in which a word may hold spaces. The text is UTF-8; bytes
    that are not become U+FFFD. Each may be compressed by gzip.

    The file passes through in pieces, so memory is that of the wanted words alone. All rows are counted and measured,
    but only numbers of wanted words are looked at.

    Args:
        path: The file.
        wanted: Words to keep, such as :func:`wanted_words`, or a function that says which; ``None`` keeps all.
        format: ``auto`` decides by the first line and what follows it.

    Raises:
        ValueError: The file cannot be read, is empty, cut off or of no such format, its rows differ in length or are
            not as many as it says, or a number is none or not finite. The message names the file and line or word.
    """
    require(format in get_args(Format), f"format must be one of {', '.join(get_args(Format))}, got {format!r}")
    try:
        with path.open("rb") as plain:
            compressed = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            file = io.BufferedReader(gzip.GzipFile(fileobj=plain), _CHUNK) if compressed else plain
            layout = _find_layout(path, file, format)
            return _collect(path, file, layout, wanted if wanted is None or callable(wanted) else wanted.__contains__)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file: {error}") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error


def wanted_words(tokenizer: Tokenizer) -> set[str]:
    """Return the words that :func:`initialise_embedding` looks up for a tokenizer: as spelled and in lower case."""
    words = set(_token_words(tokenizer).values())
    return words | {word.lower() for word in words}


@torch.no_grad()
def initialise_embedding(
    model: EmbeddingModel,
    tokenizer: Tokenizer,
    vectors: WordVectors,
    *,
    counts_V: NDArray[np.integer] | None = None,
) -> Coverage:
    """Give each token that spells a word, with or without a space around it, the vector of that word.

    A word without a vector of its own, or with one of zeros, gets that of its lower case. Special tokens spell no word.
    Tokens that get no vector keep their row.

    The mean of the used vectors is taken off: what all words share would only set them apart from the tokens without a
    vector (Mu and Viswanath 2018, arXiv:1702.01417). Vectors of more numbers than channels are projected on their first
    principal components (Raunak et al. 2019, arXiv:1708.03629). Shorter ones fill the first channels, and the others
    keep their random numbers. What is filled gets the root mean square of the embedding: lengths of word vectors say
    how they were trained, and a new model should be close to a uniform guess.

    Several tokens may spell one word ("The", "the", " the"), but a tied softmax could not tell equal rows apart, nor
    could training if they are frozen. So where tokens share a vector, a tenth of the squared norm of each is left to
    its random direction.

    Args:
        model: A new one; the covered rows of its ``embedding`` [V, C] are overwritten. An untied softmax is left alone.
        tokenizer: Whose ids the rows are.
        vectors: Read with :func:`wanted_words` of the tokenizer, or all words.
        counts_V: How often each id comes in the training text, to weight the report.

    Raises:
        ValueError: The tokenizer has ids that the embedding or ``counts_V`` lacks, or there are not two different
            vectors of its words.
    """
    embedding_VC = model.embedding
    vocabulary = tokenizer.get_vocab()
    last = max(vocabulary.values())
    require(last < len(embedding_VC), f"embedding has {len(embedding_VC)} rows, the tokenizer ids up to {last}")
    if counts_V is not None:
        one_each = counts_V.ndim == 1 and last < len(counts_V)
        require(one_each, f"counts_V must have a number for each of {last + 1} ids, got shape {counts_V.shape}")

    has_direction_N = np.linalg.norm(vectors.vectors_ND, axis=1) > 0.0
    found: dict[int, int] = {}
    lower_case = 0
    for token, word in sorted(_token_words(tokenizer).items()):
        for spelling in (word, word.lower()):
            row = vectors.rows.get(spelling)
            if row is not None and has_direction_N[row]:
                found[token] = row
                lower_case += spelling != word
                break
    used_U, word_R, tokens_U = np.unique(
        np.array(list(found.values()), dtype=np.int64), return_inverse=True, return_counts=True
    )
    vectors_UG, variance = _fit_channels(vectors.vectors_ND[used_U], embedding_VC.shape[1])

    rows_R = torch.tensor(list(found))
    filled = vectors_UG.shape[1]
    given_RG = F.normalize(torch.from_numpy(vectors_UG[word_R]))
    random_RG = F.normalize(embedding_VC[rows_R, :filled].cpu().double())
    random_part_R1 = torch.from_numpy(np.where(tokens_U > 1, _RANDOM_PART, 0.0)[word_R, None])
    mixed_RG = F.normalize((1.0 - random_part_R1).sqrt() * given_RG + random_part_R1.sqrt() * random_RG)
    scale = float(embedding_VC.float().square().mean().sqrt())
    embedding_VC[rows_R, :filled] = (mixed_RG * (scale * filled**0.5)).to(embedding_VC)

    coverage = Coverage(rows_R, len(vocabulary), lower_case, variance)
    return coverage if counts_V is None else _weighted(coverage, vocabulary, counts_V)


def freeze_rows(model: EmbeddingModel, rows_R: Tensor) -> RemovableHandle:
    """Let the gradient of some rows be zero from now on, so that an optimizer that has not moved them yet never will.

    The norm of the gradient, which is clipped, is then that of the other rows and parameters. See the module's
    description for what the hook outlives and what not.

    Args:
        model: The one that a Trainer has, with several workers in each of them. Until it is sharded, it makes no
            difference whether the Trainer is there yet.
        rows_R: Ids whose rows of ``embedding`` to freeze, int64, such as ``Coverage.rows_R``.

    Returns:
        The hook; its ``remove()`` thaws the rows.

    Raises:
        ValueError: A row does not exist.
    """
    rows = len(model.embedding)
    require(
        rows_R.numel() == 0 or 0 <= int(rows_R.min()) <= int(rows_R.max()) < rows,
        f"rows_R must be from 0 to {rows - 1}, the rows of the embedding",
    )
    if hasattr(model.embedding, "full_tensor"):
        return _freeze_sharded(model.embedding, rows_R)
    frozen_R = rows_R.clone()

    def without_frozen(gradient_VC: Tensor) -> Tensor:
        nonlocal frozen_R
        frozen_R = frozen_R.to(gradient_VC.device)  # copies once: the model may have moved since
        return gradient_VC.index_fill(0, frozen_R, 0.0)

    # Before the gradient is added up, and so before DistributedDataParallel may send it.
    return model.embedding.register_hook(without_frozen)


def _freeze_sharded(embedding_VC: nn.Parameter, rows_R: Tensor) -> RemovableHandle:
    """Freeze rows of a DTensor of ``fully_shard``, which sets gradients itself and calls only hooks of this kind."""
    trained_V1 = torch.ones(len(embedding_VC), 1)
    trained_V1[rows_R] = 0.0
    shard = sharded_like(embedding_VC, trained_V1)

    def without_frozen(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.mul_(shard)

    return embedding_VC.register_post_accumulate_grad_hook(without_frozen)


class _Layout(NamedTuple):
    binary: bool
    size: int  # numbers of a vector
    words: int | None  # of the whole file, if it says so

    def place(self, path: Path, number: int) -> str:
        """Name a record in a message."""
        return f"{path}: word {number}" if self.binary else f"{path}:{number}"


# Number of the line or word, the word, and its numbers as the file writes them.
_Record = tuple[int, bytes, bytes]


def _find_layout(path: Path, file: BinaryIO, format: Format) -> _Layout:
    """Tell the format and leave the file at its first record."""
    first = file.readline(_LONGEST_LINE)
    require(bool(first), f"{path}: is empty")
    header = _HEADER.fullmatch(first)
    if format == "glove" or (format == "auto" and header is None):
        file.seek(0)
        return _Layout(False, _count_numbers(path, first.split()), None)
    if header is None:
        raise ValueError(f"{path}:1: must be 'count size' in format {format}")
    count, size = int(header[1]), int(header[2])
    require(
        count >= 1 and 1 <= size <= _LARGEST_SIZE, f"{path}:1: no vector file has {count} vectors of {size} numbers"
    )
    binary = format == "word2vec-binary"
    if format == "auto":
        binary = not _is_text(file.read(4 * size + _LONGEST_WORD))
        file.seek(len(first))
    return _Layout(binary, size, count)


def _count_numbers(path: Path, fields: list[bytes]) -> int:
    """Return how many numbers follow the word, which may hold spaces, in the first line of a file without header."""
    last = len(fields) - 1
    while last > 0 and _NUMBER.fullmatch(fields[last]):
        last -= 1
    numbers = len(fields) - 1 - last
    # A number further ahead makes a damaged number of what is between them, not a part of the word.
    if not 2 <= numbers <= _LARGEST_SIZE or any(map(_NUMBER.fullmatch, fields[1:last])):
        wrong = f"; {_show(fields[last])} is no number" if last > 0 else ""
        raise ValueError(
            f"{path}:1: not a vector file (plain or gzip; unpack a .zip first): "
            f"neither 'count size' nor a word and its numbers{wrong}"
        )
    return numbers


def _is_text(sample: bytes) -> bool:
    """Tell text from float32, whose bytes are soon no UTF-8, unless the numbers are so round that they hold zeros."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample)  # which may end within a character
    except UnicodeDecodeError:
        return False
    return b"\0" not in sample


def _collect(path: Path, file: BinaryIO, layout: _Layout, is_wanted: Callable[[str], bool] | None) -> WordVectors:
    rows: dict[str, int] = {}
    vectors: list[NDArray[np.float32]] = []
    for number, raw, numbers in (_binary_records if layout.binary else _text_records)(path, file, layout):
        word = raw.decode(errors="replace")
        if (is_wanted is not None and not is_wanted(word)) or word in rows:
            continue
        if layout.binary:
            vector = np.frombuffer(numbers, dtype="<f4").astype(np.float32)
        else:
            vector = _parse(path, number, numbers, layout)
        if not np.isfinite(vector).all():
            raise ValueError(f"{layout.place(path, number)}: a number of {_show(raw)} is not finite in float32")
        rows[word] = len(vectors)
        vectors.append(vector)
    return WordVectors(rows, np.stack(vectors) if vectors else np.empty((0, layout.size), dtype=np.float32))


def _text_records(path: Path, file: BinaryIO, layout: _Layout) -> Iterator[_Record]:
    records = 0
    first_line = 1 if layout.words is None else 2
    for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), start=first_line):
        line = line.strip()
        if not line:
            continue
        records += 1
        if line.count(b" ") == layout.size:
            word, _, numbers = line.partition(b" ")
        else:
            word, numbers = _split(path, number, line, layout)
        yield number, word, numbers
    require(layout.words in (None, records), f"{path}: line 1 says {layout.words} words, but {records} lines follow it")


def _split(path: Path, number: int, line: bytes, layout: _Layout) -> tuple[bytes, bytes]:
    """Split a line that has other separators than single spaces, a word with spaces, or a wrong number of numbers."""
    fields = line.split()
    first = len(fields) - layout.size
    # Too many fields are too many numbers if the one before the numbers is a number too, unless it is the word.
    if first < 1 or (first > 1 and _NUMBER.fullmatch(fields[first - 1])):
        raise _ragged(path, number, len(fields) - 1, layout)
    return b" ".join(fields[:first]), b" ".join(fields[first:])


def _parse(path: Path, number: int, numbers: bytes, layout: _Layout) -> NDArray[np.float32]:
    fields = numbers.split()
    if len(fields) != layout.size:
        raise _ragged(path, number, len(fields), layout)
    try:
        with np.errstate(over="ignore"):  # what is too large for float32 is reported as not finite
            return np.array(fields, dtype=np.float32)
    except ValueError:
        wrong = next(field for field in fields if not _NUMBER.fullmatch(field))
        raise ValueError(f"{path}:{number}: {_show(wrong)} is no number") from None


def _show(field: bytes) -> str:
    return repr(field[:60].decode(errors="replace"))


def _ragged(path: Path, number: int, found: int, layout: _Layout) -> ValueError:
    source = "line 1 says" if layout.words is not None else "line 1 has"
    return ValueError(f"{path}:{number}: {found} numbers after the word, but {source} {layout.size}")


def _binary_records(path: Path, file: BinaryIO, layout: _Layout) -> Iterator[_Record]:
    assert layout.words is not None  # only files that say so are binary
    width = 4 * layout.size
    buffer, start = b"", 0
    for number in range(1, layout.words + 1):
        if len(buffer) - start <= _LONGEST_WORD + width:
            buffer, start = buffer[start:] + file.read(_CHUNK + width), 0
        if buffer[start : start + 1] == b"\n":
            start += 1
        space = buffer.find(b" ", start, start + _LONGEST_WORD)
        end = space + 1 + width
        if space < 0 and len(buffer) - start >= _LONGEST_WORD:
            raise ValueError(f"{layout.place(path, number)}: no end of the word in {_LONGEST_WORD} bytes: damaged")
        if space < 0 or end > len(buffer):
            raise ValueError(f"{path}: cut off in word {number} of the {layout.words} that line 1 says")
        yield number, buffer[start:space], buffer[space + 1 : end]
        start = end
    if (buffer[start:] + file.read(2)).strip():
        raise ValueError(f"{path}: goes on after the {layout.words} words of {layout.size} numbers that line 1 says")


def _token_words(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the word that each token spells, by id; special tokens and parts of a character spell none."""
    added = tokenizer.get_added_tokens_decoder()
    decoder = tokenizer.decoder
    prefix = getattr(tokenizer.model, "continuing_subword_prefix", None) or ""
    words: dict[int, str] = {}
    for token, index in tokenizer.get_vocab().items():
        if index in added:
            text = "" if added[index].special else added[index].content
        else:
            piece = token.removeprefix(prefix)
            text = piece.lstrip("▁") if decoder is None else decoder.decode([piece])
        word = text.strip()
        if word and "\ufffd" not in word:
            words[index] = word
    return words


def _fit_channels(vectors_UD: NDArray[np.float32], channels: int) -> tuple[NDArray[np.float64], float]:
    """Return the vectors without their mean, [U, min(D, channels)], and the part of their variance that this keeps."""
    different = len(vectors_UD) >= 2 and bool((vectors_UD != vectors_UD[0]).any())
    require(
        different, f"vectors: {len(vectors_UD)} of the tokenizer's words have one, but two different ones are needed"
    )
    centred_UD = vectors_UD - vectors_UD.mean(axis=0, dtype=np.float64)
    if centred_UD.shape[1] <= channels:
        return centred_UD, 1.0
    variances_D, directions_DD = np.linalg.eigh(centred_UD.T @ centred_UD)  # in ascending order
    kept_DC = directions_DD[:, : -channels - 1 : -1]
    # Which of the two opposite directions comes out depends on the library.
    largest_1C = np.take_along_axis(kept_DC, np.abs(kept_DC).argmax(axis=0)[None], axis=0)
    return centred_UD @ (kept_DC * np.sign(largest_1C)), float(variances_D[-channels:].sum() / variances_D.sum())


def _weighted(coverage: Coverage, vocabulary: dict[str, int], counts_V: NDArray[np.integer]) -> Coverage:
    covered = set(coverage.rows_R.tolist())
    counts = {token: int(counts_V[index]) for token, index in vocabulary.items() if index not in covered}
    missed = sorted(
        ((token, count) for token, count in counts.items() if count), key=lambda entry: (-entry[1], entry[0])
    )
    total = int(counts_V.sum())
    share = float(counts_V[coverage.rows_R.numpy()].sum() / total) if total else 0.0
    return replace(coverage, running_share=share, uncovered=tuple(missed[:_LISTED]))
