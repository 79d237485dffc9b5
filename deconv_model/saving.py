"""A trained model as a folder of three files: ``config.json``, ``model.safetensors`` and ``tokenizer.json``.

No file holds code, so a folder from a stranger is safe to load.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from tokenizers import Tokenizer
from torch import nn

from deconv_model.autoencoder import Autoencoder
from deconv_model.autoencoder_config import AutoencoderConfig
from deconv_model.config import LSTMConfig, ModelConfig
from deconv_model.language_model import LanguageModel

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
_FORMAT = 2

ModelT = TypeVar("ModelT", bound=nn.Module)
Config = ModelConfig | LSTMConfig | AutoencoderConfig
_KINDS: dict[str, type[ModelConfig] | type[LSTMConfig] | type[AutoencoderConfig]] = {
    "hourglass": ModelConfig,
    "lstm": LSTMConfig,
    "autoencoder": AutoencoderConfig,
}


def save_model(folder: Path, model: LanguageModel | Autoencoder, tokenizer_file: Path) -> None:
    """Write the model's folder; the same weights give the same bytes.

    Args:
        folder: Made if it is missing. Each file replaces an older one in one move.
        model: Its weights are written as they are, in their own precision.
        tokenizer_file: A ``tokenizer.json`` of the tokenizers library, copied byte by byte.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kind = next(name for name, config_type in _KINDS.items() if isinstance(model.config, config_type))
    config = {"format": _FORMAT, "kind": kind, "model": model.config.to_dict()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    _replace(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())
    _replace(folder / TOKENIZER_FILE, tokenizer_file.read_bytes())
    _replace(folder / WEIGHTS_FILE, save(tensors))


def load_model(folder: Path, device: str | torch.device = "cpu") -> tuple[LanguageModel, Tokenizer]:
    """Read the folder of a language model.

    Returns:
        The model in evaluation mode on the device, with bit-identical weights, and its tokenizer.

    Raises:
        ValueError: A file is missing, damaged, or does not fit the others, or holds another kind of model; the message
            names it.
    """
    config = _load_config(folder / CONFIG_FILE)
    if isinstance(config, AutoencoderConfig):
        raise ValueError(f"{folder / CONFIG_FILE}: is that of an autoencoder: use load_autoencoder")
    return _load(folder, lambda: LanguageModel(config), config.vocab_size, device)


def load_autoencoder(folder: Path, device: str | torch.device = "cpu") -> tuple[Autoencoder, Tokenizer]:
    """Read the folder of an autoencoder; see :func:`load_model`."""
    config = _load_config(folder / CONFIG_FILE)
    if not isinstance(config, AutoencoderConfig):
        raise ValueError(f"{folder / CONFIG_FILE}: is that of a language model: use load_model")
    return _load(folder, lambda: Autoencoder(config), config.vocab_size, device)


def _load(
    folder: Path, new_model: Callable[[], ModelT], vocab_size: int, device: str | torch.device
) -> tuple[ModelT, Tokenizer]:
    tokenizer = _load_tokenizer(folder / TOKENIZER_FILE, vocab_size)
    weights_file = folder / WEIGHTS_FILE
    try:
        tensors = load(_read(weights_file))
    except SafetensorError as error:
        raise ValueError(f"{weights_file}: not a whole safetensors file: {error}") from error
    with torch.random.fork_rng(devices=[]):  # the initial weights are replaced: their making must leave no trace
        model = new_model()
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{weights_file}: does not fit {CONFIG_FILE}: {error}") from error
    return model.to(device).eval(), tokenizer


def weights_sha256(folder: Path) -> str:
    """Return the SHA-256 of the folder's weights file, in hexadecimal.

    Raises:
        ValueError: The file is missing.
    """
    return hashlib.sha256(_read(folder / WEIGHTS_FILE)).hexdigest()


def _load_config(path: Path) -> Config:
    text = _read(path)
    try:
        data = json.loads(text)
        if data["format"] != _FORMAT:
            raise ValueError(
                f"format {data['format']!r} is not {_FORMAT}: load it with the version of deconv_model that wrote it"
            )
        if data["kind"] not in _KINDS:
            raise ValueError(f"kind {data['kind']!r} is none of {', '.join(_KINDS)}")
        return _KINDS[data["kind"]].from_dict(data["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a model configuration: {error}") from error


def _load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    data = _read(path)
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises plain Exception for whatever is wrong
        raise ValueError(f"{path}: not a tokenizer: {error}") from error
    if tokenizer.get_vocab_size() > vocab_size:
        raise ValueError(f"{path}: has {tokenizer.get_vocab_size()} ids, the model {vocab_size}")
    return tokenizer


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)
