"""The corpus, tokenizer and tokens steps as they are run, with their tasks in the workers of a real local Ray."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from pipelines.cluster import map_shards
from pipelines.config import CorpusSection
from pipelines.documents import SPLITS, sha256_of, split_of
from pipelines.errors import ConfigError, DataError, InfraError
from pipelines.runners import run_step
from pipelines.sources import describe_source
from pipelines.steps import load_step
from pipelines.store import OutputFolder, StepOutput, Storage
from tests.pipelines.corpora import (
    corpus_config,
    flip_a_bit,
    make_texts,
    specs_of,
    write_bytes_column,
    write_shard,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

TEXTS = {
    "a.parquet": [*make_texts(150), "an <|endoftext|> in a text", "", None],
    "b.parquet": [],
    "c/d.parquet": make_texts(1, seed=1),
    "e.parquet": make_texts(150, seed=2),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The three steps over four shards, one of them empty and one with a single document."""
    root = tmp_path_factory.mktemp("run")
    for name, texts in TEXTS.items():
        write_shard(root / "shards" / name, texts)
    specs = specs_of(corpus_config(root / "shards"))
    storage = Storage(str(root / "steps"))
    outputs = {step: run_step(specs[step], storage).output for step in ("corpus", "tokenizer", "tokens")}
    return specs, storage, outputs


def snapshot(output: StepOutput) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file of the data."""
    files = [name for name in output.sizes() if name.startswith(("tokens/", "notes/"))]
    return {name: (output.read_bytes(name), output.local(name).stat().st_mtime_ns) for name in files}


def fault_of(folder: Path, *overrides: str) -> str:
    """Run the corpus step over a folder, which must fail by the user's fault and leave nothing complete."""
    storage = Storage(str(folder.parent / "steps"))
    spec = specs_of(corpus_config(folder, *overrides))["corpus"]
    with pytest.raises(DataError) as caught:
        run_step(spec, storage)
    assert len(str(caught.value).splitlines()) == 1
    assert not storage.output(spec.address).exists("_SUCCESS")
    assert not storage.output(spec.address).exists("manifest.json")
    return str(caught.value)


def test_the_manifest_of_a_corpus_counts_every_shard(finished):
    specs, _, outputs = finished
    root = Path(specs["corpus"].config["path"])
    manifest = outputs["corpus"].read_json("manifest.json")
    assert [shard["name"] for shard in manifest["shards"]] == [str(root / name) for name in TEXTS]
    for shard, texts in zip(manifest["shards"], TEXTS.values(), strict=True):
        assert shard["sha256"] == sha256_of(shard["name"])
        assert (shard["rows"], shard["empty"]) == (len(texts), sum(not text for text in texts))
        assert sum(counts["documents"] for counts in shard["splits"].values()) == shard["rows"] - shard["empty"]
    digests = "".join(shard["sha256"] for shard in manifest["shards"])
    result = outputs["corpus"].result
    assert result["digest"] == manifest["digest"] == hashlib.sha256(digests.encode()).hexdigest()
    texts = [text for part in TEXTS.values() for text in part if text]
    assert (result["documents"], result["empty_documents"], result["shards"]) == (len(texts), 2, 4)
    for split in SPLITS:
        mine = [text for text in texts if split_of(text, 0.2, 0.2) == split]
        assert result["splits"][split] == {"documents": len(mine), "bytes": sum(len(t.encode()) for t in mine)}


def test_the_token_shards_hold_every_document_of_the_corpus_in_order(finished):
    _, _, outputs = finished
    manifest = outputs["tokens"].read_json("tokens/manifest.json")
    folder = outputs["tokens"].local("tokens")
    tokenizer = Tokenizer.from_file(str(outputs["tokenizer"].local("tokenizer.json")))
    end = tokenizer.token_to_id("<|endoftext|>")
    assert (manifest["format"], manifest["dtype"], manifest["end_of_document"]) == (1, "uint16", end)
    assert manifest["tokenizer_sha256"] == outputs["tokenizer"].result["sha256"]
    assert manifest["vocab_size"] == tokenizer.get_vocab_size()
    for split in SPLITS:
        part = manifest["splits"][split]
        assert [shard["name"] for shard in part["shards"]] == [f"{split}-{i:05d}-of-00004" for i in range(4)]
        tables = [np.load(folder / f"{shard['name']}.docs.npy") for shard in part["shards"]]
        stream = np.concatenate([np.load(folder / f"{shard['name']}.npy") for shard in part["shards"]])
        ends = np.concatenate(tables)[:, 0].cumsum()
        texts = [tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) for ids in np.split(stream, ends[:-1])]
        assert (stream[ends - 1] == end).all()
        assert (stream == end).sum() == len(texts), "a text that spells the end does not end a document"
        assert texts == [t for part in TEXTS.values() for t in part if t and split_of(t, 0.2, 0.2) == split]
        sums = np.concatenate(tables).sum(axis=0).tolist()
        assert [part[what] for what in ("documents", "tokens", "bytes", "words")] == [len(texts), *sums]


def test_the_manifest_of_the_tokens_proves_sources_and_files(finished):
    _, _, outputs = finished
    manifest = outputs["tokens"].read_json("tokens/manifest.json")
    folder = outputs["tokens"].local("tokens")
    sources = {shard["name"]: shard for shard in outputs["corpus"].read_json("manifest.json")["shards"]}
    for split in SPLITS:
        shards = manifest["splits"][split]["shards"]
        for shard in shards:
            assert shard["sha256"] == sha256_of(str(folder / f"{shard['name']}.npy"))
            assert shard["docs_sha256"] == sha256_of(str(folder / f"{shard['name']}.docs.npy"))
            source = sources[shard["source"]["uri"]]
            assert (shard["source"]["sha256"], shard["source"]["rows"]) == (source["sha256"], source["rows"])
            assert shard["engine"] == "gigatoken"
        content = "".join(shard["sha256"] + shard["docs_sha256"] for shard in shards)
        assert manifest["splits"][split]["digest"] == hashlib.sha256(content.encode()).hexdigest()
    assert outputs["tokens"].result["test_digest"] == manifest["splits"]["test"]["digest"]
    assert outputs["tokens"].result["reference_shards"] == 0


def test_a_run_that_was_cut_off_does_only_what_is_missing(finished):
    specs, storage, outputs = finished
    before = snapshot(outputs["tokens"])
    output = storage.output(specs["tokens"].address)
    output.remove("notes/00003-of-00004.json")
    output.remove("tokens/train-00003-of-00004.npy")
    output.remove("tokens/manifest.json")
    report = run_step(specs["tokens"], storage)
    assert not report.cached
    after = snapshot(report.output)
    assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in before.items()}
    touched = {name for name in after if after[name][1] != before[name][1]}
    assert {name for name in touched if "00003-of-00004" not in name} == {"tokens/manifest.json"}
    assert len(touched) == 1 + 1 + 6


def test_a_shard_that_changed_since_the_corpus_step_ends_the_tokens_step(finished, tmp_path):
    specs, storage, _ = finished
    shard = Path(specs["corpus"].config["path"]) / "e.parquet"
    whole = shard.read_bytes()
    config = corpus_config(Path(specs["corpus"].config["path"]), "tokens.checked_documents=3")
    spec = specs_of(config)["tokens"]
    flip_a_bit(shard, 1000)
    try:
        with pytest.raises(DataError, match=r"e\.parquet changed since the corpus step"):
            run_step(spec, storage)
    finally:
        shard.write_bytes(whole)
    assert not storage.output(spec.address).exists("_SUCCESS")
    assert not storage.output(spec.address).exists("tokens/manifest.json")
    assert not run_step(spec, storage).cached, "mended, it goes on"


def test_a_corpus_that_changed_since_the_plan_is_not_kept_under_its_address(tmp_path):
    write_shard(tmp_path / "shards" / "a.parquet", make_texts(100))
    spec = specs_of(corpus_config(tmp_path / "shards"))["corpus"]
    storage = Storage(str(tmp_path / "steps"))
    write_shard(tmp_path / "shards" / "b.parquet", make_texts(100, seed=1))
    with pytest.raises(DataError, match="changed since the run was planned"):
        run_step(spec, storage)
    assert not storage.output(spec.address).is_complete()


@pytest.mark.parametrize("texts", [[None] * 5, ["", None, ""]])
def test_a_corpus_of_nothing_but_nulls_is_empty(tmp_path, texts):
    write_shard(tmp_path / "shards" / "a.parquet", texts)
    assert fault_of(tmp_path / "shards") == "the corpus is empty: no row holds any text"


def test_a_corpus_too_small_for_its_splits_says_what_to_change(tmp_path):
    write_shard(tmp_path / "shards" / "a.parquet", ["only one"])
    message = fault_of(tmp_path / "shards")
    assert "the corpus has 1 documents, none of which falls into the" in message
    assert "corpus.test_fraction (0.2)" in message


@pytest.mark.parametrize("fault", ["bits", "utf8"])
def test_a_fault_that_only_reading_finds_names_the_shard(tmp_path, fault):
    for name in ("a", "b", "c"):
        write_shard(tmp_path / "shards" / f"{name}.parquet", make_texts(100))
    if fault == "bits":
        flip_a_bit(tmp_path / "shards" / "b.parquet", 1000)
        expected = "cannot be read after row 0"
    else:
        write_bytes_column(tmp_path / "shards" / "b.parquet", [b"caf\xe9"])
        expected = "text that is not UTF-8"
    message = fault_of(tmp_path / "shards")
    assert f"{tmp_path}/shards/b.parquet" in message
    assert expected in message


def test_documentation_strings_become_a_corpus(tmp_path):
    data = {**corpus_config(tmp_path).to_dict()["corpus"], "path": None, "max_bytes": 120_000}
    data["source"] = describe_source(CorpusSection())
    outputs = [OutputFolder(str(tmp_path / f"corpus-{i}")) for i in range(2)]
    results = []
    for output in outputs:
        results.append(load_step("corpus").run(data, {}, output))
        assert len(output.sizes("shards")) == 16
        assert not output.exists("parsed")
    assert results[0] == results[1]
    assert 110_000 < results[0]["bytes"] <= 120_000
    one, two = (output.read_json("manifest.json") for output in outputs)
    assert one == two
    assert [shard["name"] for shard in one["shards"]] == sorted(outputs[0].sizes("shards"))
    data["source"]["packages"]["click"] = "0.1"
    with pytest.raises(DataError, match="the installed packages are not those of the plan"):
        load_step("corpus").run(data, {}, outputs[0])


def echo(task):
    """Do as the task says."""
    if task["do"] == "leave":
        os._exit(1)
    errors = {"data": DataError, "config": ConfigError, "infra": InfraError, "value": ValueError, "disk": OSError}
    if task["do"] in errors:
        raise errors[task["do"]](f"task {task['number']} of\ntwo lines")
    return {"number": task["number"], "text": "naïve \ud800"}


def test_results_come_in_the_order_of_the_tasks():
    tasks = [{"do": "answer", "number": i} for i in range(40)]
    assert [result["number"] for result in map_shards("test", echo, tasks)] == list(range(40))
    assert map_shards("test", echo, []) == []
    assert json.dumps(map_shards("test", echo, tasks[:1])[0]["text"]) == '"na\\u00efve \\ud800"'


@pytest.mark.parametrize(
    ("what", "error"),
    [("data", DataError), ("config", ConfigError), ("infra", InfraError), ("disk", InfraError), ("value", InfraError)],
)
def test_errors_of_tasks_arrive_as_what_they_are(what, error):
    tasks = [{"do": what if i == 3 else "answer", "number": i} for i in range(6)]
    with pytest.raises(error) as caught:
        map_shards("test", echo, tasks)
    assert type(caught.value) is error
    assert "task 3 of two lines" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.fault
def test_a_task_that_kills_its_worker_is_not_started_for_ever():
    with pytest.raises(InfraError, match="The worker died unexpectedly"):
        map_shards("test", echo, [{"do": "leave", "number": 0}])
