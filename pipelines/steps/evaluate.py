"""The evaluate step: how well the trained model predicts the test split, and what it writes.

Writes ``metrics.json``, ``documents.parquet`` (what each document cost the model and the baselines), ``samples.json``
and ``samples.md``, ``loss_curve.png`` and ``report.md``. Everything but the seconds depends only on the inputs and the
settings.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from deconv_model import metrics
from deconv_model.data import TokenStream
from deconv_model.generation import generate
from deconv_model.language_model import LanguageModel
from deconv_model.saving import load_model
from pipelines import report, scoring
from pipelines.errors import DataError
from pipelines.progress import get_logger, progress
from pipelines.store import OutputFolder, StepOutput

DOCUMENTS_FILE = "documents.parquet"
METRICS_FILE = "metrics.json"
SAMPLES_FILE = "samples.json"
PICTURE_FILE = "loss_curve.png"
REPORT_FILE = "report.md"

_LONGEST_PROMPT = 32
_TOKENS_READ_AT_ONCE = 1 << 24

log = get_logger(__name__)


def run(config: dict[str, Any], inputs: dict[str, StepOutput], output: OutputFolder) -> dict[str, Any]:
    """Measure the model of ``inputs["train"]`` on the test split of ``inputs["tokens"]``.

    Args:
        config: ``max_documents``, ``bootstrap_resamples``, ``samples``, ``sample_tokens``, ``temperature``, ``top_k``
            and ``seed``, as described in :class:`pipelines.config.EvaluateSection`.
        inputs: Outputs of the steps tokenizer, tokens and train.
        output: Where to write.

    Returns:
        The numbers of the final table: bits per byte with interval, perplexities, those of the baselines, and
        ``test_digest``.

    Raises:
        DataError: The test split is empty.
    """
    folder = inputs["tokens"].local("tokens")
    stream = TokenStream(folder, "test")
    documents = scoring.select_documents(stream, config["max_documents"])
    if not documents.bytes.sum():
        raise DataError(
            "the test split holds no text, so there is nothing to measure: raise corpus.test_fraction or give the "
            "corpus more documents"
        )
    scored_by = scoring.ScoredBy(
        weights_sha256=inputs["train"].result["weights_sha256"],
        tokenizer_sha256=stream.manifest["tokenizer_sha256"],
        test_digest=stream.manifest["splits"]["test"]["digest"],
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(inputs["train"].local("model"), device=device)
    end = int(stream.manifest["end_of_document"])

    started = time.monotonic()
    nats = _score(documents, model, TokenStream(folder, "train"), scored_by, output)
    measured = _measure(documents, nats, config)
    measured |= {
        "train": inputs["train"].address,
        "documents_in_split": len(stream.document_table()),
        "context": {"policy": scored_by.context_policy, "length": model.config.context_length},
        "seconds": round(time.monotonic() - started, 2),
        **{key: value for key, value in vars(scored_by).items() if key != "context_policy"},
    }
    output.write_json(METRICS_FILE, measured)

    samples = _samples(documents, model, tokenizer, end, config)
    output.write_json(SAMPLES_FILE, samples)
    output.write_bytes("samples.md", (report.samples_markdown(samples) + "\n").encode())
    with output.write(PICTURE_FILE) as path:
        report.plot_losses(inputs["train"].read_json("history.json"), path)
    output.write_bytes(REPORT_FILE, report.evaluation_markdown(measured, samples, PICTURE_FILE).encode())
    log.info("%s", report.verdict(measured))
    return _headline(measured)


def _score(
    documents: scoring.TestDocuments,
    model: LanguageModel,
    train: TokenStream,
    scored_by: scoring.ScoredBy,
    output: OutputFolder,
) -> dict[str, np.ndarray]:
    """Return nats of each document by the name of the model; read from the file where a killed run left it."""
    if not output.exists(DOCUMENTS_FILE):
        vocab_size = model.config.vocab_size
        start_id = int(train.manifest["end_of_document"])
        nats = {
            "model": scoring.score(model, documents.ids, start_id=start_id, label="evaluate"),
            "unigram": metrics.unigram_nats(_count_tokens(train, vocab_size), documents.ids),
            "uniform": metrics.uniform_nats(vocab_size, documents.tokens),
        }
        with output.write(DOCUMENTS_FILE) as path:
            scoring.write_scores(path, documents, nats, scored_by)
    table, _ = scoring.read_scores(output.local(DOCUMENTS_FILE))
    return {name: table[f"{name}_nats"].to_numpy() for name in report.MODELS}


def _count_tokens(stream: TokenStream, vocab_size: int) -> np.ndarray:
    """Return how often each id occurs, int64 ``[vocab_size]``."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(stream), _TOKENS_READ_AT_ONCE):
        piece = stream.read(start, min(_TOKENS_READ_AT_ONCE, len(stream) - start))
        counts += np.bincount(piece, minlength=vocab_size)
    return counts


def _measure(documents: scoring.TestDocuments, nats: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, Any]:
    settings = {"resamples": config["bootstrap_resamples"], "seed": config["seed"]}

    def measure(cost: np.ndarray, unit: np.ndarray, of: Callable[[float, float], float]) -> dict[str, float | None]:
        low, high = metrics.bootstrap_interval(cost, unit, **settings)
        ratios = {"value": float(cost.sum() / unit.sum()), "low": low, "high": high}
        return {name: _finite(of(ratio, 1.0)) for name, ratio in ratios.items()}

    measured: dict[str, Any] = {
        "documents": len(documents.ids),
        "tokens": int(documents.tokens.sum()),
        "bytes": int(documents.bytes.sum()),
        "words": int(documents.words.sum()),
        "bootstrap_resamples": config["bootstrap_resamples"],
    }
    for name, cost in nats.items():
        measured[name] = {
            "bits_per_byte": measure(cost, documents.bytes, metrics.bits_per_byte),
            "token_perplexity": measure(cost, documents.tokens, metrics.token_perplexity),
            "word_perplexity": measure(cost, documents.words, metrics.word_perplexity),
        }
    interval = metrics.paired_bootstrap_interval(nats["model"], nats["unigram"], documents.bytes, **settings)
    value, low, high = (metrics.bits_per_byte(ratio, 1.0) for ratio in interval)
    measured["model_minus_unigram"] = {"bits_per_byte": {"value": value, "low": low, "high": high}}
    return measured


def _finite(value: float) -> float | None:
    """Return a number that JSON can hold: text without spaces has words of a thousand tokens, and exp has an end."""
    return value if math.isfinite(value) else None


def _samples(
    documents: scoring.TestDocuments, model: LanguageModel, tokenizer: Tokenizer, end: int, config: dict[str, Any]
) -> list[dict[str, Any]]:
    """Continue the beginnings of some test documents; each entry holds what really followed as well."""
    # Documents in which a full prompt leaves something to compare with, where there are any.
    roomy = np.flatnonzero(documents.tokens > 2 * _LONGEST_PROMPT)
    candidates = roomy if len(roomy) else np.flatnonzero(documents.tokens > 2)
    count = min(config["samples"], len(candidates))
    places = candidates[np.arange(count) * len(candidates) // max(count, 1)]
    samples = []
    with progress("samples", total=count, unit="samples") as bar:
        for number, place in enumerate(places):
            ids = documents.ids[place][:-1].tolist()
            prompt = ids[: min(_LONGEST_PROMPT, len(ids) // 2)]
            continuation = generate(
                model,
                [end, *prompt],
                max_new_tokens=config["sample_tokens"],
                temperature=config["temperature"],
                top_k=config["top_k"],
                seed=config["seed"] + number,
                stop_id=end,
            )
            reference = ids[len(prompt) : len(prompt) + config["sample_tokens"]]
            written = [token for token in continuation if token != end]
            texts = tokenizer.decode_batch([prompt, written, reference], skip_special_tokens=False)
            sample = {"document": int(documents.index[place]), "prompt": texts[0]}
            samples.append({**sample, "continuation": texts[1], "reference": texts[2]})
            bar.advance()
    return samples


def _headline(measured: dict[str, Any]) -> dict[str, Any]:
    bits = measured["model"]["bits_per_byte"]
    return {
        "bits_per_byte": bits["value"],
        "bits_per_byte_low": bits["low"],
        "bits_per_byte_high": bits["high"],
        "token_perplexity": measured["model"]["token_perplexity"]["value"],
        "word_perplexity": measured["model"]["word_perplexity"]["value"],
        "unigram_bits_per_byte": measured["unigram"]["bits_per_byte"]["value"],
        "uniform_bits_per_byte": measured["uniform"]["bits_per_byte"]["value"],
        "beats_unigram": measured["model_minus_unigram"]["bits_per_byte"]["high"] < 0,
        "context_policy": measured["context"]["policy"],
        **{key: measured[key] for key in ("documents", "tokens", "bytes", "words", "test_digest")},
    }
