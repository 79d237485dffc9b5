"""Which model predicts WikiText-2 best after the same CPU time, the same tokens, or the same arithmetic.

    python -m tests.benchmarks.model --json model.json
    python -m tests.benchmarks.model --kind bytes --budget 240 --seeds 1
    python -m tests.benchmarks.model --unit tokens --budget 2e6

Every training is a process of its own with one thread; the seeds are interleaved, so that noise of the machine meets
all models. The learning rate follows the part of the budget that is used. CPU time is that of the training alone;
afterwards all of the valid split is scored in blocks of the context. With ``--json`` each training is written when it
ends and not repeated by the next call, which may then add seeds, budgets or models.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deconv_model.config import TrainingConfig
from deconv_model.language_model import LanguageModel
from deconv_model.model_summary import summarise
from deconv_model.optim import build_optimizers
from pipelines.report import plain_table
from tests.benchmarks.contenders import BASELINES, CONTENDERS, CONTEXT, OURS, Contender
from tests.benchmarks.machine import cpu_precision, describe_machine
from tests.benchmarks.wikitext import DATA, Split, load_wikitext, write_json

BATCH_TOKENS = 4096
WARMUP, CONSTANT_UNTIL, FINAL = 0.05, 0.4, 0.02
SEEDS = {240.0: 3, 1300.0: 2, 4000.0: 1}  # of each budget of CPU-seconds
UNITS = ("seconds", "tokens", "flops")


def train(name: str, seed: int, budget: float, unit: str, kind: Any, data: Path) -> dict[str, Any]:
    """Train one model until the budget is used; return what it cost and how well it predicts."""
    torch.set_num_threads(1)
    text = load_wikitext(kind, data)
    contender: Contender = CONTENDERS[name](kind)
    torch.manual_seed(seed)
    model = LanguageModel(contender.config)
    rates = {"muon": contender.muon_lr, "adamw": contender.adamw_lr}
    optimizers = build_optimizers(
        model, TrainingConfig(steps=1, muon_lr=rates["muon"], adamw_lr=rates["adamw"], weight_decay=0.05)
    )
    summary = summarise(contender.config)
    batches = _batches(text.train, contender.sequence_length, seed)
    began, tokens, steps, report = time.process_time(), 0, 0, 0.0
    while True:
        seconds = time.process_time() - began
        used = {"seconds": seconds, "tokens": tokens, "flops": 3.0 * summary.flops_per_token * tokens}[unit] / budget
        if used >= 1.0:
            break
        ids = next(batches)
        with cpu_precision():
            loss = model.token_losses(ids[:, :-1], ids[:, 1:]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer_name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[optimizer_name] * _schedule(used)
            optimizer.step()
        model.zero_grad()
        tokens += ids.numel() - len(ids)
        steps += 1
        if used >= report:
            print(f"{name}, seed {seed}: {used:.0%}, {tokens:,} tokens, loss {loss.item():.3f}", file=sys.stderr)
            report = used + 0.1
    bits_per_token = _evaluate(model, text.valid, CONTEXT[kind])
    return {
        "model": name,
        "kind": kind,
        "unit": unit,
        "budget": budget,
        "seed": seed,
        "valid_bits_per_byte": bits_per_token * len(text.valid.ids) / text.valid.size,
        "tokens": tokens,
        "steps": steps,
        "cpu_seconds": seconds,
        "teraflops": 3.0 * summary.flops_per_token * tokens / 1e12,
        "parameters": summary.parameters - summary.embedding_parameters,
    }


def _schedule(used: float) -> float:
    if used < WARMUP:
        return max(0.02, used / WARMUP)
    return 1.0 if used < CONSTANT_UNTIL else 1.0 - (1.0 - FINAL) * (used - CONSTANT_UNTIL) / (1.0 - CONSTANT_UNTIL)


def _batches(split: Split, length: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of ids, a new random offset and order of the windows each epoch."""
    generator = np.random.default_rng(seed)
    size = BATCH_TOKENS // length
    while True:
        offset = int(generator.integers(length))
        windows = generator.permutation((len(split.ids) - 1 - offset) // length)
        for first in range(0, len(windows) - size + 1, size):
            starts = offset + windows[first : first + size] * length
            yield torch.from_numpy(np.stack([split.ids[start : start + length + 1] for start in starts]))


@torch.no_grad()
def _evaluate(model: LanguageModel, split: Split, length: int) -> float:
    """Return the bits a token over all blocks of the context, the last one shorter."""
    model.eval()
    total = 0.0
    blocks = [split.ids[start : start + length + 1] for start in range(0, len(split.ids) - 1, length)]
    whole = [block for block in blocks if len(block) == length + 1]
    groups = [np.stack(whole[i : i + 8]) for i in range(0, len(whole), 8)] + [b[None] for b in blocks[len(whole) :]]
    for group in groups:
        ids = torch.from_numpy(group)
        with cpu_precision():
            total += float(model.token_losses(ids[:, :-1], ids[:, 1:]).sum(dtype=torch.float64))
    return total / math.log(2) / (len(split.ids) - 1)


def _table(results: list[dict[str, Any]]) -> str:
    rows = []
    for unit, kind, budget in sorted({(r["unit"], r["kind"], r["budget"]) for r in results}):
        here = [r for r in results if (r["unit"], r["kind"], r["budget"]) == (unit, kind, budget)]
        by_model = {m: [r for r in here if r["model"] == m] for m in CONTENDERS if any(r["model"] == m for r in here)}
        bits = {m: [r["valid_bits_per_byte"] for r in rs] for m, rs in by_model.items()}
        for m, rs in by_model.items():
            mean = float(np.mean(bits[m]))
            ours = f"{mean - float(np.mean(bits[OURS])):+.3f}" if OURS in bits else "-"
            rows.append(
                (
                    f"{budget:g} {unit}, {kind}",
                    m + (" (baseline)" if m in BASELINES else ""),
                    f"{mean:.3f}",
                    f"{min(bits[m]):.3f} to {max(bits[m]):.3f}",
                    str(len(rs)),
                    ours,
                    f"{np.mean([r['tokens'] for r in rs]) / 1e6:.2f}M",
                    f"{np.mean([r['teraflops'] for r in rs]):.1f}",
                    f"{np.mean([r['cpu_seconds'] for r in rs]):.0f}",
                    f"{rs[0]['parameters'] / 1e6:.2f}M",
                )
            )
    header = ("budget", "model", "bits/byte", "range", "seeds", "above ours", "tokens", "TFLOP", "CPU-s", "parameters")
    return plain_table(header, rows)


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--kind", choices=("subwords", "bytes"), default="subwords")
    parser.add_argument("--unit", choices=UNITS, default="seconds")
    parser.add_argument("--budget", type=float, action="append", help="default: 240, 1300 and 4000 seconds")
    parser.add_argument("--seeds", type=int, help="default: 3, 2 and 1 for these, else 1")
    parser.add_argument("--models", nargs="+", choices=CONTENDERS, default=[OURS, *BASELINES])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a child process is to train
    options = parser.parse_args()
    if options.one:
        print(json.dumps(train(**json.loads(options.one), kind=options.kind, data=options.data)))
        return
    load_wikitext(options.kind, options.data)
    known: dict[str, Any] = {"machine": describe_machine(), "results": []}
    if options.json is not None and options.json.exists():
        known = json.loads(options.json.read_text())
    done = {tuple(r[k] for k in ("model", "kind", "unit", "budget", "seed")) for r in known["results"]}
    for budget in options.budget or list(SEEDS):
        for seed in range(options.seeds or SEEDS.get(budget, 1)):
            for name in options.models:
                if (name, options.kind, options.unit, budget, seed) in done:
                    continue
                task = json.dumps({"name": name, "seed": seed, "budget": budget, "unit": options.unit})
                command = [sys.executable, "-m", "tests.benchmarks.model", "--one", task, "--kind", options.kind]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                child = subprocess.run(
                    [*command, "--data", options.data], stdout=subprocess.PIPE, check=True, env=environment
                )
                known["results"].append(json.loads(child.stdout))
                write_json(options.json, known)
    print(_table(known["results"]))


if __name__ == "__main__":
    main()
