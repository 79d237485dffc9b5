"""How many tokens a second each model generates at the end of a long text, with its cache.

    python -m tests.benchmarks.generation --json generation.json

Each model reads all but the end of a text as long as its context and generates that greedily; counted is the speed over
the last 64 tokens, where a cache of keys and values is longest. The speed at the end of a text of a quarter of the
context is beside it: for a model without attention they should be the same. A repeat measures all models one after
another; ratios are taken within it. One thread on a CPU; a GPU is used where there is one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from deconv_model.language_model import LanguageModel
from pipelines.report import plain_table
from tests.benchmarks.contenders import BASELINES, CONTENDERS, CONTEXT, OURS
from tests.benchmarks.machine import clock, describe_machine, device, wait
from tests.benchmarks.wikitext import Kind, write_json

BATCHES = (1, 16)
MEASURED = 64  # tokens: a multiple of all strides


def new_model(name: str, kind: Kind) -> LanguageModel:
    """Return a model with random weights of which none is zero, in evaluation mode."""
    torch.manual_seed(0)
    model = LanguageModel(CONTENDERS[name](kind).config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return model.to(device()).eval()


@torch.inference_mode()
def speed(model: LanguageModel, batch: int, position: int) -> float:
    """Return the tokens a second, of all sequences together, over the tokens that end at a position."""
    prompt = torch.randint(0, model.config.vocab_size, (batch, position - MEASURED - 8), device=device())
    logits, state = model.prefill(prompt)
    for _ in range(8):
        logits = model.step(logits.argmax(dim=-1), state)
    wait()
    began = clock()
    for _ in range(MEASURED):
        logits = model.step(logits.argmax(dim=-1), state)
    wait()
    return batch * MEASURED / (clock() - began)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--models", nargs="+", choices=CONTENDERS, default=[OURS, "hourglass, no attention", *BASELINES]
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    known: dict[str, Any] = {"machine": describe_machine(), "results": []}
    kinds: tuple[Kind, ...] = ("subwords", "bytes")
    for kind in kinds:
        models = {name: new_model(name, kind) for name in options.models}
        for repeat in range(options.repeats):
            for batch in BATCHES:
                for name, model in models.items():
                    result = {"model": name, "kind": kind, "batch": batch, "repeat": repeat}
                    for place, position in (("early", CONTEXT[kind] // 4), ("end", CONTEXT[kind])):
                        result[place] = speed(model, batch, position)
                    known["results"].append(result)
            write_json(options.json, known)
            print(f"{kind}, repeat {repeat + 1}/{options.repeats}", file=sys.stderr)
    print(known["machine"])
    print(_table(known["results"]))


def _table(results: list[dict[str, Any]]) -> str:
    rows = []
    for kind, batch, name in dict.fromkeys((r["kind"], r["batch"], r["model"]) for r in results):
        group = [r for r in results if (r["kind"], r["batch"]) == (kind, batch)]
        here = [r for r in group if r["model"] == name]
        ours = {r["repeat"]: r["end"] for r in group if r["model"] == OURS}
        ratios = [ours[r["repeat"]] / r["end"] for r in here if ours]
        flat = [r["end"] / r["early"] for r in here]
        rows.append(
            (
                f"{kind}, batch {batch}, {name}",
                f"{statistics.median(r['end'] for r in here):,.0f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "-",
                f"{statistics.median(flat):.2f} ({min(flat):.2f} to {max(flat):.2f})",
            )
        )
    return plain_table(("model", "tokens/s at the end", "hourglass is faster by", "end / first quarter"), rows)


if __name__ == "__main__":
    main()
