"""Killed anywhere and started again, a run ends with the same weights, bit for bit."""

from __future__ import annotations

import functools
import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines.files import is_temporary
from pipelines.processes import descendants, process_start
from pipelines.steps import STEPS
from tests.faults.runs import Home, kill_all

pytestmark = [pytest.mark.fault, pytest.mark.timeout(600)]


def _facts(summary: dict[str, Any]) -> dict[str, Any]:
    """What must be equal, whatever happened on the way."""
    results = summary["results"]
    return {
        "addresses": [step["address"] for step in summary["steps"]],
        "corpus": results["corpus"]["digest"],
        "tokenizer": results["tokenizer"]["sha256"],
        "tokens": results["tokens"]["digest"],
        "weights": summary["weights_sha256"],
        "best": [results["train"][key] for key in ("best_step", "best_valid_loss", "samples_seen")],
        "metrics": {k: v for k, v in summary["metrics"].items() if k != "seconds"},
        "samples": summary["samples"],
        "registered": [summary["registered"][key] for key in ("name", "version", "alias")],
    }


def test_a_run_killed_in_every_step_ends_with_the_same_weights(
    corpus: Path, undisturbed: tuple[Home, dict[str, Any]], tmp_path: Path
) -> None:
    home = Home(tmp_path, corpus)
    moments = random.Random(time.time_ns())
    killed = []
    for step in STEPS:
        # Training is killed twice, each time with checkpoints behind it and steps ahead that none holds yet.
        for checkpoint in (10, 35) if step == "train" else (0,):
            process = home.start()
            begun = functools.partial(home.has_begun, step)
            reached = functools.partial(home.has_checkpoint, checkpoint) if checkpoint else begun
            home.wait_until(reached, process, step)
            delay = moments.uniform(0.0, 0.2 if checkpoint else 2.0)
            time.sleep(delay)
            kill_all(process)
            killed.append((step, round(delay, 3), "complete" if home.has(step, "_SUCCESS") else "unfinished"))
    summary = home.run()
    assert _facts(summary) == _facts(undisturbed[1]), f"killed at {killed}"
    history = [json.loads((h.output("train") / "history.json").read_text()) for h in (home, undisturbed[0])]
    assert history[0] == history[1]
    attempts = json.loads((home.output("train") / "provenance.json").read_text())["attempts"]
    assert len(attempts) >= 3, "training was killed at least twice"
    leftovers = [p for p in home.steps.rglob("*") if p.name == "_lease.json" or is_temporary(p.name)]
    assert not leftovers


def test_nothing_outlives_a_run_that_is_killed_alone_or_terminated(corpus: Path, tmp_path: Path) -> None:
    home = Home(tmp_path, corpus)
    process = home.start()
    home.wait_until(functools.partial(home.has_checkpoint, 1), process, "the first checkpoint")
    family = descendants(process.pid)
    assert len(family) > 5, "Ray and Prefect should be running"
    process.send_signal(signal.SIGKILL)
    process.wait()
    _wait_for_the_end_of(family)

    process = home.start()
    home.wait_until(functools.partial(home.has_checkpoint, 10), process, "a later checkpoint")
    family = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    _wait_for_the_end_of(family)
    assert not home.has("train", "_lease.json")
    assert "run the same command again" in home.log()
    assert "Traceback" not in home.log()


def _wait_for_the_end_of(family: set[int]) -> None:
    deadline = time.monotonic() + 60
    while survivors := [pid for pid in family if process_start(pid) is not None]:
        assert time.monotonic() < deadline, f"still there: {[_command(pid) for pid in survivors]}"
        time.sleep(0.2)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:120]
    except OSError:
        return "gone"
