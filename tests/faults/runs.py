"""Real runs of the command line tool on a small corpus, to be killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipelines.processes import descendants

CONFIG: dict[str, Any] = {
    "corpus": {"valid_fraction": 0.1, "test_fraction": 0.1},
    "tokenizer": {"vocab_size": 512},
    "model": {
        "context_length": 32,
        "dropout": 0.1,
        "levels": [
            {
                "width": 32,
                "encoder": {"layers": 1, "hidden": 32},
                "decoder": {"layers": 1, "hidden": 32},
            },
            {"width": 32, "stride": 2, "encoder": {"layers": 1, "hidden": 32, "heads": 2}},
        ],
    },
    "train": {
        "steps": 120,
        "batch_size": 16,
        "micro_batch_size": 4,
        "eval_every": 7,
        "eval_sequences": 8,
        "patience": 0,
        "checkpoint_every": 5,
        "workers": 2,
    },
    "evaluate": {"samples": 1, "sample_tokens": 4, "bootstrap_resamples": 50},
}
START_TIMEOUT_S = 180.0


def write_corpus(folder: Path, documents: int = 400, shards: int = 4) -> None:
    """Write Parquet shards of made-up sentences, the same each time."""
    words = random.Random(1)
    vocabulary = ["".join(words.choices("abcdefghijklmnop", k=words.randint(2, 8))) for _ in range(300)]
    folder.mkdir(parents=True)
    for shard in range(shards):
        texts = [" ".join(words.choices(vocabulary, k=words.randint(20, 60))) + "." for _ in range(documents // shards)]
        pq.write_table(pa.table({"text": texts}), folder / f"part-{shard}.parquet")


class Home:
    """A folder of its own for everything that a run keeps, and the runs in it."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump({**CONFIG, "corpus": {**CONFIG["corpus"], "path": str(corpus)}}))
        self.steps = folder / "home" / "steps"

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start ``deconv run`` in a process group of its own."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
        environment |= {"DECONV_HOME": str(self.folder / "home")}
        with (self.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "pipelines.cli", "run", "--config", str(self.config), *arguments],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def run(self, *arguments: str) -> dict[str, Any]:
        """Run to the end and return the summary."""
        summary = self.folder / f"summary-{time.monotonic_ns()}.json"
        process = self.start("--json", str(summary), *arguments)
        assert process.wait(timeout=300) == 0, self.log()
        return json.loads(summary.read_text())

    def log(self) -> str:
        """Return what all runs printed."""
        return (self.folder / "log.txt").read_text()

    def wait_until(self, condition: Callable[[], bool], process: subprocess.Popen[bytes], what: str) -> None:
        """Wait for a condition while a run goes on."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not condition():
            assert process.poll() is None, f"the run ended before {what}:\n{self.log()}"
            assert time.monotonic() < deadline, f"waited too long for {what}:\n{self.log()}"
            time.sleep(0.02)

    def output(self, step: str) -> Path:
        """Return the folder of a step's output, which must have been begun."""
        return next(self.steps.glob(f"{step}-*"))

    def has(self, step: str, files: str) -> bool:
        """Tell whether a step's output holds a file of this pattern."""
        return any(self.steps.glob(f"{step}-*/{files}"))

    def has_begun(self, step: str) -> bool:
        """Tell whether a step is being run or complete."""
        return self.has(step, "_lease.json") or self.has(step, "_SUCCESS")

    def has_checkpoint(self, step: int) -> bool:
        """Tell whether there is a complete checkpoint of this training step or a later one."""
        files = self.steps.glob("train-*/checkpoints/step-*.json")
        return any(int(file.stem.partition("-")[2]) >= step for file in files)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Kill a run and all its descendants with SIGKILL, as one would by hand."""
    for pid in {process.pid, *descendants(process.pid)}:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
