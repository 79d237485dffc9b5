"""WikiText-2 as token arrays for benchmarks: byte-level BPE of 4,096 ids trained on the train split, or bytes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

DATA = Path("../shared/data/wikitext-2")
CACHE = Path(".deconv/benchmarks")
END = "<|end|>"
BPE_IDS = 4096
BYTE_VALUES = 256

Kind = Literal["subwords", "bytes"]


@dataclass(frozen=True)
class Split:
    """Ids of all articles of a split, an end id after each, and the bytes of their text."""

    ids: NDArray[np.int64]
    size: int


@dataclass(frozen=True)
class WikiText:
    """The two splits that training and selection need; the test split is not touched."""

    kind: Kind
    vocab_size: int
    train: Split
    valid: Split


def load_wikitext(kind: Kind, data: Path = DATA) -> WikiText:
    """Read, tokenize and cache WikiText-2; ends the program with one line if it is not there."""
    texts = {split: _read(data, split) for split in ("train", "valid")}
    sizes = {split: sum(len(text.encode()) for text in articles) for split, articles in texts.items()}
    cache = CACHE / f"wikitext-2-{kind}-{sizes['train']}-{sizes['valid']}.npz"
    if not cache.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        encode = _encode_bytes if kind == "bytes" else _trained_bpe(texts["train"])
        temporary = cache.with_suffix(f".{os.getpid()}.npz")
        np.savez(temporary, train=encode(texts["train"]), valid=encode(texts["valid"]))
        os.replace(temporary, cache)
    with np.load(cache) as arrays:
        splits = {split: Split(arrays[split].astype(np.int64), sizes[split]) for split in texts}
    return WikiText(kind, BYTE_VALUES + 1 if kind == "bytes" else BPE_IDS, **splits)


def _read(data: Path, split: str) -> list[str]:
    files = sorted((data / split).glob("*.parquet"))
    if not files:
        sys.exit(f"{data / split} holds no Parquet files: give the folder of WikiText-2 with --data")
    return [text for file in files for text in pq.read_table(file, columns=["text"])["text"].to_pylist()]


def _encode_bytes(texts: list[str]) -> NDArray[np.uint16]:
    pieces = [np.append(np.frombuffer(text.encode(), dtype=np.uint8), BYTE_VALUES) for text in texts]
    return np.concatenate(pieces).astype(np.uint16)


def _trained_bpe(texts: list[str]) -> Callable[[list[str]], NDArray[np.uint16]]:
    """Train the tokenizer, leave its file in the cache, and return its encoder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_IDS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(CACHE / "bpe.json"))
    end = tokenizer.token_to_id(END)

    def encode(articles: list[str]) -> NDArray[np.uint16]:
        return np.array([i for e in tokenizer.encode_batch(articles) for i in (*e.ids, end)], dtype=np.uint16)

    return encode


def write_json(file: Path | None, content: object) -> None:
    """Write what was measured so far, in one move, if a file is wanted."""
    if file is not None:
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, file)
