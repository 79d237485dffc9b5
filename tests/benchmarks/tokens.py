"""How fast the tokens step is: against one plain process with either engine, on the same text in the same run.

    python -m tests.benchmarks.tokens --repeats 5 --json tokens.json

The text is the demo's corpus. A repeat runs the contenders one after another, so that noise of the machine meets all of
them; ratios are taken within a repeat. Ray is warm: its start is paid once a run and is shown apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pipelines.cluster import ensure_ray
from pipelines.config import load_config
from pipelines.documents import documents_of, shard_uri
from pipelines.report import plain_table
from pipelines.runners import run_step
from pipelines.steps import plan, tokens
from pipelines.store import OutputFolder, StepOutput, Storage


def plain_process(corpus: StepOutput, encode: Callable[[list[str]], object]) -> int:
    """Read and encode all documents in this process; return the bytes of their text."""
    manifest = corpus.read_json("manifest.json")
    total = 0
    for shard in manifest["shards"]:
        texts = [text for _, text in documents_of(shard_uri(corpus, shard["name"]), manifest)]
        encode(texts)
        total += sum(len(text.encode()) for text in texts)
    return total


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # One thread for each contender that is one process.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(folder)
        specs = plan(load_config())
        began = time.perf_counter()
        ensure_ray()
        start = time.perf_counter() - began
        corpus, tokenizer = (run_step(spec, storage).output for spec in specs[:2])
        file = tokenizer.local("tokenizer.json")
        inputs = {"corpus": corpus, "tokenizer": tokenizer}

        def step(repeat: int) -> None:
            tokens.run(specs[2].config, inputs, OutputFolder(f"{folder}/tokens-{repeat:012x}"))

        contenders: dict[str, Callable[[int], object]] = {
            "tokenizers, one process": lambda _: plain_process(corpus, lambda t: tokens.encode_reference(file, t)),
            "gigatoken, one process": lambda _: plain_process(corpus, lambda t: tokens.encode_fast(file, t)),
            "tokens step on Ray": step,
        }
        megabytes = plain_process(corpus, lambda texts: None) / 1e6
        step(options.repeats)  # warms the workers
        speeds: dict[str, list[float]] = {name: [] for name in contenders}
        for repeat in range(options.repeats):
            for name, run in contenders.items():
                began = time.perf_counter()
                run(repeat)
                speeds[name].append(megabytes / (time.perf_counter() - began))

    base = speeds["gigatoken, one process"]
    rows = []
    for name, values in speeds.items():
        ratios = [value / other for value, other in zip(values, base, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append([name, f"{statistics.median(values):.1f}", f"{min(values):.1f} to {max(values):.1f}", spread])
    print(f"{megabytes:.1f} MB of text, {os.cpu_count()} CPUs ({platform.machine()}), {options.repeats} repeats")
    print(plain_table(["", "MB/s", "spread", "of gigatoken alone"], rows))
    print(f"Ray started in {start:.1f} s")
    if options.json:
        facts = {"megabytes": megabytes, "cpus": os.cpu_count(), "ray_start_s": start, "megabytes_a_second": speeds}
        options.json.write_text(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
