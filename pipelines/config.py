"""What a run is asked to do: one section a step, checked as a whole before anything starts.

A :class:`PipelineConfig` is the parameter of the Prefect flow, the content of a YAML file or preset, and what
``--set section.key=value`` changes. Settings of the machine (storage, Ray, MLflow, Prefect) are in
:mod:`pipelines.environment` and never part of a step's address.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass

from deconv_model.config import LevelConfig, ModelConfig, TrainingConfig
from pipelines.errors import ConfigError

PRESETS = Path(__file__).parent / "presets"
BYTE_VALUES = 256
SPECIAL_TOKENS = 1  # the end of a document

# What looks like a date or a number and is none is a plain ValueError of the loader.
_YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)

Fraction = Annotated[float, Field(gt=0.0, lt=0.5)]


class Section(BaseModel):
    """Settings of one step; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CorpusSection(Section):
    """Where the text comes from and how its documents are split."""

    path: str | None = Field(
        None, min_length=1, description="Folder or URI with Parquet shards; none: Python documentation strings."
    )
    text_column: str = Field("text", min_length=1, description="Column that holds the text.")
    max_bytes: int = Field(12_000_000, ge=100_000, description="Text gathered when path is none, in bytes, at most.")
    valid_fraction: Fraction = Field(0.04, description="Part of the documents in the valid split.")
    test_fraction: Fraction = Field(0.04, description="Part of the documents in the test split.")


class TokenizerSection(Section):
    """A byte-level BPE tokenizer: trained on a sample, or given."""

    path: str | None = Field(None, min_length=1, description="A tokenizer.json to use as it is; none: train one.")
    vocab_size: int = Field(8192, ge=BYTE_VALUES + SPECIAL_TOKENS, le=1_000_000, description="Tokens, with the bytes.")
    sample_bytes: int = Field(8_000_000, ge=10_000, description="Training text to learn from, in bytes, at most.")


class TokensSection(Section):
    """How the corpus is turned into token shards."""

    checked_documents: int = Field(64, ge=1, description="Documents a shard whose tokens are checked by the reference.")


class ModelSection(Section):
    """The hourglass model, without the vocabulary that the tokenizer decides."""

    context_length: int = Field(256, description="Tokens a sequence.")
    levels: tuple[LevelConfig, ...] = Field(description="From the input rate down to the coarsest.")
    tied: bool = Field(True, description="Whether the softmax uses the embedding matrix.")
    pointer_size: int = Field(0, description="Channels with which the softmax points into the context; 0 for none.")
    dropout: float = Field(0.0, description="Of block outputs.")
    input_dropout: float = Field(0.0, description="Of the embedded input.")
    embedding_dropout: float = Field(0.0, description="Of whole rows of the embedding.")
    stochastic_depth: float = Field(0.0, description="Of whole blocks, a sequence at a time.")
    logit_cap: float = Field(15.0, description="Soft bound of the logits; 0 for none.")

    @model_validator(mode="after")
    def _fits(self) -> ModelSection:
        self.to_model_config(vocab_size=BYTE_VALUES + SPECIAL_TOKENS)
        return self

    def to_model_config(self, vocab_size: int) -> ModelConfig:
        """Return the model's configuration for a vocabulary."""
        return ModelConfig(vocab_size=vocab_size, **{name: getattr(self, name) for name in type(self).model_fields})


@pydantic_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class TrainSection(TrainingConfig):
    """Training, and on how many processes.

    Attributes:
        workers: Processes that train together; 0 takes a GPU each where there are GPUs, else a CPU each. Changes the
            result only by rounding.
    """

    workers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")


class EvaluateSection(Section):
    """What is measured on the test split."""

    max_documents: int | None = Field(None, ge=1, description="Test documents scored, at most; none: all.")
    bootstrap_resamples: int = Field(1000, ge=10, le=1_000_000, description="Resamples of documents for intervals.")
    samples: int = Field(4, ge=0, le=1000, description="Continuations written.")
    sample_tokens: int = Field(48, ge=1, le=10_000, description="Tokens of a continuation.")
    temperature: float = Field(0.8, ge=0.0, le=10.0, description="Of the sampling; 0 takes the likeliest token.")
    top_k: int = Field(50, ge=0, description="Tokens sampled from; 0: all.")
    seed: int = Field(0, ge=0, lt=2**62, description="Of the sampling and the bootstrap.")


class RegisterSection(Section):
    """Under which name the model is registered, and what makes it champion."""

    name: str = Field("deconv-lm", pattern=r"^[A-Za-z0-9._-]+$", description="Registered model in MLflow.")
    confidence: float = Field(0.95, gt=0.5, lt=1.0, description="Confidence that a new champion must be better with.")


class PipelineConfig(Section):
    """Everything that decides the result of a run."""

    corpus: CorpusSection = CorpusSection()
    tokenizer: TokenizerSection = TokenizerSection()
    tokens: TokensSection = TokensSection()
    model: ModelSection
    train: TrainSection
    evaluate: EvaluateSection = EvaluateSection()
    register_: RegisterSection = Field(RegisterSection(), alias="register")

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_alias=True, validate_by_name=True)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that makes the same configuration again."""
        return self.model_dump(mode="json", by_alias=True)


def preset_names() -> list[str]:
    """Return the names of the presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(
    *, preset: str = "demo", file: Path | None = None, overrides: tuple[str, ...] | list[str] = ()
) -> PipelineConfig:
    """Read a configuration.

    Args:
        preset: Name of a preset.
        file: A YAML file in the shape of the presets, laid over the preset.
        overrides: ``section.key=value`` each; the value is read as YAML, list items are named by their number.

    Raises:
        ConfigError: There is no such file, preset or key, or a value cannot work.
    """
    if preset not in preset_names():
        raise ConfigError(f"unknown preset {preset!r}{_nearest(preset, preset_names())}")
    data = _read_yaml(PRESETS / f"{preset}.yaml")
    if file is not None:
        data = _merged(data, _read_yaml(file))
    for override in overrides:
        _apply(data, override)
    return parse_config(data)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the configuration {file}: {getattr(error, 'strerror', None) or error}"
        ) from error
    except _YAML_ERRORS as error:
        raise ConfigError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file} must hold sections such as 'corpus:' and 'train:', not {type(data).__name__}")
    return data


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Lay one configuration over another, section by section; lists are replaced as a whole."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r} must look like section.key=value")
    try:
        value = yaml.safe_load(text)
    except _YAML_ERRORS as error:
        raise ConfigError(f"--set {key}: the value {text!r} is not YAML") from error
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)  # YAML 1.1 takes 1e-3 for a word
    *parents, last = key.split(".")
    target: Any = data
    for parent in parents:
        if isinstance(target, list):
            target = _item(target, parent, key)
        else:
            if target.get(parent) is None:
                target[parent] = {}
            target = target[parent]
        if not isinstance(target, dict | list):
            raise ConfigError(f"--set {key}: {parent!r} is a value, not a section")
    if isinstance(target, list):
        _item(target, last, key)
        target[int(last)] = value
    else:
        target[last] = value


def _item(values: list[Any], index: str, key: str) -> Any:
    if not index.isdecimal() or int(index) >= len(values):
        raise ConfigError(f"--set {key}: {index!r} is not one of the items 0 to {len(values) - 1}")
    return values[int(index)]


def parse_config(data: Any) -> PipelineConfig:
    """Check plain data and return the configuration.

    Raises:
        ConfigError: One line with every key that is wrong and why.
    """
    try:
        return PipelineConfig.model_validate(data)
    except ValidationError as error:
        problems = [_explain(problem["loc"], problem, data) for problem in error.errors()]
        raise ConfigError("; ".join(problems)) from error


def _explain(location: tuple[int | str, ...], problem: Any, data: Any) -> str:
    key = ".".join(str(part) for part in location)
    kind = problem["type"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known_keys(location[:-1])
        parent = ".".join(str(part) for part in location[:-1])
        return f"unknown key {key}{_nearest(str(location[-1]), known, prefix=f'{parent}.' if parent else '')}"
    if kind in ("missing", "missing_keyword_only_argument"):
        return f"{key} is missing"
    if kind == "value_error":
        message = str(problem["ctx"]["error"])
        return f"{key}.{message}" if key else message
    if location == ("tokenizer", "vocab_size") and kind == "greater_than_equal":
        least = f"{BYTE_VALUES + SPECIAL_TOKENS} (every byte and the end of a document)"
        return f"tokenizer.vocab_size must be at least {least}, got {problem['input']}"
    message = problem["msg"].replace("Input should", "must", 1)
    return f"{key} {message[:1].lower()}{message[1:]}, got {problem['input']!r}"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Return the keys that may stand at a place of the configuration, as its JSON schema names them."""
    schema = PipelineConfig.model_json_schema(by_alias=True)

    def resolve(node: dict[str, Any]) -> dict[str, Any]:
        for option in [node, *node.get("anyOf", ())]:
            if "$ref" in option:
                return schema["$defs"][option["$ref"].rpartition("/")[2]]
        return node

    node = schema
    for part in location:
        node = resolve(node["items"] if isinstance(part, int) else node.get("properties", {}).get(part, {}))
    return list(node.get("properties", {}))


def _nearest(name: str, known: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; the nearest known one is {prefix}{close[0]}"
    return f"; known are {', '.join(known)}" if known else ""
