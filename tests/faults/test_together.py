"""Two runs of the same configuration at the same time: the work is done once, and both end well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.steps import STEPS
from tests.faults.runs import Home

pytestmark = [pytest.mark.fault, pytest.mark.timeout(600)]


def test_two_runs_at_the_same_time_share_the_work(corpus: Path, tmp_path: Path) -> None:
    home = Home(tmp_path / "both", corpus)
    files = [home.folder / "first.json", home.folder / "second.json"]
    processes = [home.start("--json", str(file)) for file in files]
    assert [process.wait(timeout=400) for process in processes] == [0, 0], home.log()
    first, second = (json.loads(file.read_text()) for file in files)
    assert first["weights_sha256"] == second["weights_sha256"]
    assert first["registered"] == second["registered"]
    for step in STEPS:
        provenance = json.loads((home.output(step) / "provenance.json").read_text())
        assert len(provenance["attempts"]) == 1, f"{step} was done more than once"
    done = {step["step"]: step["cached"] for step in first["steps"]}
    also = {step["step"]: step["cached"] for step in second["steps"]}
    assert all(done[step] != also[step] for step in STEPS), "each step is done by exactly one of the two"


def test_another_evaluation_repeats_only_evaluate_and_register(undisturbed: tuple[Home, dict[str, Any]]) -> None:
    home, first = undisturbed
    assert not any(step["cached"] for step in first["steps"])
    again = home.run()
    assert all(step["cached"] for step in again["steps"])
    assert again["registered"] == first["registered"]
    changed = home.run("--set", "evaluate.sample_tokens=5")
    assert {s["step"] for s in changed["steps"] if not s["cached"]} == {"evaluate", "register"}
    assert changed["weights_sha256"] == first["weights_sha256"]
    assert (changed["registered"]["version"], changed["registered"]["alias"]) == ("2", "challenger")
