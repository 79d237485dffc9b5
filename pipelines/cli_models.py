"""The commands of ``deconv`` that use a registered model: generate and score."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from pipelines.errors import ConfigError

_model_option = click.option(
    "--model",
    default="deconv-lm@champion",
    show_default=True,
    help="NAME@ALIAS or NAME/VERSION in the MLflow registry.",
)


@click.command()
@click.argument("text")
@_model_option
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(1), help="Tokens at most.")
@click.option("--temperature", default=0.8, show_default=True, type=click.FloatRange(0.0), help="0: the likeliest.")
@click.option("--top-k", default=50, show_default=True, type=click.IntRange(0), help="Tokens sampled from; 0: all.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**62), help="Of the sampling.")
def generate(text: str, model: str, max_new_tokens: int, temperature: float, top_k: int, seed: int) -> None:
    r"""Continue TEXT with a registered model.

    \b
    Examples:
      deconv generate "Return the"
      deconv generate --model deconv-lm/3 --temperature 0 "A list of"
    """
    from pipelines.environment import read_environment

    if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError("TEXT is not UTF-8")
    read_environment()
    from deconv_model.generation import generate as continue_ids
    from pipelines.registry import load_registered

    network, tokenizer, info = load_registered(model)
    prompt = [info.end_of_document, *tokenizer.encode(text, add_special_tokens=False).ids]
    ids = continue_ids(
        network,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        stop_id=info.end_of_document,
    )
    continuation = tokenizer.decode([i for i in ids if i != info.end_of_document], skip_special_tokens=False)
    click.echo(text + continuation)


@click.command()
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@_model_option
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
def score(file: Path, model: str, as_json: bool) -> None:
    r"""Tell how well a registered model predicts a text FILE, taken as one document; - is standard input.

    \b
    Examples:
      deconv score README.md
      cat notes.txt | deconv score --json -
    """
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        text = data.decode()
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text: byte {error.start} cannot be read") from error
    if not text:
        raise ConfigError(f"{file} is empty: there is nothing to score")
    from pipelines.environment import read_environment

    read_environment()
    from deconv_model.metrics import bits_per_byte, token_perplexity
    from pipelines.registry import load_registered
    from pipelines.scoring import encode_documents
    from pipelines.scoring import score as score_documents

    network, tokenizer, info = load_registered(model)
    documents = encode_documents(tokenizer, [text], info.end_of_document)
    nats = float(score_documents(network, documents, start_id=info.end_of_document, label="score").sum())
    tokens = len(documents[0])
    facts = {
        "model": f"{info.name}/{info.version}",
        "bytes": len(data),
        "tokens": tokens,
        "bits_per_byte": bits_per_byte(nats, len(data)),
        "token_perplexity": token_perplexity(nats, tokens),
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    click.echo(
        f"{facts['bits_per_byte']:.4f} bits per byte, token perplexity {facts['token_perplexity']:,.1f} "
        f"({tokens:,} tokens, {len(data):,} bytes, {facts['model']})"
    )
