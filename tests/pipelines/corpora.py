"""Corpora for tests: Parquet shards, whole and damaged, and the steps that read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import PipelineConfig, load_config
from pipelines.documents import shard_uri
from pipelines.steps import StepSpec, plan
from pipelines.steps.corpus import scan_shard
from pipelines.store import OutputFolder, StepOutput, Storage

RULE = {"text_column": "text", "valid_fraction": 0.2, "test_fraction": 0.2}
_WORDS = ("the", "model", "reads", "naïve", "text\n", "of", "試験", "bytes,", "and", "returns", "🙂", "1,024", "\t")


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Return different documents of random words."""
    random = np.random.default_rng(seed)
    return [f"{seed}/{i} " + " ".join(random.choice(_WORDS, size=random.integers(1, 40))) for i in range(count)]


def write_shard(
    file: Path, texts: Sequence[str | None], kind: Any = None, column: str = "text", **options: Any
) -> Path:
    """Write a shard with an id and a text column, and checksums in every page."""
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": range(len(texts)), column: pa.array(texts, kind or pa.string())})
    pq.write_table(table, file, **{"write_page_checksum": True, "compression": "zstd", **options})
    return file


def write_bytes_column(file: Path, values: Sequence[bytes]) -> Path:
    """Write a shard whose text column is text by its type, but not by its bytes."""
    raw = pa.array(values, pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    pq.write_table(pa.table({"text": text}), file)
    return file


def flip_a_bit(file: Path, position: int) -> None:
    """Change one byte of a file and nothing else."""
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def corpus_config(path: Path, *overrides: str) -> PipelineConfig:
    """Return a configuration for a corpus of a few documents."""
    small = ("corpus.valid_fraction=0.2", "corpus.test_fraction=0.2", "tokenizer.vocab_size=300")
    return load_config(overrides=[f"corpus.path={path}", *small, *overrides])


def specs_of(config: PipelineConfig) -> dict[str, StepSpec]:
    """Return the planned steps by name."""
    return {spec.step: spec for spec in plan(config)}


def finish_corpus(spec: StepSpec, storage: Storage) -> StepOutput:
    """Do the work of the corpus step for a folder of shards in this process."""
    output = storage.output(spec.address)
    names = sorted(str(file) for file in Path(spec.config["source"]["root"]).rglob("*.parquet"))
    shards = [scan_shard({"name": name, "uri": shard_uri(output, name), "rule": RULE}) for name in names]
    output.write_json("manifest.json", {"format": 1, **RULE, "shards": shards})
    output.finish({"shards": len(shards)}, 0.0)
    return StepOutput(output.uri)


def token_task(uri: Path, tokenizer: StepOutput, output: OutputFolder, checked: int = 64) -> dict[str, Any]:
    """Return the task that tokenizes one shard."""
    scanned = scan_shard({"name": str(uri), "uri": str(uri), "rule": RULE})
    return {
        "uri": str(uri),
        "sha256": scanned["sha256"],
        "rows": scanned["rows"],
        "rule": RULE,
        "label": "00000-of-00001",
        "tokenizer": tokenizer.uri,
        "checked": checked,
        "folder": output.to_task(),
    }
