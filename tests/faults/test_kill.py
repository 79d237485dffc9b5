"""Killed anywhere and started again, a run ends with the same weights, bit for bit."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest

from pipelines.steps import STEPS
from tests.faults.runs import Home, descendants, is_alive, kill_all, write_corpus

pytestmark = [pytest.mark.fault, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "shards"
    write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, dict]:
    home = Home(tmp_path_factory.mktemp("undisturbed"), corpus)
    return home, home.run()


def _facts(summary: dict) -> dict:
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
    corpus: Path, undisturbed: tuple[Home, dict], tmp_path: Path
) -> None:
    home = Home(tmp_path, corpus)
    moments = random.Random(time.time_ns())
    killed = []
    for step in STEPS:
        process = home.start()
        home.wait_until(lambda step=step: home.is_running(step) or _complete(home, step), process, f"step {step}")
        delay = moments.uniform(0.0, 2.0)
        time.sleep(delay)
        kill_all(process)
        killed.append((step, round(delay, 3), "complete" if _complete(home, step) else "unfinished"))
    summary = home.run()
    assert _facts(summary) == _facts(undisturbed[1]), f"killed at {killed}"
    history = [json.loads((h.output("train") / "history.json").read_text()) for h in (home, undisturbed[0])]
    assert history[0] == history[1]
    leftovers = [p for p in home.steps.rglob("*") if p.name == "_lease.json" or ".tmp" in p.name]
    assert not leftovers


def _complete(home: Home, step: str) -> bool:
    output = home.output(step)
    return output is not None and (output / "_SUCCESS").exists()


def test_training_killed_between_checkpoints_goes_on_from_the_last_one(
    corpus: Path, undisturbed: tuple[Home, dict], tmp_path: Path
) -> None:
    home = Home(tmp_path, corpus)
    for reached in (10, 35):
        process = home.start()

        def checkpointed(reached: int = reached) -> bool:
            output = home.output("train")
            done = [int(p.stem.partition("-")[2]) for p in output.glob("checkpoints/*.json")] if output else []
            return max(done, default=0) >= reached

        home.wait_until(checkpointed, process, f"the checkpoint of step {reached}")
        kill_all(process)
    summary = home.run()
    assert summary["weights_sha256"] == undisturbed[1]["weights_sha256"]
    attempts = json.loads((home.output("train") / "provenance.json").read_text())["attempts"]
    assert len(attempts) == 3


def test_nothing_outlives_a_main_process_that_is_killed_alone(corpus: Path, tmp_path: Path) -> None:
    home = Home(tmp_path, corpus)
    process = home.start()
    home.wait_until(
        lambda: (o := home.output("train")) is not None and any(o.glob("checkpoints/*.json")), process, "train"
    )
    family = descendants(process.pid)
    assert len(family) > 5, "Ray and Prefect should be running"
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while survivors := [pid for pid in family if is_alive(pid)]:
        assert time.monotonic() < deadline, f"still there: {[_command(pid) for pid in survivors]}"
        time.sleep(0.2)


def test_terminating_the_run_ends_everything_and_keeps_its_work(corpus: Path, tmp_path: Path) -> None:
    home = Home(tmp_path, corpus)
    process = home.start()
    home.wait_until(
        lambda: (o := home.output("train")) is not None and any(o.glob("checkpoints/*.json")), process, "train"
    )
    family = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    assert "run the same command again" in home.log()
    assert "Traceback" not in home.log()
    deadline = time.monotonic() + 30
    while any(is_alive(pid) for pid in family):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert not (home.output("train") / "_lease.json").exists()


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:120]
    except OSError:
        return "gone"
