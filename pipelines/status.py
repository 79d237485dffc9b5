"""What the storage holds, told without doing anything."""

from __future__ import annotations

import math
from typing import Any

from pipelines.lease import Lease, describe_owner, read_lease
from pipelines.runners import is_current
from pipelines.steps import STEPS, StepSpec
from pipelines.store import SUCCESS_FILE, OutputFolder, Storage


def _owner(output: OutputFolder) -> dict[str, Any] | None:
    """Return the record of the living owner of a folder, if it has one."""
    record = read_lease(output)
    return record if record and Lease(output).owner_is_alive(record) else None


def step_state(spec: StepSpec, storage: Storage) -> str:
    """Return ``cached``, ``running``, ``resume`` (begun and left) or ``to do``."""
    output = storage.output(spec.address)
    if is_current(spec, output):
        return "cached"
    if _owner(output) is not None:
        return "running"
    return "resume" if output.exists("spec.json") else "to do"


def list_outputs(storage: Storage) -> list[dict[str, Any]]:
    """Return address, state (``complete``, ``running``, ``left``), size and a note of every output."""
    outputs = []
    for address in storage.addresses():
        if address.rpartition("-")[0] not in STEPS:
            continue
        output = storage.output(address)
        owner = _owner(output)
        state = "running" if owner else "complete" if output.is_complete() else "left"
        outputs.append(
            {
                "address": address,
                "state": state,
                "bytes": sum(output.sizes().values()),
                "note": _note(output, state, owner),
            }
        )
    return outputs


def _note(output: OutputFolder, state: str, owner: dict[str, Any] | None) -> str:
    if state == "complete":
        return f"took {output.read_json(SUCCESS_FILE)['seconds']:.1f} s"
    if owner is None:
        return "begun and left: the next run of it goes on here"
    note = describe_owner(owner)
    try:
        facts = output.read_json("_progress.json")
        return f"{note}, step {facts['step']:,} of {facts['steps']:,}, loss {facts.get('loss', math.nan):.3f}"
    except (OSError, ValueError, KeyError):
        return note
