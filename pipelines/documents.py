"""The documents of a corpus, shard by shard, and the split that each belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.errors import DataError
from pipelines.files import one_line, sha256_file, split_uri
from pipelines.sources import check_column, open_parquet
from pipelines.store import StepOutput

SPLITS = ("train", "valid", "test")
_ROWS_AT_ONCE = 1024


def split_of(text: str, valid_fraction: float, test_fraction: float) -> str:
    """Return the split of a document, by a hash of its text: it stays there whatever else the corpus holds."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    draw = int.from_bytes(digest, "big") / 2.0**64
    if draw < test_fraction:
        return "test"
    return "valid" if draw < test_fraction + valid_fraction else "train"


def shard_uri(corpus: StepOutput, name: str) -> str:
    """Return where a shard of a corpus' manifest is; one gathered by the corpus step lies in its own output."""
    return str(corpus.local(name)) if name.startswith("shards/") else name


def sha256_of(uri: str) -> str:
    """Return the SHA-256 of a file's bytes, wherever it is."""
    fs, path = split_uri(uri)
    if fs is None:
        return sha256_file(Path(path))
    digest = hashlib.sha256()
    with fs.open_input_stream(path) as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def read_texts(uri: str, column: str) -> Iterator[str | None]:
    """Yield the texts of a shard in the order of its rows, a few rows in memory at a time; ``None`` for a null.

    Raises:
        DataError: The shard is damaged, lacks the column, or holds text that is not UTF-8; the message names it.
    """
    import pyarrow

    row = 0
    try:
        with open_parquet(uri) as file:
            if fault := check_column(file.schema_arrow, column):
                raise DataError(f"{uri} {fault}")
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[column]):
                yield from batch.column(column).to_pylist()
                row += batch.num_rows
    except UnicodeDecodeError as error:
        raise DataError(f"{uri}: text that is not UTF-8 in rows {row} to {row + _ROWS_AT_ONCE}") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{uri}: cannot be read after row {row} ({one_line(error)})") from error


def check_unchanged(uri: str, sha256: str) -> None:
    """Refuse a shard that is not the one the corpus step read.

    Raises:
        DataError: It changed.
    """
    if sha256_of(uri) != sha256:
        raise DataError(f"{uri} changed since the corpus step read it: run again")


def documents_of(uri: str, manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield ``(split, text)`` of every document of a shard; nulls and empty texts are no documents."""
    for text in read_texts(uri, manifest["text_column"]):
        if text:
            yield split_of(text, manifest["valid_fraction"], manifest["test_fraction"]), text
