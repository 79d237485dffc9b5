"""The model as MLflow serves it: this file is logged with the model and run from there.

It may import only what every consumer has: mlflow, numpy, pandas and the ``deconv_model`` package, which is logged
beside it. The weights are read from safetensors; nothing is pickled.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlflow.models
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext

from deconv_model.generation import generate
from deconv_model.saving import load_model
from deconv_model.scoring import score_documents

_LEAST = {"max_new_tokens": 0, "temperature": 0.0, "top_k": 0, "seed": 0}


class ServedLanguageModel(PythonModel):
    """Scores texts and continues them."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load weights and tokenizer from the logged folder ``model``."""
        self._model, self._tokenizer = load_model(Path(context.artifacts["model"]))
        # Text that spells the end of a document is text: it must not end one.
        self._tokenizer.encode_special_tokens = True
        self._end_of_document = int(context.model_config["end_of_document"])

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Score and continue each text.

        Args:
            context: Given by MLflow.
            model_input: A column ``text`` of strings.
            params: ``max_new_tokens`` (0: score only), ``temperature`` (0: the likeliest token), ``top_k`` (0: all
                tokens) and ``seed``; the defaults are in the model's signature.

        Returns:
            ``text``, what follows each input, and ``bits_per_byte`` of the input itself as a whole document (NaN for an
            empty one).

        Raises:
            MlflowException: A parameter is out of range; a server answers with status 400.
        """
        settings = dict(params or {})
        for name, least in _LEAST.items():
            if settings.get(name, least) < least:
                raise MlflowException.invalid_parameter_value(f"{name} must be at least {least}, got {settings[name]}")
        texts = model_input["text"].tolist()
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return pd.DataFrame(
            {
                "text": [self._continue(encoding.ids, settings) for encoding in encodings],
                "bits_per_byte": self._bits_per_byte(texts, [encoding.ids for encoding in encodings]),
            }
        )

    def _bits_per_byte(self, texts: list[str], ids: list[list[int]]) -> np.ndarray:
        end = self._end_of_document
        documents = [np.array([*document, end], dtype=np.int64) for document in ids]
        nats = score_documents(self._model, documents, start_id=end)
        sizes = np.array([len(text.encode()) for text in texts], dtype=np.float64)
        return nats / math.log(2.0) / np.where(sizes > 0, sizes, np.nan)

    def _continue(self, prompt: list[int], settings: dict[str, Any]) -> str:
        if not settings.get("max_new_tokens"):
            return ""
        end = self._end_of_document
        new = generate(self._model, [end, *prompt], stop_id=end, **settings)
        return self._tokenizer.decode([token for token in new if token != end], skip_special_tokens=False)


mlflow.models.set_model(ServedLanguageModel())
