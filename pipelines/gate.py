"""Is the new model better than the champion? Answered on the same test documents, document by document.

Bits per byte can be compared between models with different tokenizers, because the bytes are those of the text. The
documents are resampled in pairs, so what makes a document hard for both models cancels.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from deconv_model.metrics import paired_bootstrap_interval
from pipelines import scoring
from pipelines.progress import get_logger
from pipelines.registry import CHALLENGER, CHAMPION, TOKENIZER_TAG, WEIGHTS_TAG, load_registered

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

DOCUMENTS_ARTIFACT = "evaluation/documents.parquet"
_RESAMPLES = 2000
_log = get_logger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A model that was evaluated and wants to be champion.

    Attributes:
        scores: Its ``documents.parquet``.
        scored_by: What that file says it is.
        documents: The token ids of the same documents.
        tokenizer: The tokenizer that made them.
    """

    scores: pa.Table
    scored_by: scoring.ScoredBy
    documents: list[np.ndarray]
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Decision:
    """What becomes of a candidate.

    Attributes:
        decision: ``champion`` or ``challenger``, which is also the alias it gets.
        reason: Why, in words and numbers.
        champion: ``version``, ``run_id``, ``weights_sha256`` of the champion it met, ``None`` where there was none.
        difference: Bits per byte of the candidate minus those of the champion: ``value``, ``low``, ``high``; ``None``
            where there was nothing to compare.
    """

    decision: str
    reason: str
    champion: dict[str, Any] | None = None
    difference: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def decide(client: MlflowClient, candidate: Candidate, champion: ModelVersion | None, confidence: float) -> Decision:
    """Compare a candidate with the champion.

    Args:
        client: From :func:`pipelines.tracking.connected`.
        candidate: The new model.
        champion: The version that is champion, if there is one.
        confidence: The candidate wins when the whole interval of this confidence lies on its side.

    Raises:
        ConfigError: The champion was not made by this pipeline.
        InfraError: The champion's files cannot be read.
    """
    if champion is None:
        return Decision(CHAMPION, "there is no champion yet")
    weights = champion.tags.get(WEIGHTS_TAG)
    known: dict[str, Any] = {"version": str(champion.version), "run_id": champion.run_id, "weights_sha256": weights}
    same_weights = weights == candidate.scored_by.weights_sha256
    if same_weights and champion.tags.get(TOKENIZER_TAG) == candidate.scored_by.tokenizer_sha256:
        return Decision(CHALLENGER, f"same weights as champion version {champion.version}", known)

    theirs = _logged_scores(client, candidate, champion)
    if theirs is None:
        theirs = _score_champion(candidate, champion)
    bytes_ = candidate.scores["bytes"].to_numpy()
    ours = candidate.scores["model_nats"].to_numpy()
    interval = paired_bootstrap_interval(ours, theirs, bytes_, resamples=_RESAMPLES, seed=0, confidence=confidence)
    value, low, high = (nats / math.log(2.0) for nats in interval)
    difference = {"value": value, "low": low, "high": high}
    known["bits_per_byte"] = float(theirs.sum() / bytes_.sum() / math.log(2.0))
    decision = CHAMPION if difference["high"] < 0.0 else CHALLENGER
    return Decision(decision, _reason(difference, str(champion.version), confidence), known, difference)


def _reason(difference: Mapping[str, float], version: str, confidence: float) -> str:
    value, low, high = difference["value"], difference["low"], difference["high"]
    interval = f"{value:+.4f} bits per byte, {100 * confidence:g} % interval {low:+.4f} to {high:+.4f}"
    if high < 0:
        return f"better than champion version {version}: {interval}"
    if low > 0:
        return f"worse than champion version {version}: {interval}"
    return f"not surely better than champion version {version}: {interval}"


def _logged_scores(client: MlflowClient, candidate: Candidate, champion: ModelVersion) -> np.ndarray | None:
    """Return what the champion's own evaluation says of these documents, ``None`` where it measured anything else."""
    from mlflow import MlflowException

    if not champion.run_id:
        return None
    with tempfile.TemporaryDirectory(prefix="deconv-champion-") as folder:
        try:
            table, scored_by = scoring.read_scores(
                Path(client.download_artifacts(champion.run_id, DOCUMENTS_ARTIFACT, folder))
            )
        except (MlflowException, OSError, ValueError) as error:
            _log.info("[register] champion version %s has no usable scores: %s", champion.version, error)
            return None
    same_documents = (
        scored_by.test_digest == candidate.scored_by.test_digest
        and scored_by.tokenizer_sha256 == candidate.scored_by.tokenizer_sha256
        and scored_by.context_policy == candidate.scored_by.context_policy
        and table["index"].equals(candidate.scores["index"])
    )
    is_champion = scored_by.weights_sha256 == champion.tags.get(WEIGHTS_TAG)
    return table["model_nats"].to_numpy() if same_documents and is_champion else None


def _score_champion(candidate: Candidate, champion: ModelVersion) -> np.ndarray:
    """Return nats of the candidate's test documents under the champion's tokenizer and weights."""
    _log.info("[register] scoring champion version %s on this test split", champion.version)
    model, tokenizer, info = load_registered(f"models:/{champion.name}/{champion.version}")
    texts = scoring.decode_documents(candidate.tokenizer, candidate.documents)
    documents = scoring.encode_documents(tokenizer, texts, info.end_of_document)
    return scoring.score(model, documents, start_id=info.end_of_document, label="champion")
