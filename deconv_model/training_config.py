"""How a model is trained, as plain values: imports nothing heavy, so they can be refused without loading torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Precision = Literal["auto", "float32", "bfloat16"]
Schedule = Literal["trapezoid", "cosine"]
Parallel = Literal["replicated", "ddp", "fsdp"]

_STRICT = {"extra": "forbid"}  # read by pydantic when this class is part of a pydantic model


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained. Everything here changes the weights unless its description says otherwise.

    Attributes:
        steps: Optimizer steps at most; the learning rate schedule ends there.
        batch_size: Sequences of ``context_length`` tokens in a global batch, whatever the number of workers.
        micro_batch_size: Sequences a worker computes at once; smaller ones are accumulated.
        seed: Initial weights, order of the samples and dropout.
        muon_lr: Peak learning rate of Muon, which trains the matrices.
        adamw_lr: Peak learning rate of AdamW, which trains embedding, norms and convolution taps.
        weight_decay: Decoupled weight decay of the matrices.
        schedule: Shape of the learning rate after its rise: ``trapezoid`` (also called warmup-stable-decay) is level,
            then falls linearly; ``cosine`` is level, then falls along half a cosine.
        warmup: Part of ``steps`` in which the rate rises linearly from 0.
        constant_until: Part of ``steps`` after which the rate falls.
        final_lr: Part of the peak rate that is left at the last step.
        gradient_clip: Largest norm of the whole gradient; 0 switches clipping off.
        label_smoothing: Part of each target's probability that is spread evenly over the vocabulary, in training only.
        average_decay: Part that an average of the weights keeps at each step (an exponential moving average); what is
            evaluated and kept as best is then the average. 0 switches it off.
        max_skipped: Steps in a row whose loss or gradient may be not finite: they are skipped and counted, and one more
            is an error.
        precision: Of the matrix products: ``auto`` is bfloat16 where the device computes it fast, else float32.
        activation_checkpointing: Whether the blocks are computed again in the backward pass instead of keeping what
            they computed: less memory, more time. Changes nothing in the result.
        compile: Whether the blocks are compiled (torch.compile) where there is a compiler. Changes rounding. On a CPU
            it gains a tenth with plain feed-forward blocks and nothing with gated convolutions.
        parallel: How several workers share the work: ``replicated`` sums one flat buffer of all gradients; ``ddp`` is
            DistributedDataParallel, whose sums run while gradients are computed; ``fsdp`` (FSDP2) shards parameters
            and optimizer states too, for models that do not fit otherwise. Changes the result only by rounding.
        eval_every: Steps between evaluations on the valid split.
        eval_sequences: Sequences of the valid split that are evaluated, at most.
        patience: Evaluations without improvement after which training stops early; 0 never stops early.
        checkpoint_every: Steps between checkpoints. Changes nothing in the result.
    """

    steps: int
    batch_size: int = 32
    micro_batch_size: int = 16
    seed: int = 0
    muon_lr: float = 0.02
    adamw_lr: float = 0.004
    weight_decay: float = 0.05
    schedule: Schedule = "trapezoid"
    warmup: float = 0.05
    constant_until: float = 0.4
    final_lr: float = 0.02
    gradient_clip: float = 1.0
    label_smoothing: float = 0.0
    average_decay: float = 0.0
    max_skipped: int = 3
    precision: Precision = "auto"
    activation_checkpointing: bool = False
    compile: bool = False
    parallel: Parallel = "replicated"
    eval_every: int = 50
    eval_sequences: int = 64
    patience: int = 5
    checkpoint_every: int = 50

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch_size", "eval_every", "eval_sequences", "checkpoint_every"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("muon_lr", "adamw_lr"):
            self._require(name, 0.0 < getattr(self, name) < 1.0, "between 0 and 1")
        for name in ("weight_decay", "gradient_clip", "max_skipped", "patience"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("warmup", "constant_until", "final_lr"):
            self._require(name, 0.0 <= getattr(self, name) <= 1.0, "in [0, 1]")
        for name in ("label_smoothing", "average_decay"):
            self._require(name, 0.0 <= getattr(self, name) < 1.0, "in [0, 1)")
        self._require("warmup", self.warmup <= self.constant_until, "at most constant_until")
        self._require("seed", 0 <= self.seed < 2**62, "in [0, 2**62)")
        for name, known in (("precision", Precision), ("schedule", Schedule), ("parallel", Parallel)):
            values = get_args(known)
            self._require(name, getattr(self, name) in values, f"one of {', '.join(values)}")

    def _require(self, name: str, holds: bool, bound: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {bound}, got {getattr(self, name)!r}")
