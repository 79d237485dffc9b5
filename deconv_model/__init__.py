"""Convolution/deconvolution language models.

The library needs torch, numpy, safetensors and tokenizers, and knows nothing of Ray, Prefect or MLflow. What a user
needs is importable from here::

    from deconv_model import LanguageModel, generate, preset

    model = LanguageModel(preset("tiny", "bytes"))

Names are loaded when they are first used: a configuration can be made, and refused, without loading torch.

Shapes are written as suffixes of names, here and in all modules: ``x_BTC`` is a tensor of shape [B, T, C]. B sequences,
T positions or tokens, S positions of keys, M positions of the next coarser level, C channels, H hidden channels, N
heads, D channels of a head, K taps, V token ids, R rows of any kind. Losses are in nats a token unless a name says
bits.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deconv_model.autoencoder import Autoencoder
    from deconv_model.autoencoder_config import AutoencoderConfig, NoiseConfig
    from deconv_model.beams import Hypothesis, beam_search
    from deconv_model.config import LevelConfig, LSTMConfig, ModelConfig, StackConfig
    from deconv_model.data import SequenceOrder, TokenStream
    from deconv_model.embeddings import freeze_rows, initialise_embedding, read_vectors, wanted_words
    from deconv_model.export import load_exported, save_exported
    from deconv_model.generation import generate, generate_batch, stream
    from deconv_model.language_model import LanguageModel
    from deconv_model.model_summary import ModelSummary, summarise
    from deconv_model.noise import add_noise
    from deconv_model.presets import preset
    from deconv_model.sampling import SamplingOptions
    from deconv_model.saving import load_autoencoder, load_model, save_model
    from deconv_model.scoring import score, score_documents
    from deconv_model.text_generation import generate_texts, stream_text
    from deconv_model.training import Trainer
    from deconv_model.training_config import TrainingConfig

__version__ = "0.1.0"

_HOMES = {
    "autoencoder": ("Autoencoder",),
    "autoencoder_config": ("AutoencoderConfig", "NoiseConfig"),
    "beams": ("Hypothesis", "beam_search"),
    "config": ("LSTMConfig", "LevelConfig", "ModelConfig", "StackConfig"),
    "data": ("SequenceOrder", "TokenStream"),
    "embeddings": ("freeze_rows", "initialise_embedding", "read_vectors", "wanted_words"),
    "export": ("load_exported", "save_exported"),
    "generation": ("generate", "generate_batch", "stream"),
    "language_model": ("LanguageModel",),
    "model_summary": ("ModelSummary", "summarise"),
    "noise": ("add_noise",),
    "presets": ("preset",),
    "sampling": ("SamplingOptions",),
    "saving": ("load_autoencoder", "load_model", "save_model"),
    "scoring": ("score", "score_documents"),
    "text_generation": ("generate_texts", "stream_text"),
    "training": ("Trainer",),
    "training_config": ("TrainingConfig",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "Hypothesis",
    "LSTMConfig",
    "LanguageModel",
    "LevelConfig",
    "ModelConfig",
    "ModelSummary",
    "NoiseConfig",
    "SamplingOptions",
    "SequenceOrder",
    "StackConfig",
    "TokenStream",
    "Trainer",
    "TrainingConfig",
    "add_noise",
    "beam_search",
    "freeze_rows",
    "generate",
    "generate_batch",
    "generate_texts",
    "initialise_embedding",
    "load_autoencoder",
    "load_exported",
    "load_model",
    "preset",
    "read_vectors",
    "save_exported",
    "save_model",
    "score",
    "score_documents",
    "stream",
    "stream_text",
    "summarise",
    "wanted_words",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
