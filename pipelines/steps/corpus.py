"""Step 1: the text, checked from end to end, with the split of every document counted.

The text is not copied: the output is ``manifest.json``, which names every shard with its SHA-256, rows, documents and
bytes. Without ``corpus.path`` the shards are gathered first and lie in the output (:mod:`pipelines.python_docs`).
"""

from __future__ import annotations

import hashlib
from typing import Any

from pipelines.cluster import map_shards
from pipelines.documents import SPLITS, read_texts, sha256_of, shard_uri, split_of
from pipelines.errors import DataError
from pipelines.sources import documented_packages, list_shards, stamp_of
from pipelines.store import OutputFolder, StepOutput


def run(config: dict[str, Any], inputs: dict[str, StepOutput], output: OutputFolder) -> dict[str, Any]:
    """Check the corpus and write its manifest.

    Raises:
        DataError: A shard cannot be read or changed since the plan was made, or a split would be empty.
    """
    if config["source"]["kind"] == "parquet":
        found = list_shards(config["source"]["root"])
        if stamp_of(found) != config["source"]["stamp"]:
            raise DataError(f"corpus.path {config['source']['root']} changed since the run was planned: run again")
        names = [shard.uri for shard in found]
        column = config["text_column"]
    else:
        from pipelines import python_docs

        if config["source"]["packages"] != documented_packages():
            raise DataError(
                "the installed packages are not those of the plan: run again, with the same ones everywhere"
            )
        names, column = python_docs.gather(config["source"]["packages"], config["max_bytes"], output), "text"
    rule = {"text_column": column, **{key: config[key] for key in ("valid_fraction", "test_fraction")}}
    tasks = [{"name": name, "uri": shard_uri(output, name), "rule": rule} for name in names]
    shards = map_shards("corpus", scan_shard, tasks)
    totals = {
        split: {what: sum(shard["splits"][split][what] for shard in shards) for what in ("documents", "bytes")}
        for split in SPLITS
    }
    _check_splits(totals, config)
    digest = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()
    output.write_json("manifest.json", {"format": 1, **rule, "digest": digest, "totals": totals, "shards": shards})
    return {
        "source": config["source"]["kind"],
        "shards": len(shards),
        "documents": sum(total["documents"] for total in totals.values()),
        "bytes": sum(total["bytes"] for total in totals.values()),
        "empty_documents": sum(shard["empty"] for shard in shards),
        "splits": totals,
        "digest": digest,
    }


def scan_shard(task: dict[str, Any]) -> dict[str, Any]:
    """Read one shard to its end and return its facts (a Ray task).

    Raises:
        DataError: It cannot be read.
    """
    splits = {split: {"documents": 0, "bytes": 0} for split in SPLITS}
    rows = empty = 0
    rule = task["rule"]
    for text in read_texts(task["uri"], rule["text_column"]):
        rows += 1
        if not text:
            empty += 1
            continue
        counts = splits[split_of(text, rule["valid_fraction"], rule["test_fraction"])]
        counts["documents"] += 1
        counts["bytes"] += len(text.encode())
    return {
        "name": task["name"],
        "sha256": sha256_of(task["uri"]),
        "rows": rows,
        "empty": empty,
        "splits": splits,
    }


def _check_splits(totals: dict[str, dict[str, int]], config: dict[str, Any]) -> None:
    documents = {split: totals[split]["documents"] for split in SPLITS}
    if not any(documents.values()):
        raise DataError("the corpus is empty: no row holds any text")
    for split in SPLITS:
        if documents[split] == 0:
            raise DataError(
                f"the corpus has {sum(documents.values())} documents, none of which falls into the {split} split: give "
                f"more documents, or change corpus.valid_fraction ({config['valid_fraction']}) or "
                f"corpus.test_fraction ({config['test_fraction']})"
            )
