"""Test documents: which ones are scored, and the file that says how well each of them was predicted.

The file, ``documents.parquet``, has a row a document and says in its metadata what was scored by what, so that two
models can be compared document by document long after both were measured, or not at all when it was not the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.progress import progress

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from deconv_model.data import TokenStream
    from deconv_model.language_model import LanguageModel

CONTEXT_POLICY = "sliding"
_METADATA_KEY = b"deconv"


@dataclass(frozen=True)
class TestDocuments:
    """Documents of the test split in the order of the stream.

    Attributes:
        index: int64 ``[n]``, position of each document in the split.
        ids: The token ids of each, its end token included.
        tokens: int64 ``[n]``, tokens of each, its end token included.
        bytes: int64 ``[n]``, UTF-8 bytes of the text of each.
        words: int64 ``[n]``, words of each, its end counted as one.
    """

    __test__ = False  # not a test, whatever its name suggests to a collector

    index: np.ndarray
    ids: list[np.ndarray]
    tokens: np.ndarray
    bytes: np.ndarray
    words: np.ndarray


@dataclass(frozen=True)
class ScoredBy:
    """What was scored by what: scores can be compared only where ``test_digest`` and ``context_policy`` agree.

    Attributes:
        weights_sha256: Digest of the model's weights.
        tokenizer_sha256: Digest of the tokenizer's file.
        test_digest: Digest of the token shards of the test split.
        context_policy: How much of a document a token's prediction may look at.
    """

    weights_sha256: str
    tokenizer_sha256: str
    test_digest: str
    context_policy: str = CONTEXT_POLICY


def select_documents(stream: TokenStream, max_documents: int | None) -> TestDocuments:
    """Read the documents that are scored: all, or ``max_documents`` of them spread evenly over the split.

    The choice depends on nothing but the two numbers, so that every model is measured on the same documents.
    """
    table = stream.document_table()
    count = len(table)
    chosen = count if max_documents is None else min(count, max_documents)
    index = np.arange(chosen, dtype=np.int64) * count // max(chosen, 1)
    starts = np.cumsum(table[:, 0]) - table[:, 0]
    ids = [stream.read(int(starts[i]), int(table[i, 0])) for i in index]
    return TestDocuments(index, ids, table[index, 0], table[index, 1], table[index, 2])


def decode_documents(tokenizer: Tokenizer, documents: Sequence[np.ndarray]) -> list[str]:
    """Return the text of documents that end with their end token."""
    return tokenizer.decode_batch([ids[:-1].tolist() for ids in documents], skip_special_tokens=False)


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str], end_of_document: int) -> list[np.ndarray]:
    """Return the token ids of texts, the end token behind each; text that spells a special token stays text."""
    tokenizer.encode_special_tokens = True
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [np.array([*encoding.ids, end_of_document], dtype=np.int64) for encoding in encodings]


def score(model: LanguageModel, documents: Sequence[np.ndarray], *, start_id: int, label: str) -> np.ndarray:
    """Score documents and show how far that is.

    Args:
        model: Its device computes.
        documents: Token ids, the end token included.
        start_id: The id of the end of a document, which stands before each.
        label: What the progress bar is called.

    Returns:
        Nats of each document, float64 ``[n]``.
    """
    from deconv_model.scoring import score_documents

    with progress(label, total=len(documents), unit="documents") as bar:
        return score_documents(model, documents, start_id=start_id, progress=bar.advance)


def write_scores(path: Path, documents: TestDocuments, nats: dict[str, np.ndarray], scored_by: ScoredBy) -> None:
    """Write what each document cost each model.

    Args:
        path: The file to write.
        documents: What was scored, ``n`` documents.
        nats: Float64 ``[n]`` each, by the model's name: ``model``, ``unigram``, ``uniform``.
        scored_by: What ``model`` is and what the documents are.
    """
    columns = {name: getattr(documents, name) for name in ("index", "tokens", "bytes", "words")}
    columns |= {f"{name}_nats": values for name, values in nats.items()}
    metadata = {_METADATA_KEY: json.dumps(vars(scored_by)).encode()}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, compression="zstd")


def read_scores(path: Path) -> tuple[pa.Table, ScoredBy]:
    """Read what :func:`write_scores` wrote.

    Raises:
        ValueError: The file was not written by it.
    """
    table = pq.read_table(path)
    try:
        return table, ScoredBy(**json.loads((table.schema.metadata or {})[_METADATA_KEY]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} does not say what was scored by what") from error
