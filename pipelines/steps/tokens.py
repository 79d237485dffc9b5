"""Step 3: token shards, one Ray task a corpus shard, and a manifest that proves them.

gigatoken encodes; a sample of every shard is encoded by ``tokenizers`` too, and where the two differ the whole shard
is done by the reference, and the manifest says so. A task writes its files and then a note of its own, so that after a
kill only unfinished shards are done again. :mod:`deconv_model.data` describes the files.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from pipelines.cluster import map_shards
from pipelines.documents import SPLITS, check_unchanged, documents_of, shard_uri
from pipelines.files import sha256_file
from pipelines.progress import get_logger
from pipelines.steps.tokenizer import END_OF_DOCUMENT, end_of_document
from pipelines.store import OutputFolder, StepOutput, canonical_json

_DOCUMENTS_AT_ONCE = 512
_log = get_logger(__name__)

Encoder = Callable[[Sequence[str]], list[np.ndarray]]


def run(config: dict[str, Any], inputs: dict[str, StepOutput], output: OutputFolder) -> dict[str, Any]:
    """Write the token shards and ``tokens/manifest.json``.

    Raises:
        DataError: A shard changed since the corpus step, or cannot be read.
    """
    corpus, tokenizer = inputs["corpus"], inputs["tokenizer"]
    manifest = corpus.read_json("manifest.json")
    shards = manifest["shards"]
    rule = {key: manifest[key] for key in ("text_column", "valid_fraction", "test_fraction")}
    tasks = [
        {
            "uri": shard_uri(corpus, shard["name"]),
            "sha256": shard["sha256"],
            "rows": shard["rows"],
            "rule": rule,
            "label": f"{index:05d}-of-{len(shards):05d}",
            "tokenizer": tokenizer.uri,
            "checked": config["checked_documents"],
            "folder": output.to_task(),
        }
        for index, shard in enumerate(shards)
    ]
    map_shards("tokens", tokenize_shard, [task for task in tasks if not output.exists(_note(task))])
    notes = [output.read_json(_note(task)) for task in tasks]
    for note in notes:
        if note["engine"] != "gigatoken":
            _log.warning("[tokens] %s was encoded by the reference: %s", note["source"]["uri"], note["reason"])
    result = _write_manifest(notes, tokenizer, output)
    return {**result, "reference_shards": sum(note["engine"] != "gigatoken" for note in notes)}


def _note(task: dict[str, Any]) -> str:
    return f"notes/{task['label']}.json"


def tokenize_shard(task: dict[str, Any]) -> dict[str, Any]:
    """Encode one shard and write its files (a Ray task).

    Raises:
        DataError: The shard changed since the corpus step, or cannot be read.
    """
    check_unchanged(task["uri"], task["sha256"])
    output = OutputFolder(*task["folder"])
    file = StepOutput(task["tokenizer"]).local("tokenizer.json")
    reference = _reference(file)
    end = end_of_document(reference)
    documents = list(documents_of(task["uri"], task["rule"]))
    texts = [text for _, text in documents]
    encode, reason = _choose_encoder(file, texts[:: max(1, len(texts) // task["checked"])])
    dtype = token_dtype(reference.get_vocab_size())
    try:
        tokens, table = _encode_documents(documents, encode, end, dtype)
    except Exception as error:
        if reason:
            raise
        reason = f"gigatoken failed: {error}"
        encode = functools.partial(encode_reference, file)
        tokens, table = _encode_documents(documents, encode, end, dtype)
    splits = {}
    for split in SPLITS:
        name = f"{split}-{task['label']}"
        rows = np.array(table[split], dtype=np.int64).reshape(-1, 3)
        flat = np.concatenate(tokens[split]) if tokens[split] else np.zeros(0, dtype)
        splits[split] = {
            "name": name,
            "documents": len(rows),
            **dict(zip(("tokens", "bytes", "words"), rows.sum(axis=0).tolist(), strict=True)),
            "sha256": _save(output, f"tokens/{name}.npy", flat),
            "docs_sha256": _save(output, f"tokens/{name}.docs.npy", rows),
        }
    note = {
        "source": {"uri": task["uri"], "sha256": task["sha256"], "rows": task["rows"]},
        "engine": "tokenizers" if reason else "gigatoken",
        "reason": reason,
        "splits": splits,
    }
    output.write_json(_note(task), note)
    return {"label": task["label"]}


def _encode_documents(
    documents: list[tuple[str, str]], encode: Encoder, end: int, dtype: type[np.unsignedinteger[Any]]
) -> tuple[dict[str, list[np.ndarray]], dict[str, list[tuple[int, int, int]]]]:
    """Return the ids of each document with its end, and its row of the document table, by split."""
    tokens: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    table: dict[str, list[tuple[int, int, int]]] = {split: [] for split in SPLITS}
    for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        chunk = documents[start : start + _DOCUMENTS_AT_ONCE]
        for (split, text), ids in zip(chunk, encode([text for _, text in chunk]), strict=True):
            tokens[split].append(np.append(ids, end).astype(dtype))
            table[split].append((len(ids) + 1, len(text.encode()), count_words(text)))
    return tokens, table


def token_dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """Return the smallest type that holds every token id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def count_words(text: str) -> int:
    """Return the words of a document as word perplexity counts them: between white space, and each end of a line."""
    return len(text.split()) + text.count("\n") + 1


def _save(output: OutputFolder, name: str, array: np.ndarray) -> str:
    with output.write(name) as temporary:
        np.save(temporary, array)
        return sha256_file(temporary)


@functools.lru_cache(maxsize=1)
def _reference(file: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(file))
    # Text that spells a special token is text: it must not end a document.
    tokenizer.encode_special_tokens = True
    return tokenizer


@functools.lru_cache(maxsize=1)
def _special_tokens(file: Path) -> re.Pattern[str]:
    added = _reference(file).get_added_tokens_decoder().values()
    contents = {END_OF_DOCUMENT, *(token.content for token in added if token.special)}
    return re.compile("|".join(map(re.escape, sorted(contents))))


@functools.lru_cache(maxsize=1)
def _gigatoken(file: Path) -> Any:
    import gigatoken  # its objects do not pickle: made in the process that uses them

    return gigatoken.Tokenizer(file)


def encode_reference(file: Path, texts: Sequence[str]) -> list[np.ndarray]:
    """Encode texts with ``tokenizers``: one array of ids each."""
    batch = _reference(file).encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.uint32) for encoding in batch]


def encode_fast(file: Path, texts: Sequence[str]) -> list[np.ndarray]:
    """Encode texts with gigatoken, except those that spell a special token, which it would take for one."""
    special = _special_tokens(file)
    plain = [special.search(text) is None for text in texts]
    fast = iter(_gigatoken(file).encode_batch([t for t, p in zip(texts, plain, strict=True) if p], parallel=False))
    slow = iter(encode_reference(file, [t for t, p in zip(texts, plain, strict=True) if not p]))
    return [np.asarray(next(fast if p else slow), dtype=np.uint32) for p in plain]


def _choose_encoder(file: Path, sample: list[str]) -> tuple[Encoder, str]:
    """Return the encoder of a shard, and why it is the reference if it is."""
    try:
        expected, found = encode_reference(file, sample), encode_fast(file, sample)
    except Exception as error:  # whatever the young engine raises, the reference can do the work
        return functools.partial(encode_reference, file), f"gigatoken failed: {error}"
    for index, (right, got) in enumerate(zip(expected, found, strict=True)):
        if not np.array_equal(right, got):
            return functools.partial(encode_reference, file), f"gigatoken differs in sampled document {index}"
    return functools.partial(encode_fast, file), ""


def _write_manifest(notes: list[dict[str, Any]], tokenizer: StepOutput, output: OutputFolder) -> dict[str, Any]:
    splits: dict[str, Any] = {}
    for split in SPLITS:
        shards = [{**note["splits"][split], "source": note["source"], "engine": note["engine"]} for note in notes]
        splits[split] = {
            **{what: sum(shard[what] for shard in shards) for what in ("documents", "tokens", "bytes", "words")},
            "digest": hashlib.sha256("".join(s["sha256"] + s["docs_sha256"] for s in shards).encode()).hexdigest(),
            "shards": shards,
        }
    facts = tokenizer.result
    manifest = {
        "format": 1,
        "dtype": np.dtype(token_dtype(facts["vocab_size"])).name,
        "vocab_size": facts["vocab_size"],
        "end_of_document": end_of_document(_reference(tokenizer.local("tokenizer.json"))),
        "tokenizer_sha256": facts["sha256"],
        "splits": splits,
    }
    output.write_json("tokens/manifest.json", manifest)
    totals = {
        split: {what: splits[split][what] for what in ("documents", "tokens", "bytes", "words")} for split in SPLITS
    }
    # Of content alone: where the shards were read from is no part of what they are.
    content = [manifest["tokenizer_sha256"], manifest["dtype"], [splits[split]["digest"] for split in SPLITS]]
    digest = hashlib.sha256(canonical_json(content)).hexdigest()
    return {"splits": totals, "test_digest": splits["test"]["digest"], "digest": digest}
