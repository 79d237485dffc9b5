"""How much of WikiText-2 survives an autoencoder's latent, and how many wrong characters one mends.

    python -m tests.benchmarks.autoencoder --json autoencoder.json
    python -m tests.benchmarks.autoencoder --only vector --seconds 90

Three trainings, each with its budget of CPU-seconds on one thread: 64 tokens through 16 latents of 48 channels, 64
tokens through one vector of 768, and characters of which 30 % were replaced by random ones. The windows of the training
lie anywhere in the train split; accuracy and error rate are those of all whole windows of the valid split. The error
rate counts the places that differ, which is at least the edit distance. The learning rate follows the part of the
budget that is used; evaluation is not counted.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deconv_model.autoencoder import Autoencoder
from deconv_model.autoencoder_config import AutoencoderConfig, NoiseConfig
from deconv_model.noise import add_noise
from deconv_model.optim import build_optimizers
from deconv_model.training_config import TrainingConfig
from pipelines.report import plain_table
from tests.benchmarks.machine import cpu_precision, describe_machine
from tests.benchmarks.wikitext import BPE_IDS, BYTE_VALUES, DATA, load_wikitext, write_json

ADAMW_LR = 0.004
WARMUP, CONSTANT_UNTIL, FINAL = 0.03, 0.4, 0.02
RARE = 1e-4  # characters below this share of the train split become one


@dataclass(frozen=True)
class Recipe:
    """One training: what, for how long, and on how many windows a step."""

    config: AutoencoderConfig
    seconds: float
    batch_size: int
    muon_lr: float = 0.02
    noise: NoiseConfig = NoiseConfig()  # noqa: RUF009 (it is frozen)
    random_tokens: float = 0.0  # share of the training windows, inputs and targets alike: most ids are rare in the text


def recipes(characters: int) -> dict[str, Recipe]:
    """Return the recipes by name; ``characters`` is the size of the alphabet."""
    return {
        "spatial": Recipe(
            AutoencoderConfig(
                vocab_size=BPE_IDS,
                context_length=64,
                latent="spatial",
                latent_size=48,
                widths=(128, 192, 256),
                strides=(2, 2),
                blocks=0,
            ),
            seconds=120.0,
            batch_size=64,
            random_tokens=0.15,
        ),
        "vector": Recipe(
            AutoencoderConfig(
                vocab_size=BPE_IDS,
                context_length=64,
                latent="vector",
                latent_size=768,
                widths=(128, 192, 48),  # 16 positions x 48 are as wide as the vector: the map between is a rotation
                strides=(2, 2),
                blocks=0,
            ),
            seconds=600.0,
            batch_size=64,
            random_tokens=0.15,
        ),
        "characters": Recipe(
            AutoencoderConfig(
                vocab_size=characters,
                context_length=128,
                latent="spatial",
                latent_size=128,
                widths=(96, 160),
                strides=(2,),
                blocks=(0, 4),
            ),
            seconds=600.0,
            batch_size=64,
            muon_lr=0.014,
            noise=NoiseConfig(substitution=0.3),
        ),
    }


def character_splits(data: Path) -> tuple[Tensor, Tensor, int]:
    """Return the ids of the characters of the train and of the valid split, and the size of the alphabet."""
    text = load_wikitext("bytes", data)
    train, valid = (_code_points(split.ids) for split in (text.train, text.valid))
    counts = np.bincount(train)
    by_count = np.argsort(-counts, kind="stable")
    common = by_count[counts[by_count] >= RARE * len(train)]
    ids = np.full(max(train.max(), valid.max()) + 1, len(common))
    ids[common] = np.arange(len(common))
    return torch.from_numpy(ids[train]), torch.from_numpy(ids[valid]), len(common) + 1


def _code_points(ids: NDArray[np.int64]) -> NDArray[np.uint32]:
    text = bytes(ids[ids < BYTE_VALUES].astype(np.uint8)).decode()
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


def train(name: str, recipe: Recipe, splits: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Train one autoencoder until its budget is used; return what it cost and what it can do."""
    config = recipe.config
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Autoencoder(config)
    rates = {"muon": recipe.muon_lr, "adamw": ADAMW_LR}
    optimizers = build_optimizers(
        model, TrainingConfig(steps=1, muon_lr=recipe.muon_lr, adamw_lr=ADAMW_LR, weight_decay=0.0)
    )
    places_T = torch.arange(config.context_length)
    valid = splits[1]
    windows = valid[: len(valid) // config.context_length * config.context_length].view(-1, config.context_length)
    some_windows = windows[:: max(1, len(windows) // 256)]
    seconds, steps, report, curve = 0.0, 0, 0.0, []
    while seconds < recipe.seconds:
        began = time.process_time()
        starts = torch.randint(len(splits[0]) - config.context_length + 1, (recipe.batch_size, 1), generator=generator)
        random = NoiseConfig(substitution=recipe.random_tokens)
        clean = add_noise(splits[0][starts + places_T], random, config.vocab_size, generator)
        with cpu_precision():
            noisy = add_noise(clean, recipe.noise, config.vocab_size, generator)
            loss = model.token_losses(noisy, clean).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer_name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[optimizer_name] * _schedule(seconds / recipe.seconds)
            optimizer.step()
        model.zero_grad()
        steps += 1
        seconds += time.process_time() - began
        if seconds >= report:
            right, _ = _accuracy(model, some_windows, recipe.noise)
            curve.append((round(seconds, 1), round(right, 4)))
            print(
                f"{name}: {seconds:.0f} of {recipe.seconds:g} s, step {steps}, loss {loss.item():.3f}, "
                f"{right:.1%} right on {len(some_windows)} windows of valid",
                file=sys.stderr,
                flush=True,
            )
            report += recipe.seconds / 20
    right, right_before = _accuracy(model, windows, recipe.noise)
    return {
        "recipe": name,
        "accuracy": right,
        "error_rate": 1.0 - right,
        "error_rate_of_input": 1.0 - right_before,
        "cpu_seconds": seconds,
        "steps": steps,
        "positions": steps * recipe.batch_size * config.context_length,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "embedding_parameters": model.embedding.numel(),
        "numbers_per_window": config.latent_size * (config.context_length // config.total_stride)
        if config.latent == "spatial"
        else config.latent_size,
        "curve": curve,
        "config": config.to_dict(),
    }


def _accuracy(model: Autoencoder, windows: Tensor, noise: NoiseConfig) -> tuple[float, float]:
    """Return the share of the places that the model gets right, and of those that are right in its input."""
    generator = torch.Generator().manual_seed(2)
    right = right_before = 0
    for clean in windows.split(32):
        noisy = add_noise(clean, noise, model.config.vocab_size, generator)
        with cpu_precision():
            right += int((model.denoise(noisy) == clean).sum())
        right_before += int((noisy == clean).sum())
    return right / windows.numel(), right_before / windows.numel()


def _schedule(used: float) -> float:
    if used < WARMUP:
        return used / WARMUP
    return 1.0 if used < CONSTANT_UNTIL else 1.0 - (1.0 - FINAL) * (used - CONSTANT_UNTIL) / (1.0 - CONSTANT_UNTIL)


def _table(results: list[dict[str, Any]]) -> str:
    rows = [
        (
            result["recipe"],
            f"{result['accuracy']:.2%}",
            f"{result['error_rate']:.4f}",
            f"{result['error_rate_of_input']:.4f}",
            str(result["numbers_per_window"]),
            f"{result['cpu_seconds']:.0f}",
            str(result["steps"]),
            f"{result['positions'] / 1e6:.2f}M",
            f"{result['parameters'] / 1e6:.2f}M",
            f"{result['embedding_parameters'] / 1e6:.2f}M",
        )
        for result in results
    ]
    header = (
        "recipe",
        "right",
        "error rate",
        "of input",
        "latent",
        "CPU-s",
        "steps",
        "positions",
        "parameters",
        "embedding",
    )
    return plain_table(header, rows)


def main() -> None:
    """Train and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--only", choices=("spatial", "vector", "characters"))
    parser.add_argument("--seconds", type=float, help="CPU-seconds of each training, instead of its own budget")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    subwords = load_wikitext("subwords", options.data)
    tokens = torch.from_numpy(subwords.train.ids), torch.from_numpy(subwords.valid.ids)
    train_characters, valid_characters, alphabet = character_splits(options.data)
    results = []
    for name, recipe in recipes(alphabet).items():
        if options.only in (None, name):
            chosen = recipe if options.seconds is None else replace(recipe, seconds=options.seconds)
            splits = (train_characters, valid_characters) if name == "characters" else tokens
            results.append(train(name, chosen, splits))
            write_json(options.json, {"machine": describe_machine(), "results": results})
    print(_table(results))


if __name__ == "__main__":
    main()
