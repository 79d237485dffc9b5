"""A model and token shards small enough to train in milliseconds, and processes to train them in."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from deconv_model.config import TrainingConfig
from deconv_model.data import SequenceOrder, TokenStream
from deconv_model.training import Trainer

torch.set_num_threads(1)  # nothing here is large enough for two

VOCABULARY = 24
CONTEXT = 8
END = 0

Documents = Sequence[Sequence[int]]

# 7 sequences an epoch: steps cross the ends of epochs, and a batch is no whole number of micro-batches.
CONFIG = TrainingConfig(
    steps=11,
    batch_size=5,
    micro_batch_size=2,
    seed=3,
    precision="float32",
    eval_every=3,
    eval_sequences=4,
    patience=0,
    checkpoint_every=4,
)
# Evaluations at 2, 4, 6, ... of a model that is driven away: the loss rises and patience runs out long before the end.
EARLY = replace(CONFIG, steps=40, muon_lr=0.9, adamw_lr=0.9, warmup=0.0, constant_until=0.0, eval_every=2, patience=3)


class TinyModel(nn.Module):
    """Embedding, depthwise causal taps, a hidden layer with dropout, tied output: one parameter of every kind."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embedding = nn.Embedding.from_pretrained(torch.randn(VOCABULARY, 12, generator=generator), freeze=False)
        self.taps = nn.Parameter(torch.randn(12, 3, generator=generator))
        self.gain = nn.Parameter(torch.ones(12))
        self.up = nn.Parameter(torch.randn(20, 12, generator=generator) / 4)
        self.down = nn.Parameter(torch.randn(12, 20, generator=generator) / 4)
        self.dropout = dropout

    def token_losses(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        x_BTC = self.embedding(ids_BT)
        padded = F.pad(x_BTC, (0, 0, 2, 0))
        x_BTC = sum(padded[:, i : i + x_BTC.shape[1]] * self.taps[:, i] for i in range(3)) * self.gain
        hidden = F.dropout(torch.tanh(F.linear(x_BTC, self.up)), self.dropout, self.training)
        logits = F.linear(F.linear(hidden, self.down), self.embedding.weight).float()
        return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), reduction="none").view(targets_BT.shape)


class TinyBlock(nn.Module):
    """A residual block with dropout that counts its calls."""

    def __init__(self, hidden: int, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(hidden, 12, generator=generator) / 4)
        self.down = nn.Parameter(torch.randn(12, hidden, generator=generator) / 4)
        self.dropout = dropout
        self.calls = 0

    def forward(self, x_BTC: Tensor, state: None = None) -> Tensor:
        self.calls += 1
        hidden = F.silu(F.linear(F.rms_norm(x_BTC, (12,)), self.up))
        return x_BTC + F.dropout(F.linear(hidden, self.down), self.dropout, self.training)


class TinyStack(nn.Module):
    """Repeated blocks between an embedding and a softmax of its own, in which labels can be smoothed."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embedding = nn.Parameter(torch.randn(VOCABULARY, 12, generator=generator))
        self.blocks = nn.ModuleList(TinyBlock(hidden, dropout, generator) for hidden in (20, 20, 7))
        self.gain = nn.Parameter(torch.ones(12))
        self.output_embedding = nn.Parameter(torch.randn(VOCABULARY, 12, generator=generator) / 4)

    def token_losses(self, ids_BT: Tensor, targets_BT: Tensor, label_smoothing: float = 0.0) -> Tensor:
        x_BTC = F.embedding(ids_BT, self.embedding)
        for block in self.blocks:
            x_BTC = block(x_BTC, None)
        logits = F.linear(x_BTC * self.gain, self.output_embedding).float().flatten(0, 1)
        losses = F.cross_entropy(logits, targets_BT.flatten(), reduction="none", label_smoothing=label_smoothing)
        return losses.view(targets_BT.shape)


def write_shards(folder: Path, splits: dict[str, Sequence[Documents]], dtype: str = "uint16") -> Path:
    """Write each split's shards, given as documents without their end token; words and bytes are made up."""
    manifest: dict[str, Any] = {"format": 1, "dtype": dtype, "vocab_size": VOCABULARY, "end_of_document": END}
    manifest["splits"] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for split, shards in splits.items():
        entries = []
        for number, documents in enumerate(shards):
            name = f"{split}-{number:05d}-of-{len(shards):05d}"
            ids = [token for document in documents for token in [*document, END]]
            rows = [[len(document) + 1, 3 * len(document), len(document) // 2 + 1] for document in documents]
            table = np.array(rows, dtype=np.int64).reshape(-1, 3)
            np.save(folder / f"{name}.npy", np.array(ids, dtype=dtype))
            np.save(folder / f"{name}.docs.npy", table)
            tokens, size, words = table.sum(axis=0).tolist()
            entries.append({"name": name, "documents": len(rows), "tokens": tokens, "bytes": size, "words": words})
        manifest["splits"][split] = {"shards": entries}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def write_tiny_shards(folder: Path) -> Path:
    """Write 7 sequences an epoch of a learnable train split and 5 sequences of a valid split."""
    generator = np.random.default_rng(5)

    def document(length: int) -> list[int]:
        steps = generator.integers(1, 3, size=length)
        return (1 + np.cumsum(steps) % (VOCABULARY - 1)).tolist()

    train = [[document(20), document(9)], [], [document(34)]]
    return write_shards(folder, {"train": train, "valid": [[document(43)]]})


def tiny_trainer(
    folder: Path, config: TrainingConfig, model: nn.Module | None = None, rank: int = 0, world_size: int = 1
) -> Trainer:
    """Make a trainer on the shards of a folder."""
    train = SequenceOrder(TokenStream(folder, "train"), CONTEXT, seed=config.seed)
    valid = SequenceOrder(TokenStream(folder, "valid"), CONTEXT, seed=config.seed, shuffle=False)
    return Trainer(model or TinyModel(dropout=0.2), config, train, valid, rank=rank, world_size=world_size)


def ignore(_: object) -> None:
    """Do nothing."""


def assert_same(left: Any, right: Any, place: str = "state") -> None:
    """Assert that two states hold the same values, bit for bit."""
    assert type(left) is type(right), place
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype, place
        assert torch.equal(left, right), place
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), place
        for key in left:
            assert_same(left[key], right[key], f"{place}.{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), place
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{place}.{index}")
    else:
        assert left == right, place


class Broken(TinyModel):
    """Gives a loss or a gradient that is not finite in some calls of ``token_losses``, counted from 1."""

    def __init__(self, bad_calls: Container[int], what: str) -> None:
        super().__init__(dropout=0.2)
        self.bad_calls, self.what, self.calls = bad_calls, what, 0

    def token_losses(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        losses = super().token_losses(ids_BT, targets_BT)
        self.calls += 1
        if self.calls not in self.bad_calls:
            return losses
        if self.what == "loss":
            return losses * float("nan")
        return losses + torch.sqrt((self.gain - self.gain).sum())  # sqrt(0): a finite loss with an infinite slope


def train(trainer: Trainer, **callbacks: Any) -> Trainer:
    """Train with callbacks that do nothing unless given; return the trainer."""
    given: dict[str, Any] = {"on_checkpoint": ignore, "on_progress": ignore, **callbacks}
    trainer.fit(**given)
    return trainer


def stop_after(trainer: Trainer, step: int) -> Callable[[], bool]:
    """Return a ``should_stop`` that lets the training end with this step."""
    return lambda: trainer.step >= step - 1


def assert_same_training(left: Trainer, right: Trainer) -> None:
    """Assert that two trainings are the same, bit for bit, in all but the time they took."""
    states = left.state_dict(), right.state_dict()
    first, second = ([entry["step"] for entry in state.pop("timing")] for state in states)
    assert first == second
    assert_same(*states)


def forget(module: nn.Module) -> None:
    """Overwrite a module's own parameters."""
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            parameter.fill_(7.0)


def run_ranks(world_size: int, work: Callable[..., None], folder: Path, *args: Any) -> None:
    """Run ``work(rank, world_size, folder, *args)`` in processes of one gloo group; errors propagate."""
    meeting = Path(tempfile.mkdtemp(dir=folder)) / "meeting"
    # Imported once for all processes. Optimizers import the last one when they are made.
    mp.get_context("forkserver").set_forkserver_preload([__name__, "pytest", "torch._dynamo"])
    mp.start_processes(_enter, (world_size, meeting, work, folder, args), nprocs=world_size, start_method="forkserver")


def _enter(
    rank: int, world_size: int, meeting: Path, work: Callable[..., None], folder: Path, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    work(rank, world_size, folder, *args)
    dist.destroy_process_group()
