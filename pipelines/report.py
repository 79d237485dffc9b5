"""What people look at after a run: tables, the picture of the losses, the page of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MODELS = ("model", "unigram", "uniform")
MEASURES = {
    "bits_per_byte": ("bits per byte", "{:.4f}"),
    "token_perplexity": ("token perplexity", "{:,.1f}"),
    "word_perplexity": ("word perplexity", "{:,.1f}"),
}
_LARGEST_PLAIN = 1e7


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table for a terminal; all columns but the first are aligned to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *padded[1:]]).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def metrics_rows(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the measures of the model beside those of the baselines.

    Args:
        metrics: Content of ``metrics.json``; each number stands with its interval.
    """
    rows = []
    for measure, (label, form) in MEASURES.items():
        rows.append([label, *(_with_interval(metrics[model][measure], form) for model in MODELS)])
    return ["test split", *MODELS], rows


def _with_interval(measured: Mapping[str, float | None], form: str) -> str:
    numbers = [number for number in (measured["value"], measured["low"], measured["high"]) if number is not None]
    if len(numbers) < 3:
        return "beyond numbers"
    if max(numbers) >= _LARGEST_PLAIN:
        form = "{:.1e}"
    value, low, high = (form.format(number) for number in numbers)
    return value if low == high else f"{value} ({low} to {high})"


def verdict(metrics: Mapping[str, Any]) -> str:
    """Say in one sentence how the model stands against the unigram baseline."""
    difference = metrics["model_minus_unigram"]["bits_per_byte"]
    low, high = sorted((abs(difference["low"]), abs(difference["high"])))
    interval = f"95 % interval {low:.3f} to {high:.3f}"
    if difference["high"] < 0:
        return f"The model needs {-difference['value']:.3f} bits per byte less than the unigram baseline ({interval})."
    if difference["low"] > 0:
        return f"The model needs {difference['value']:.3f} bits per byte more than the unigram baseline ({interval})."
    return (
        f"The model cannot be told from the unigram baseline: {difference['value']:+.3f} bits per byte "
        f"(95 % interval {difference['low']:+.3f} to {difference['high']:+.3f})."
    )


def plot_losses(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the losses of a training.

    Args:
        history: Entries with ``step`` and ``train_loss`` (nats a token) and, where it was measured, ``valid_loss``.
        path: The PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = np.array([(e["step"], e["train_loss"]) for e in history if "train_loss" in e], dtype=float).reshape(-1, 2)
    valid = np.array([(e["step"], e["valid_loss"]) for e in history if "valid_loss" in e], dtype=float).reshape(-1, 2)
    # No pyplot: it keeps global state and picks a backend that may want a display.
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    blue, orange, grey = "#4878a8", "#d1611d", "#5a5a5a"
    if len(train):
        axes.plot(train[:, 0], train[:, 1], color=blue, linewidth=0.8, alpha=0.3)
        axes.plot(train[:, 0], _smooth(train[:, 1], len(train) // 60), color=blue, linewidth=1.8, label="train")
    if len(valid):
        step, loss = valid[np.argmin(valid[:, 1])]
        label = f"valid, best {loss:.3f} at step {step:,.0f}"
        axes.plot(valid[:, 0], valid[:, 1], color=orange, linewidth=1.8, marker="o", markersize=4, label=label)
        axes.axhline(loss, color=orange, linewidth=0.8, linestyle=":", alpha=0.8)
    axes.set_xlabel("optimizer step", color=grey)
    axes.set_ylabel("loss, nats per token", color=grey)
    axes.set_title("Loss on the train and valid splits", loc="left", fontweight="bold")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=grey, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c8c8c8")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="upper right")
    figure.savefig(path, format="png", metadata={"Software": None})


def _smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Average each value with up to ``reach`` on either side, as many on both: the ends are not pulled inwards."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    reaches = np.minimum(reach, np.minimum(places, places[::-1]))
    return (total[places + reaches + 1] - total[places - reaches]) / (2 * reaches + 1)


def samples_markdown(samples: Sequence[Mapping[str, Any]]) -> str:
    """Return the samples side by side with what really followed.

    Args:
        samples: Entries with ``document``, ``prompt``, ``continuation`` and ``reference``.
    """
    parts = []
    for sample in samples:
        parts.append(f"### Test document {sample['document']:,}")
        for label, key in (("Prompt", "prompt"), ("The model", "continuation"), ("The document", "reference")):
            parts.append(f"**{label}**\n\n{_quoted(sample[key])}")
    return "\n\n".join(parts)


def _quoted(text: str) -> str:
    """Return text as an indented block, in which Markdown means nothing."""
    return "\n".join(f"    {line}" for line in (text.splitlines() or [""]))


def evaluation_markdown(metrics: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], picture: str) -> str:
    """Return the page of an evaluation.

    Args:
        metrics: Content of ``metrics.json``.
        samples: Content of ``samples.json``.
        picture: Name of the loss curve's file, beside the page.
    """
    context = metrics["context"]
    counts = metrics["documents"]
    of_all = "" if counts == metrics["documents_in_split"] else f" of {metrics['documents_in_split']:,}"
    parts = [
        f"# Evaluation of `{metrics['train']}`",
        verdict(metrics),
        markdown_table(*metrics_rows(metrics)),
        f"{counts:,}{of_all} documents of the test split: {metrics['tokens']:,} tokens, {metrics['bytes']:,} bytes, "
        f"{metrics['words']:,} words. In brackets the 95 % interval over {metrics['bootstrap_resamples']:,} resamples "
        f"of the documents. Context: {context['policy']}, up to {context['length']:,} tokens, never across documents.",
        "## Training",
        f"![Loss on the train and valid splits]({picture})",
    ]
    if samples:
        parts += ["## Samples", samples_markdown(samples)]
    return "\n\n".join(parts) + "\n"
