"""The training loop and its state, for one process or a process group.

A run that is stopped anywhere and goes on from its state ends with the same weights, bit for bit, given the same number
of workers, threads a worker and kind of machine. What makes that so:

- The samples of a step follow from ``samples_seen`` (:mod:`deconv_model.data`), the learning rate from the step, and
  the dropout from (seed, step, rank), drawn anew each step. No random generator has a state to save.
- Gradients of all workers are summed by one all-reduce of one flat buffer. (``DistributedDataParallel`` rearranges its
  buckets after the first step after a start, and with them the order of summation.)
- Losses are divided by the tokens of the global batch, so the gradient is the same, up to rounding, for any number of
  workers, and so are the samples in it.

Shape legend: B sequences, T tokens of context.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from deconv_model.config import TrainingConfig
from deconv_model.data import SequenceOrder
from deconv_model.numerics import ResolvedPrecision, deterministic_kernels, resolve_precision
from deconv_model.optim import build_optimizers, learning_rate_factor, load_optimizer_states, optimizer_states

_FORMAT = 1


class TokenLossModel(Protocol):
    """What training needs of a model besides being an ``nn.Module``."""

    def token_losses(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the cross-entropy of each target as float32 [B, T], in nats."""
        ...


class Trainer:
    """Trains a model; its state says where the training is.

    Every worker makes a Trainer of the same model, configuration and data. A step is one optimizer step over a global
    batch. Every ``eval_every`` steps and at the last one, the first ``eval_sequences`` sequences of ``valid`` are
    evaluated; training ends after ``steps`` or when ``patience`` evaluations in a row brought no lower loss.

    Args:
        model: An ``nn.Module`` with ``token_losses`` (:class:`TokenLossModel`), parameters in float32. It is moved to
            ``device``, and its gradients from now on live in the Trainer's buffer: leave ``zero_grad`` alone.
        config: How to train.
        train: Order of the training sequences.
        valid: Order of the evaluation sequences, unshuffled.
        rank: This worker's place in the default process group.
        world_size: Workers in that group; 1 needs no group.
        device: Where to compute.

    Attributes:
        step: Optimizer steps done.
        samples_seen: Sequences trained on, by all workers together: where ``train`` goes on.
        precision: Of the matrix products; part of the state, so a run goes on as it began on any machine.
        best_loss: Lowest valid loss so far, nats a token; ``None`` before the first evaluation.
        best_step: Its step.
        history: One dict a step: ``step``, ``samples_seen``, ``train_loss``, ``learning_rate`` (Muon's),
            ``gradient_norm`` (before clipping) and, when evaluated, ``valid_loss``. The same for the same run.
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
        self.optimizers = build_optimizers(model, config)
        self.step = 0
        self.samples_seen = 0
        self.best_loss: float | None = None
        self.best_step = 0
        self.history: list[dict[str, Any]] = []
        self.timing: list[dict[str, Any]] = []
        self._best_weights: dict[str, Tensor] = {}
        self._evaluations_without_improvement = 0

        # Gradients, loss and the wish to stop travel in one all-reduce; autograd adds to the views in place.
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        sizes = [parameter.numel() for parameter in parameters]
        self._buffer = torch.zeros(sum(sizes) + 2, dtype=torch.float32, device=device)
        self._gradient, self._shared = self._buffer[:-2], self._buffer[-2:]
        for parameter, view in zip(parameters, self._gradient.split(sizes), strict=True):
            parameter.grad = view.view_as(parameter)

    @property
    def finished(self) -> bool:
        """Whether all steps are done or early stopping has ended the training."""
        patience = self.config.patience
        return self.step >= self.config.steps or 0 < patience <= self._evaluations_without_improvement

    def best_weights(self) -> dict[str, Tensor]:
        """Return the model's ``state_dict`` at the lowest valid loss so far, on the CPU.

        Raises:
            RuntimeError: Nothing was evaluated yet.
        """
        if self.best_loss is None:
            raise RuntimeError("there are no best weights before the first evaluation")
        return self._best_weights

    def state_dict(self) -> dict[str, Any]:
        """Return all that the training needs to go on: nested dicts and lists of tensors and JSON values.

        The tensors are the live ones: write or copy them before training goes on.
        """
        return {
            "format": _FORMAT,
            "step": self.step,
            "samples_seen": self.samples_seen,
            "precision": self.precision,
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "evaluations_without_improvement": self._evaluations_without_improvement,
            "history": list(self.history),
            "timing": list(self.timing),
            "model": self.model.state_dict(),
            "best_model": self._best_weights,
            "optimizers": optimizer_states(self.model, self.optimizers),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned, in this or another process; the state is copied.

        Raises:
            ValueError: The state has another format or belongs to other optimizers.
            RuntimeError: The state belongs to another model.
        """
        if state.get("format") != _FORMAT:
            raise ValueError(f"training state has format {state.get('format')!r} instead of {_FORMAT}")
        self.model.load_state_dict(state["model"])
        load_optimizer_states(self.model, self.optimizers, state["optimizers"])
        self.step = state["step"]
        self.samples_seen = state["samples_seen"]
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
            on_progress: Called on rank 0 after every step with ``step``, ``steps``, ``loss``, ``tokens_per_second``,
                ``learning_rate``, ``gradient_norm`` and, when evaluated, ``valid_loss``.
            should_stop: Asked on every rank once a step. When it says yes on any, all finish the step, checkpoint and
                return.

        Raises:
            FloatingPointError: Loss or gradient is not finite, on every rank. The state is still that of the step
                before, unless it is the loss of an evaluation: then go on from the last checkpoint.
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
        for parameter in self.model.parameters():
            dist.broadcast(parameter.data, src=0)

    def _train_step(self, should_stop: Callable[[], bool]) -> tuple[dict[str, Any], bool]:
        """Do one optimizer step; return its entry of the history, and whether some rank wants to stop."""
        began = time.perf_counter()
        config = self.config
        seed = np.random.SeedSequence([config.seed, self.step, self.rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))
        tokens = config.batch_size * self.train.sequence_length

        self._buffer.zero_()
        for losses_BT in self._losses(self.train, self.samples_seen, config.batch_size):
            loss = losses_BT.sum() / tokens
            loss.backward()
            self._shared[0] += loss.detach()
        self._shared[1] = float(should_stop())
        if self.world_size > 1:
            dist.all_reduce(self._buffer)
        # One wait for the device. All ranks have the same sums, so they all decide alike below.
        norm = torch.linalg.vector_norm(self._gradient)
        train_loss, stops, gradient_norm = torch.cat((self._shared, norm[None])).tolist()
        if not (math.isfinite(train_loss) and math.isfinite(gradient_norm)):
            raise FloatingPointError(
                f"step {self.step + 1}: loss {train_loss} and gradient norm {gradient_norm} must be finite; "
                "lower muon_lr and adamw_lr, or look at the data"
            )
        if 0.0 < config.gradient_clip < gradient_norm:
            self._gradient.mul_(config.gradient_clip / gradient_norm)

        factor = learning_rate_factor(self.step, config)
        for kind, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = factor * (config.muon_lr if kind == "muon" else config.adamw_lr)
            optimizer.step()
        self.step += 1
        self.samples_seen += config.batch_size
        seconds = time.perf_counter() - began
        self.timing.append({"step": self.step, "seconds": seconds, "tokens_per_second": tokens / seconds})
        entry = {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "train_loss": train_loss,
            "learning_rate": factor * config.muon_lr,
            "gradient_norm": gradient_norm,
        }
        return entry, stops > 0.0

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Return the valid loss in nats a token, and remember the weights if it is the lowest so far."""
        sequences = min(self.config.eval_sequences, len(self.valid))
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.model.eval()
        for losses_BT in self._losses(self.valid, 0, sequences):
            total += losses_BT.sum(dtype=torch.float64)
        self.model.train()
        if self.world_size > 1:
            dist.all_reduce(total)
        loss = float(total) / (sequences * self.valid.sequence_length)
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {self.step}: valid loss {loss} must be finite; lower muon_lr and adamw_lr")
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step = loss, self.step
            self._best_weights = _copy(self.model.state_dict())
            self._evaluations_without_improvement = 0
        else:
            self._evaluations_without_improvement += 1
        return loss

    def _losses(self, order: SequenceOrder, start: int, size: int) -> Iterator[Tensor]:
        """Yield the losses of this rank's share of a global batch, [b, T] nats, one micro-batch at a time."""
        ids = torch.from_numpy(order.batch(start, size, self.rank, self.world_size)).to(self.device)
        for first in range(0, len(ids), self.config.micro_batch_size):
            part = ids[first : first + self.config.micro_batch_size]
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
                losses_BT = cast(TokenLossModel, self.model).token_losses(part[:, :-1], part[:, 1:])
            yield losses_BT


def _copy(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}
