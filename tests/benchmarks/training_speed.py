"""How many tokens a second each model is trained with: forward, backward and optimizers, and the memory at the peak.

    python -m tests.benchmarks.training_speed --json training_speed.json

A repeat measures all models one after another, so that noise of the machine meets all of them; ratios to the hourglass
are taken within a repeat. Each measurement is a process of its own, with one thread on a CPU; a GPU is used where there
is one. Time is CPU time on a CPU, else that of a clock. ``step / product`` is the time of a step beside that of its
matrix products alone at the speed of one large product, the physical limit.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from deconv_model.config import TrainingConfig
from deconv_model.language_model import LanguageModel
from deconv_model.model_summary import summarise
from deconv_model.numerics import resolve_precision
from deconv_model.optim import build_optimizers
from pipelines.report import plain_table
from tests.benchmarks.contenders import BASELINES, CONTENDERS, OURS
from tests.benchmarks.machine import clock, describe_machine, device, wait
from tests.benchmarks.wikitext import write_json

BATCH_TOKENS = 4096
WARM_STEPS, STEPS = 2, 8


def measure(name: str, kind: Any) -> dict[str, float]:
    """Train on random tokens; return the speed and what it takes."""
    torch.set_num_threads(1)
    contender = CONTENDERS[name](kind)
    length = contender.sequence_length
    torch.manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = LanguageModel(contender.config).to(device())
    optimizers = build_optimizers(model, TrainingConfig(steps=1))
    ids = torch.randint(0, contender.config.vocab_size, (BATCH_TOKENS // length, length + 1), device=device())
    fast = resolve_precision("auto", device()) == "bfloat16"

    def step() -> None:
        with torch.autocast(device().type, dtype=torch.bfloat16, enabled=fast):
            loss = model.token_losses(ids[:, :-1], ids[:, 1:]).mean()
        loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
        model.zero_grad()

    for _ in range(WARM_STEPS):
        step()
    wait()
    began = clock()
    for _ in range(STEPS):
        step()
    wait()
    seconds = (clock() - began) / STEPS
    memory = (
        torch.cuda.max_memory_allocated()
        if device().type == "cuda"
        else 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    )
    summary = summarise(contender.config)
    flops = 3.0 * summary.flops_per_token * BATCH_TOKENS
    return {
        "tokens_per_second": BATCH_TOKENS / seconds,
        "milliseconds": 1e3 * seconds,
        "megabytes": memory / 1e6,
        "gigaflops": flops / 1e9,
        "step_over_product": seconds / (flops / _product_speed()),
        "parameters": summary.parameters - summary.embedding_parameters,
    }


def _product_speed() -> float:
    """Return the FLOP/s of one large matrix product in the precision of the training."""
    dtype = torch.bfloat16 if resolve_precision("auto", device()) == "bfloat16" else torch.float32
    size = 1024 if device().type == "cpu" else 8192
    a, b = (torch.randn(size, size, dtype=dtype, device=device()) for _ in range(2))
    a @ b
    wait()
    began, count = clock(), 10
    for _ in range(count):
        a @ b
    wait()
    return 2.0 * size**3 * count / (clock() - began)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=("subwords", "bytes"), action="append", help="default: both")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=CONTENDERS, default=[OURS, *BASELINES])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.kind[0])))
        return
    known: dict[str, Any] = {"machine": describe_machine(), "results": []}
    for kind in options.kind or ["subwords", "bytes"]:
        for repeat in range(options.repeats):
            for name in options.models:
                command = [sys.executable, "-m", "tests.benchmarks.training_speed", "--one", name, "--kind", kind]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                child = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
                known["results"].append({"model": name, "kind": kind, "repeat": repeat, **json.loads(child.stdout)})
                write_json(options.json, known)
                print(f"{kind}, repeat {repeat + 1}/{options.repeats}: {name}", file=sys.stderr)
    print(known["machine"])
    print(_table(known["results"]))


def _table(results: list[dict[str, Any]]) -> str:
    rows = []
    for kind, name in dict.fromkeys((r["kind"], r["model"]) for r in results):
        here = [r for r in results if (r["kind"], r["model"]) == (kind, name)]
        ours = {r["repeat"]: r for r in results if (r["kind"], r["model"]) == (kind, OURS)}
        ratios = [ours[r["repeat"]]["tokens_per_second"] / r["tokens_per_second"] for r in here if ours]
        middle = {key: statistics.median(r[key] for r in here) for key in here[0] if key not in ("model", "kind")}
        rows.append(
            (
                f"{kind}, {name}",
                f"{middle['tokens_per_second']:,.0f}",
                f"{middle['milliseconds']:,.0f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "-",
                f"{middle['megabytes']:,.0f}",
                f"{middle['gigaflops']:.0f}",
                f"{middle['step_over_product']:.2f}",
                f"{middle['parameters'] / 1e6:.2f}M",
            )
        )
    header = ("model", "tokens/s", "ms a step", "hourglass is faster by", "peak MB", "GFLOP", "step / product", "size")
    return plain_table(header, rows)


if __name__ == "__main__":
    main()
