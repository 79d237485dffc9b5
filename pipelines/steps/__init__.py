"""The steps of the pipeline and the plan of a run.

A step is a function ``run(config, inputs, output) -> dict`` in a module of its own: of plain settings and the outputs
of earlier steps, writing one output folder. Steps know nothing of Prefect. This module knows the steps without
importing them, so that a plan costs nothing.
"""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from pipelines.config import PipelineConfig
from pipelines.errors import ConfigError
from pipelines.store import step_address


@dataclass(frozen=True)
class StepKind:
    """What is known of a step without importing it.

    Attributes:
        inputs: Steps whose outputs it reads.
        sections: Sections of the configuration that it reads; one section is passed as it is, several by name.
        version: Raised when the step's code gives another output for the same input.
        ignored: Keys that do not change the result and are no part of the address.
    """

    inputs: tuple[str, ...]
    sections: tuple[str, ...]
    version: int = 1
    ignored: tuple[str, ...] = ()


STEPS: dict[str, StepKind] = {
    "corpus": StepKind((), ("corpus",), ignored=("path",)),
    "tokenizer": StepKind(("corpus",), ("tokenizer",), ignored=("path",)),
    "tokens": StepKind(("corpus", "tokenizer"), ("tokens",)),
    "train": StepKind(
        ("tokenizer", "tokens"),
        ("model", "train"),
        version=2,
        ignored=("workers", "checkpoint_every", "activation_checkpointing"),
    ),
    "evaluate": StepKind(("tokenizer", "tokens", "train"), ("evaluate",)),
    "register": StepKind(("corpus", "tokenizer", "tokens", "train", "evaluate"), ("register",)),
}
"""In the order in which they run."""


@dataclass(frozen=True)
class StepSpec:
    """One step of one run, complete: what a Ray job is given as a file.

    Attributes:
        step: Name of the step.
        version: Version of its code.
        config: Its settings, as plain data.
        inputs: Addresses of the outputs it reads, by step name.
        address: Address of its own output.
    """

    step: str
    version: int
    config: dict[str, Any]
    inputs: dict[str, str]
    address: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that :meth:`from_dict` reads."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> StepSpec:
        """Read :meth:`to_dict`'s data.

        Raises:
            ConfigError: A key is missing or unknown, the step is unknown, it was made by another version, or the
                address is not that of the settings and inputs.
        """
        try:
            spec = cls(**data)
        except TypeError as error:
            raise ConfigError(f"not a step specification: {error}") from error
        if not isinstance(spec.step, str) or spec.step not in STEPS:
            raise ConfigError(f"unknown step {spec.step!r}; known are {', '.join(STEPS)}")
        if spec.version != STEPS[spec.step].version:
            raise ConfigError(
                f"step {spec.step} is at version {STEPS[spec.step].version} here, the specification at {spec.version}"
            )
        if spec.address != step_address(
            spec.step, spec.version, _without(spec.config, STEPS[spec.step].ignored), spec.inputs
        ):
            raise ConfigError(f"{spec.address} is not the address of this specification of step {spec.step}")
        return spec


def load_step(name: str) -> ModuleType:
    """Import the module of a step."""
    return importlib.import_module(f"pipelines.steps.{name}")


def plan(config: PipelineConfig) -> list[StepSpec]:
    """Return the steps of a run in order, with their addresses; only the corpus is looked at.

    Raises:
        ConfigError, DataError: The source of the corpus cannot be used.
    """
    from pipelines.sources import describe_source, read_tokenizer_file

    sections = config.to_dict()
    corpus, tokenizer = sections["corpus"], sections["tokenizer"]
    corpus["source"] = describe_source(config.corpus)
    # What has no say in the result has none in the address.
    del corpus["text_column" if config.corpus.path is None else "max_bytes"]
    if config.tokenizer.path is not None:
        tokenizer["sha256"] = read_tokenizer_file(config.tokenizer.path)[1]
        del tokenizer["vocab_size"], tokenizer["sample_bytes"]
    addresses: dict[str, str] = {}
    specs = []
    for name, kind in STEPS.items():
        chosen = {section: sections[section] for section in kind.sections}
        settings = chosen[kind.sections[0]] if len(chosen) == 1 else chosen
        inputs = {step: addresses[step] for step in kind.inputs}
        addresses[name] = step_address(name, kind.version, _without(settings, kind.ignored), inputs)
        specs.append(StepSpec(name, kind.version, settings, inputs, addresses[name]))
    return specs


def _without(settings: Any, keys: tuple[str, ...]) -> Any:
    if isinstance(settings, dict):
        return {key: _without(value, keys) for key, value in settings.items() if key not in keys}
    return settings
