import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer

from deconv_model.saving import load_model
from pipelines import report, scoring
from pipelines.errors import DataError
from pipelines.steps import evaluate
from pipelines.store import OutputFolder, StepOutput
from tests.pipelines.finished_steps import EVALUATE, TEXTS, finish_evaluate, finish_inputs


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StepOutput]:
    root = tmp_path_factory.mktemp("steps")
    return finish_evaluate(root, finish_inputs(root, steps=40))


def test_scores_are_those_of_a_plain_forward_pass(evaluated):
    model, tokenizer = load_model(evaluated["train"].local("model"))
    model = model.double()
    tokenizer.encode_special_tokens = True
    table = pq.read_table(evaluated["evaluate"].local("documents.parquet"))
    compared = 0
    for row, text in zip(table.to_pylist(), TEXTS["test"], strict=True):
        assert row["bytes"] == len(text.encode())
        ids = [0, *tokenizer.encode(text).ids, 0]
        assert row["tokens"] == len(ids) - 1
        if len(ids) - 1 > model.config.context_length:
            continue  # read through several windows
        with torch.no_grad():
            log_probabilities = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
        nats = -log_probabilities[torch.arange(len(ids) - 1), ids[1:]].sum().item()
        assert row["model_nats"] == pytest.approx(nats, rel=1e-5)
        compared += 1
    assert compared > 10


def test_metrics_add_up_from_the_documents(evaluated):
    table = pq.read_table(evaluated["evaluate"].local("documents.parquet")).to_pandas()
    metrics = evaluated["evaluate"].read_json("metrics.json")
    for name in ("model", "unigram", "uniform"):
        nats = table[f"{name}_nats"].sum()
        measured = metrics[name]
        assert measured["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / table["bytes"].sum())
        assert measured["token_perplexity"]["value"] == pytest.approx(math.exp(nats / table["tokens"].sum()))
        assert measured["word_perplexity"]["value"] == pytest.approx(math.exp(nats / table["words"].sum()))
        for measure in measured.values():
            assert measure["low"] <= measure["value"] <= measure["high"]
    assert metrics["context"] == {"policy": "sliding", "length": 64}
    manifest = evaluated["tokens"].read_json("tokens/manifest.json")
    assert metrics["test_digest"] == manifest["splits"]["test"]["digest"]


def test_unigram_counts_are_those_of_the_train_split(evaluated):
    tokenizer = Tokenizer.from_file(str(evaluated["tokenizer"].local("tokenizer.json")))
    tokenizer.encode_special_tokens = True
    counts = np.ones(300)
    for text in TEXTS["train"]:
        np.add.at(counts, [*tokenizer.encode(text).ids, 0], 1)
    ids = [*tokenizer.encode(TEXTS["test"][0]).ids, 0]
    table = pq.read_table(evaluated["evaluate"].local("documents.parquet"))
    assert table["unigram_nats"][0].as_py() == pytest.approx(-np.log(counts / counts.sum())[ids].sum())
    assert table["uniform_nats"][0].as_py() == pytest.approx(len(ids) * math.log(300))


def test_a_trained_model_beats_the_unigram_baseline_and_an_untrained_one_does_not(evaluated, tmp_path):
    assert evaluated["evaluate"].result["beats_unigram"] is True
    untrained = finish_evaluate(tmp_path, finish_inputs(tmp_path, steps=0))["evaluate"].result
    assert untrained["beats_unigram"] is False
    assert untrained["bits_per_byte"] == pytest.approx(untrained["uniform_bits_per_byte"], rel=0.05)


def test_evaluating_again_gives_the_same_files(evaluated, tmp_path):
    again = OutputFolder(str(tmp_path / "evaluate-again"))
    result = evaluate.run(EVALUATE, evaluated, again)
    assert result == evaluated["evaluate"].result
    for name in ("documents.parquet", "samples.json", "samples.md", "report.md", "loss_curve.png"):
        assert again.read_bytes(name) == evaluated["evaluate"].read_bytes(name), name


def test_fewer_documents_are_spread_over_the_split(evaluated, tmp_path):
    subset = finish_evaluate(tmp_path, evaluated, max_documents=5)["evaluate"]
    table = pq.read_table(subset.local("documents.parquet"))
    assert table["index"].to_pylist() == [0, 5, 10, 15, 20]
    whole = pq.read_table(evaluated["evaluate"].local("documents.parquet"))
    np.testing.assert_allclose(table["model_nats"], whole["model_nats"].take(table["index"]), rtol=1e-5)
    assert "5 of 26 documents" in subset.read_bytes("report.md").decode()


def test_a_killed_evaluation_does_not_score_again(evaluated, tmp_path, monkeypatch):
    output = OutputFolder(str(tmp_path / "evaluate-killed"))
    output.write_bytes("documents.parquet", evaluated["evaluate"].read_bytes("documents.parquet"))
    monkeypatch.setattr(scoring, "score", lambda *_, **__: pytest.fail("scored again"))
    assert evaluate.run(EVALUATE, evaluated, output) == evaluated["evaluate"].result


def test_an_empty_test_split_says_what_to_do(tmp_path):
    inputs = finish_inputs(tmp_path, texts={**TEXTS, "test": []})
    with pytest.raises(DataError, match=r"corpus\.test_fraction"):
        evaluate.run(EVALUATE, inputs, OutputFolder(str(tmp_path / "evaluate-empty")))
    assert not (tmp_path / "evaluate-empty" / "metrics.json").exists()


def test_samples_begin_as_their_documents_do(evaluated):
    samples = evaluated["evaluate"].read_json("samples.json")
    assert len(samples) == 2
    for sample in samples:
        assert TEXTS["test"][sample["document"]].startswith(sample["prompt"] + sample["reference"])
        assert sample["prompt"]
        assert sample["continuation"]
        assert "<|endoftext|>" not in sample["continuation"]


def test_report_shows_measures_and_picture(evaluated):
    page = evaluated["evaluate"].read_bytes("report.md").decode()
    value = evaluated["evaluate"].result["bits_per_byte"]
    assert f"| bits per byte | {value:.4f} (" in page
    assert "bits per byte less than the unigram baseline" in page
    assert "![Loss on the train and valid splits](loss_curve.png)" in page
    picture = evaluated["evaluate"].read_bytes("loss_curve.png")
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5_000


def test_losses_are_drawn_however_few_there_are(tmp_path):
    entry = {"step": 1, "train_loss": 5.0, "valid_loss": 5.5}
    for number, history in enumerate(([], [entry], [{"step": 1, "train_loss": 5.0}])):
        path = tmp_path / f"{number}.png"
        report.plot_losses(history, path)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_tables_align_and_escape():
    assert report.plain_table(["a", "number"], [["long name", "1"], ["b", "22"]]) == (
        "a          number\n---------  ------\nlong name       1\nb              22"
    )
    assert report.markdown_table(["a", "n"], [["x|y", "1"]]) == "| a | n |\n| --- | ---: |\n| x\\|y | 1 |"


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ((-0.5, -0.6, -0.4), "needs 0.500 bits per byte less than the unigram baseline (95 % interval 0.400 to 0.600)"),
        ((0.5, 0.4, 0.6), "needs 0.500 bits per byte more than"),
        ((0.1, -0.1, 0.3), "cannot be told from the unigram baseline: +0.100"),
    ],
)
def test_verdict_names_the_side_that_the_interval_is_on(interval, words):
    difference = dict(zip(("value", "low", "high"), interval, strict=True))
    assert words in report.verdict({"model_minus_unigram": {"bits_per_byte": difference}})


def test_text_without_spaces_has_a_word_perplexity_beyond_numbers(tmp_path):
    texts = {**TEXTS, "test": ["試験" * 200, "naïve" * 200]}
    output = finish_evaluate(tmp_path, finish_inputs(tmp_path, texts=texts))["evaluate"]
    metrics = json.loads(output.read_bytes("metrics.json"), parse_constant=lambda name: pytest.fail(name))
    assert metrics["uniform"]["word_perplexity"]["value"] is None
    assert "beyond numbers" in output.read_bytes("report.md").decode()


def test_scores_say_what_was_scored_by_what(evaluated, tmp_path: Path):
    _, scored_by = scoring.read_scores(evaluated["evaluate"].local("documents.parquet"))
    assert scored_by.weights_sha256 == evaluated["train"].result["weights_sha256"]
    assert scored_by.context_policy == "sliding"
    stranger = tmp_path / "stranger.parquet"
    shutil.copy(evaluated["evaluate"].local("documents.parquet"), stranger)
    pq.write_table(pq.read_table(stranger).replace_schema_metadata({}), stranger)
    with pytest.raises(ValueError, match="does not say"):
        scoring.read_scores(stranger)
