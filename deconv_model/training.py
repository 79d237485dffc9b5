"""The training loop and its state, for one process or a process group.

A run that is stopped anywhere and goes on from its state ends with the same weights, bit for bit, given the same number
of workers, threads a worker and kind of machine. What makes that so:

- The samples of a step follow from ``samples_seen`` (:mod:`deconv_model.data`), the learning rate from the step, and
  the dropout from (seed, step, rank), drawn anew each step. No random generator has a state to save.
- Gradients are summed over the workers in an order that is the same after every start (:mod:`deconv_model.parallel`).
- Losses are divided by the tokens of the global batch, so the gradient is the same, up to rounding, for any number of
  workers, and so are the samples in it.

Shape legend: B sequences, T tokens of context.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from deconv_model.averaging import WeightAverage
from deconv_model.data import SequenceOrder
from deconv_model.micro_batches import micro_batches
from deconv_model.numerics import ResolvedPrecision, deterministic_kernels, resolve_precision
from deconv_model.optim import build_optimizers, learning_rate_factor, load_optimizer_states, optimizer_states
from deconv_model.parallel import share_training
from deconv_model.repeated_blocks import checkpoint_blocks, compile_blocks
from deconv_model.sharding import load_whole_state, whole_state
from deconv_model.training_config import TrainingConfig

_FORMAT = 2


class Trainer:
    """Trains a model; its state says where the training is.

    Every worker makes a Trainer of the same model, configuration and data. A step is one optimizer step over a global
    batch; one whose loss or gradient is not finite changes neither weights nor optimizers. Every ``eval_every`` steps
    and at the last one, the first ``eval_sequences`` sequences of ``valid`` are evaluated, with the average of the
    weights if there is one; training ends after ``steps`` or when ``patience`` evaluations in a row brought no lower
    loss.

    Args:
        model: A module with ``token_losses`` (:class:`~deconv_model.parallel.TokenLossModel`), parameters in float32.
            It belongs to the Trainer from now on: it is moved to ``device``, its blocks may be compiled and its
            parameters sharded.
        config: How to train.
        train: Order of the training sequences.
        valid: Order of the evaluation sequences, unshuffled.
        rank: This worker's place in the default process group.
        world_size: Workers in that group; 1 needs no group.
        device: Where to compute.

    Attributes:
        step: Steps done, skipped ones included.
        samples_seen: Sequences trained on or skipped, by all workers together: where ``train`` goes on.
        skipped_steps: Steps skipped so far.
        precision: Of the matrix products; part of the state, so a run goes on as it began on any machine.
        best_loss: Lowest valid loss so far, nats a token; ``None`` before the first evaluation.
        best_step: Its step.
        history: One dict a step: ``step``, ``samples_seen``, ``skipped_steps``, ``learning_rate`` (Muon's), unless it
            was skipped ``train_loss`` (smoothed labels included) and ``gradient_norm`` (before clipping), and, when
            evaluated, ``valid_loss``. The same for the same run.
        timing: One dict a step: ``step``, ``seconds``, ``tokens_per_second``, evaluations left out.

    Raises:
        ValueError: ``rank`` and ``world_size`` are not those of the process group.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        train: SequenceOrder,
        valid: SequenceOrder,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device = torch.device("cpu"),  # noqa: B008 (a device is immutable)
    ) -> None:
        if world_size > 1 and (
            not dist.is_initialized() or (dist.get_rank(), dist.get_world_size()) != (rank, world_size)
        ):
            raise ValueError(f"rank {rank} of {world_size} workers is not this process's place in the process group")
        self.model = model.to(device)
        self.config = config
        self.train = train
        self.valid = valid
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.precision: ResolvedPrecision = resolve_precision(config.precision, device)
        if config.compile:
            compile_blocks(model, device)
        if config.activation_checkpointing:
            checkpoint_blocks(model)
        self._workers = share_training(model, config.parallel, world_size, device)
        self.optimizers = build_optimizers(model, config, rank=rank, world_size=world_size)
        self._average = WeightAverage(model, config.average_decay) if config.average_decay else None
        self._loss_settings = {"label_smoothing": config.label_smoothing} if config.label_smoothing else {}
        self.step = 0
        self.samples_seen = 0
        self.skipped_steps = 0
        self.best_loss: float | None = None
        self.best_step = 0
        self.history: list[dict[str, Any]] = []
        self.timing: list[dict[str, Any]] = []
        self._skipped_in_a_row = 0
        self._best_weights: dict[str, Tensor] = {}
        self._evaluations_without_improvement = 0

    @property
    def finished(self) -> bool:
        """Whether all steps are done or early stopping has ended the training."""
        patience = self.config.patience
        return self.step >= self.config.steps or 0 < patience <= self._evaluations_without_improvement

    def best_weights(self) -> dict[str, Tensor]:
        """Return the model's ``state_dict`` at the lowest valid loss so far, on the CPU, with the weights evaluated.

        Raises:
            RuntimeError: Nothing was evaluated yet.
        """
        if self.best_loss is None:
            raise RuntimeError("there are no best weights before the first evaluation")
        return self._best_weights

    def state_dict(self) -> dict[str, Any]:
        """Return all that the training needs to go on: nested dicts and lists of tensors and JSON values.

        The tensors are the live ones: write or copy them before training goes on. Sharded ones are gathered, so all
        workers have to call this together, and a state fits any number of workers, however they share the training.
        """
        return {
            "format": _FORMAT,
            "step": self.step,
            "samples_seen": self.samples_seen,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self._skipped_in_a_row,
            "precision": self.precision,
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "evaluations_without_improvement": self._evaluations_without_improvement,
            "history": list(self.history),
            "timing": list(self.timing),
            "model": whole_state(self.model),
            "average": self._average.state_dict() if self._average is not None else {},
            "best_model": self._best_weights,
            "optimizers": optimizer_states(self.model, self.optimizers),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned, in this or another process; the state is copied.

        Raises:
            ValueError: The state has another format, belongs to other optimizers, or lacks the average of the weights.
            RuntimeError: The state belongs to another model.
        """
        if state.get("format") != _FORMAT:
            raise ValueError(f"training state has format {state.get('format')!r} instead of {_FORMAT}")
        load_whole_state(self.model, state["model"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        load_optimizer_states(self.model, self.optimizers, state["optimizers"])
        self.step = state["step"]
        self.samples_seen = state["samples_seen"]
        self.skipped_steps = state["skipped_steps"]
        self._skipped_in_a_row = state["skipped_in_a_row"]
        self.precision = state["precision"]
        self.best_loss = state["best_loss"]
        self.best_step = state["best_step"]
        self._evaluations_without_improvement = state["evaluations_without_improvement"]
        self.history = list(state["history"])
        self.timing = list(state["timing"])
        self._best_weights = _copy(state["best_model"])

    def fit(
        self,
        *,
        on_checkpoint: Callable[[dict[str, Any]], None],
        on_progress: Callable[[dict[str, Any]], None],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Train until finished or stopped. All workers call it together; the global torch generator is reseeded.

        Args:
            on_checkpoint: Called on every rank with the state every ``checkpoint_every`` steps and when training ends
                or is stopped. Let one rank write it.
            on_progress: Called on rank 0 after every step with the step's entry in ``history``, but ``train_loss`` is
                called ``loss``, and with ``steps`` and ``tokens_per_second``.
            should_stop: Asked on every rank once a step. When it says yes on any, all finish the step, checkpoint and
                return.

        Raises:
            FloatingPointError: Loss or gradient is not finite and ``max_skipped`` steps in a row were skipped already,
                on every rank. The state is still that of the step before. Or the loss of an evaluation is not finite:
                then go on from the last checkpoint.
            RuntimeError: The workers restored different steps.
        """
        self._agree()
        self.model.train()
        with deterministic_kernels(self.device):
            while not self.finished:
                entry, wants_stop = self._train_step(should_stop)
                if self.step % self.config.eval_every == 0 or self.step == self.config.steps:
                    entry["valid_loss"] = self._evaluate()
                self.history.append(entry)
                if self.rank == 0:
                    report = {
                        "steps": self.config.steps,
                        "tokens_per_second": self.timing[-1]["tokens_per_second"],
                        **entry,
                    }
                    if "train_loss" in report:
                        report["loss"] = report.pop("train_loss")
                    on_progress(report)
                if wants_stop or self.finished or self.step % self.config.checkpoint_every == 0:
                    on_checkpoint(self.state_dict())
                if wants_stop:
                    return

    def _agree(self) -> None:
        """Let all workers begin from the same weights and precision, whatever machines they are on."""
        if self.world_size == 1:
            return
        lowest = torch.tensor([self.step, -self.step, self.precision == "bfloat16"], device=self.device)
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        first, last, all_bfloat16 = lowest.tolist()
        if first != -last:
            raise RuntimeError(f"the workers restored different steps, from {first} to {-last}")
        self.precision = "bfloat16" if all_bfloat16 else "float32"
        self._workers.equalise()
        if self._workers.needs_warm_up:
            ids = torch.from_numpy(self.train.batch(0, 1)).to(self.device)
            self._workers.backward(self._losses(ids, is_last=True).sum())

    def _train_step(self, should_stop: Callable[[], bool]) -> tuple[dict[str, Any], bool]:
        """Do one optimizer step; return its entry of the history, and whether some rank wants to stop."""
        began = time.perf_counter()
        config = self.config
        seed = np.random.SeedSequence([config.seed, self.step, self.rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))
        tokens = config.batch_size * self.train.sequence_length

        workers = self._workers
        workers.zero_gradients()
        parts = self._parts(self.train, self.samples_seen, config.batch_size, workers.calls_together)
        for number, (ids, share) in enumerate(parts, start=1):
            losses_BT = self._losses(ids, is_last=number == len(parts), **self._loss_settings)
            loss = losses_BT.sum() * share / tokens
            workers.backward(loss)
            workers.shared[0] += loss.detach()
        workers.shared[1] = float(should_stop())
        # All ranks have the same sums, so they all decide alike below.
        train_loss, stops, gradient_norm = workers.sum()
        factor = learning_rate_factor(self.step, config)
        entry: dict[str, Any] = {"step": self.step + 1, "samples_seen": self.samples_seen + config.batch_size}
        if math.isfinite(train_loss) and math.isfinite(gradient_norm):
            if 0.0 < config.gradient_clip < gradient_norm:
                workers.scale_gradients(config.gradient_clip / gradient_norm)
            self._change_weights(factor)
            self._skipped_in_a_row = 0
            entry |= {"train_loss": train_loss, "gradient_norm": gradient_norm}
        elif self._skipped_in_a_row < config.max_skipped:
            self.skipped_steps += 1
            self._skipped_in_a_row += 1
        else:
            skipped = f", and {self._skipped_in_a_row} before it were skipped" if self._skipped_in_a_row else ""
            raise FloatingPointError(
                f"step {self.step + 1}: loss {train_loss} and gradient norm {gradient_norm} must be finite{skipped}; "
                "lower muon_lr and adamw_lr, or look at the data"
            )
        self.step += 1
        self.samples_seen += config.batch_size
        seconds = time.perf_counter() - began
        self.timing.append({"step": self.step, "seconds": seconds, "tokens_per_second": tokens / seconds})
        entry |= {"learning_rate": factor * config.muon_lr, "skipped_steps": self.skipped_steps}
        return entry, stops > 0.0

    def _change_weights(self, factor: float) -> None:
        """Let the optimizers do a step at a part of their peak rates, and the average take in what they did."""
        for kind, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = factor * (self.config.muon_lr if kind == "muon" else self.config.adamw_lr)
            optimizer.step()
        if self._average is not None:
            self._average.update(self.step + 1 - self.skipped_steps)

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Return the valid loss in nats a token, and remember the weights if it is the lowest so far."""
        sequences = min(self.config.eval_sequences, len(self.valid))
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with self._average.in_model() if self._average is not None else nullcontext():
            self.model.eval()
            for ids, share in self._parts(self.valid, 0, sequences, self._workers.evaluates_together):
                losses_BT = self._losses(ids, is_last=True)
                total += share * losses_BT.sum(dtype=torch.float64)
            self.model.train()
            if self.world_size > 1:
                dist.all_reduce(total)
            loss = float(total) / (sequences * self.valid.sequence_length)
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"step {self.step}: valid loss {loss} must be finite; lower muon_lr and adamw_lr"
                )
            if self.best_loss is None or loss < self.best_loss:
                self.best_loss, self.best_step = loss, self.step
                self._best_weights = _copy(whole_state(self.model))
                self._evaluations_without_improvement = 0
            else:
                self._evaluations_without_improvement += 1
        return loss

    def _parts(self, order: SequenceOrder, start: int, size: int, together: bool) -> list[tuple[Tensor, float]]:
        return micro_batches(
            order,
            start,
            size,
            limit=self.config.micro_batch_size,
            rank=self.rank,
            world_size=self.world_size,
            device=self.device,
            together=together,
        )

    def _losses(self, ids: Tensor, is_last: bool, **settings: Any) -> Tensor:
        """Return the losses [b, T] of a micro-batch [b, T + 1]."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self._workers.losses(ids[:, :-1], ids[:, 1:], is_last=is_last, **settings)


def _copy(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}
