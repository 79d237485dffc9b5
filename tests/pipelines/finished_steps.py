"""Outputs of the steps before evaluate, made in a second: real tokenizer, token shards and a real tiny model."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from deconv_model.config import LevelConfig, ModelConfig, StackConfig
from deconv_model.language_model import LanguageModel
from deconv_model.saving import save_model, weights_sha256
from pipelines.files import sha256_file
from pipelines.steps import evaluate
from pipelines.store import OutputFolder, StepOutput

EVALUATE = {
    "bootstrap_resamples": 200,
    "samples": 2,
    "sample_tokens": 8,
    "temperature": 0.8,
    "top_k": 10,
    "seed": 0,
    "max_documents": None,
}
_WORDS = (
    "the",
    "model",
    "reads",
    "a",
    "naïve",
    "text",
    "of",
    "bytes",
    "and",
    "returns",
    "its",
    "loss",
    "試験",
    "or",
    "none",
)


def make_texts(count: int, seed: int) -> list[str]:
    """Return documents of random words; ends with one that spells a special token and one without text."""
    random = np.random.default_rng(seed)
    texts = [" ".join(random.choice(_WORDS, size=int(size))) + ".\n" for size in random.integers(3, 60, size=count)]
    return [*texts, "an <|endoftext|> in the text", ""]


TEXTS = {"train": make_texts(60, seed=1), "valid": make_texts(5, seed=2), "test": make_texts(24, seed=3)}


def finish_tokenizer(root: Path, vocab_size: int = 300) -> StepOutput:
    """Train a byte-level tokenizer."""
    output = OutputFolder(str(root / f"tokenizer-{vocab_size:012d}"))
    if not output.exists("_SUCCESS"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(TEXTS["train"], trainer)
        data = tokenizer.to_str().encode()
        output.write_bytes("tokenizer.json", data)
        output.finish({"sha256": hashlib.sha256(data).hexdigest(), "vocab_size": tokenizer.get_vocab_size()}, 0.0)
    return StepOutput(output.uri)


def finish_tokens(root: Path, tokenizer: StepOutput, texts: dict[str, list[str]]) -> StepOutput:
    """Write two shards a split, the second of the test split empty."""
    digest = hashlib.sha256(json.dumps([tokenizer.address, texts]).encode()).hexdigest()
    output = OutputFolder(str(root / f"tokens-{digest[:12]}"))
    encoder = Tokenizer.from_file(str(tokenizer.local("tokenizer.json")))
    encoder.encode_special_tokens = True
    end = encoder.token_to_id("<|endoftext|>")
    splits: dict[str, Any] = {}
    for split, documents in texts.items():
        half = len(documents) if split == "test" else len(documents) // 2
        shards = []
        for i, part in enumerate((documents[:half], documents[half:])):
            name = f"{split}-{i:05d}-of-00002"
            ids = [[*encoder.encode(text).ids, end] for text in part]
            rows = [(len(row), len(text.encode()), len(text.split()) + 1) for row, text in zip(ids, part, strict=True)]
            table = np.array(rows, dtype=np.int64).reshape(-1, 3)
            flat = np.array([token for row in ids for token in row], dtype=np.uint16)
            shard: dict[str, Any] = {"name": name, "documents": len(part)}
            shard |= dict(zip(("tokens", "bytes", "words"), table.sum(axis=0).tolist(), strict=True))
            for key, file, array in (("sha256", f"{name}.npy", flat), ("docs_sha256", f"{name}.docs.npy", table)):
                with output.write(f"tokens/{file}") as path:
                    np.save(path, array)
                    shard[key] = sha256_file(path)
            shards.append(shard)
        content = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()
        splits[split] = {"documents": len(documents), "digest": content, "shards": shards}
    manifest = {
        "format": 1,
        "dtype": "uint16",
        "vocab_size": tokenizer.result["vocab_size"],
        "end_of_document": end,
        "tokenizer_sha256": tokenizer.result["sha256"],
        "splits": splits,
    }
    output.write_json("tokens/manifest.json", manifest)
    output.finish({"test_digest": splits["test"]["digest"]}, 0.0)
    return StepOutput(output.uri)


def finish_train(root: Path, tokenizer: StepOutput, *, seed: int, steps: int) -> StepOutput:
    """Train a model of 64-token context for some steps on the train texts; 0 steps leave a uniform guess."""
    identity = json.dumps([tokenizer.address, seed, steps])
    output = OutputFolder(str(root / f"train-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"))
    if output.is_complete():
        return StepOutput(output.uri)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    vocab_size = tokenizer.result["vocab_size"]
    stack = StackConfig(layers=1, hidden=16)
    levels = (
        LevelConfig(width=16, encoder=stack, decoder=stack),
        LevelConfig(width=16, stride=2, encoder=StackConfig(layers=1, hidden=16, heads=1)),
    )
    model = LanguageModel(ModelConfig(vocab_size=vocab_size, context_length=64, levels=levels))
    encoder = Tokenizer.from_file(str(tokenizer.local("tokenizer.json")))
    stream = torch.tensor([token for text in TEXTS["train"] for token in [*encoder.encode(text).ids, 0]])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    history: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        rows = stream[torch.randint(len(stream) - 65, (8, 1)) + torch.arange(65)]
        loss = model.token_losses(rows[:, :-1], rows[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append({"step": step, "samples_seen": 8 * step, "train_loss": loss.item()})
        if step % 5 == 0:
            history[-1]["valid_loss"] = loss.item() + 0.1
    save_model(output.local("model"), model, tokenizer.local("tokenizer.json"))
    output.write_json("history.json", history)
    spec = {"step": "train", "config": {"model": {"context_length": 64}, "train": {"seed": seed, "steps": steps}}}
    output.write_json("spec.json", spec)
    output.finish({"weights_sha256": weights_sha256(output.local("model"))}, 0.0)
    return StepOutput(output.uri)


def finish_inputs(
    root: Path, *, seed: int = 0, steps: int = 0, vocab_size: int = 300, texts: dict[str, list[str]] = TEXTS
) -> dict[str, StepOutput]:
    """Return the outputs that evaluate and register read, but for that of evaluate itself."""
    corpus = OutputFolder(str(root / "corpus-000000000000"))
    corpus.finish({"documents": sum(map(len, texts.values()))}, 0.0)
    tokenizer = finish_tokenizer(root, vocab_size)
    return {
        "corpus": StepOutput(corpus.uri),
        "tokenizer": tokenizer,
        "tokens": finish_tokens(root, tokenizer, texts),
        "train": finish_train(root, tokenizer, seed=seed, steps=steps),
    }


def finish_evaluate(root: Path, inputs: dict[str, StepOutput], **settings: Any) -> dict[str, StepOutput]:
    """Run the evaluate step and return the inputs with its output among them."""
    config = {**EVALUATE, **settings}
    identity = json.dumps([config, [step.address for step in inputs.values()]])
    output = OutputFolder(str(root / f"evaluate-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"))
    output.finish(evaluate.run(config, inputs, output), 0.0)
    return {**inputs, "evaluate": StepOutput(output.uri)}


@functools.lru_cache(maxsize=1)
def _empty_database() -> bytes:
    """Return an MLflow database with its tables only; making one takes seconds."""
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mlflow.db"
        MlflowClient(f"sqlite:///{file}").search_registered_models()
        return file.read_bytes()


def use_fresh_mlflow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point MLflow to an empty database and artifact folder of this test."""
    (folder / "mlflow.db").write_bytes(_empty_database())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    monkeypatch.setenv("DECONV_MLFLOW_ARTIFACTS", (folder / "artifacts").as_uri())


def register_output(root: Path, inputs: dict[str, StepOutput]) -> OutputFolder:
    """Return the folder of the register step as the runner leaves it before the step runs."""
    digest = hashlib.sha256(inputs["evaluate"].address.encode()).hexdigest()
    output = OutputFolder(str(root / f"register-{digest[:12]}"))
    output.write_json("spec.json", {"step": "register", "config": {"name": "tiny", "confidence": 0.95}})
    output.write_json("provenance.json", {"attempts": [{"git_commit": "0123abc"}]})
    return output
