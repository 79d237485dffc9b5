"""What a run has to say at its end, as data and as a table for people."""

from __future__ import annotations

import shlex
from typing import Any

from pipelines import report
from pipelines.environment import read_environment
from pipelines.files import split_uri
from pipelines.store import StepOutput, Storage
from pipelines.tracking import shown

_SAMPLE_CHARACTERS = 400


def summarise_run(steps: list[dict[str, Any]], storage: Storage, seconds: float) -> dict[str, Any]:
    """Gather the results of a run.

    Args:
        steps: How each step ended, as the flow's tasks return it.
        storage: Where the outputs are.
        seconds: What the run took.

    Returns:
        ``steps``, ``seconds``, ``results`` (the small result of each step), ``metrics`` (all measures with their
        intervals), ``samples``, ``registered`` and ``weights_sha256``.
    """
    outputs = {step["step"]: StepOutput(step["uri"]) for step in steps}
    results = {name: output.result for name, output in outputs.items()}
    return {
        "steps": steps,
        "seconds": round(seconds, 2),
        "storage": storage.uri,
        "results": results,
        "metrics": outputs["evaluate"].read_json("metrics.json"),
        "samples": outputs["evaluate"].read_json("samples.json"),
        "registered": results["register"],
        "weights_sha256": results["train"]["weights_sha256"],
    }


def render_summary(summary: dict[str, Any], again: list[str]) -> str:
    """Return the table that ends a run.

    Args:
        summary: As :func:`summarise_run` returns it.
        again: The arguments of the command line tool that show this run again.
    """
    rows = [
        [step["step"], f"{step['seconds']:.1f} s", "cached" if step["cached"] else "done", step["uri"]]
        for step in summary["steps"]
    ]
    train, registered = summary["results"]["train"], summary["registered"]
    model = f"{registered['name']}@{registered['alias']}"
    parts = [
        _steps_table(rows),
        report.plain_table(*report.metrics_rows(summary["metrics"])),
        report.verdict(summary["metrics"]),
        f"{train['parameters']:,} parameters, {train['steps']:,} steps on {train['tokens_seen']:,} tokens, "
        f"best at step {train['best_step']:,}; weights sha256 {summary['weights_sha256']}",
    ]
    if summary["samples"]:
        sample = summary["samples"][0]
        text = (sample["prompt"] + "⟦" + sample["continuation"] + "⟧")[:_SAMPLE_CHARACTERS]
        parts.append(
            "A sample, what the model wrote in ⟦ ⟧:\n" + "\n".join(f"    {line}" for line in text.splitlines())
        )
    parts.append(
        f"Registered: {registered['name']} version {registered['version']}, alias {registered['alias']} "
        f"({registered['reason']})"
    )
    parts.append("\n".join(_commands(summary, model, again)))
    return "\n\n".join(parts)


def _steps_table(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        f"{step.ljust(widths[0])}  {seconds.rjust(widths[1])}  {state.ljust(widths[2])}  {uri}"
        for step, seconds, state, uri in rows
    ]
    return "\n".join(lines)


def _commands(summary: dict[str, Any], model: str, again: list[str]) -> list[str]:
    environment = read_environment()
    evaluate = next(step["uri"] for step in summary["steps"] if step["step"] == "evaluate")
    commands = [
        ("generate text", f"deconv generate --model {model} 'Return the'"),
        ("show this run again", shlex.join(["deconv", "run", *again])),
    ]
    uri = shown(environment.mlflow_tracking_uri)
    ui = uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"
    commands.insert(0, ("open the MLflow UI", ui))
    if split_uri(evaluate)[0] is None:
        commands.append(("read the report", f"{evaluate}/report.md"))
    width = max(len(label) for label, _ in commands)
    return [f"{label.ljust(width)}  {command}" for label, command in commands]
