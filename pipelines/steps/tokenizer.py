"""Step 2: a byte-level BPE tokenizer (Sennrich et al. 2016, over bytes as in GPT-2), trained on a sample or given.

The sample takes the first training documents of every shard, an equal part of ``tokenizer.sample_bytes`` from each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipelines.documents import check_unchanged, documents_of, shard_uri
from pipelines.errors import ConfigError, DataError
from pipelines.progress import get_logger, progress
from pipelines.sources import read_tokenizer_file
from pipelines.store import OutputFolder, StepOutput

END_OF_DOCUMENT = "<|endoftext|>"
_log = get_logger(__name__)
# Every byte that UTF-8 has, and every token that would be taken for the end of the document.
_FIRST_OF_EACH_LEAD = (*range(0x80, 0x800, 0x40), *range(0x800, 0xD800, 0x1000), 0xE000, 0xF000, 0x10000, 0x40000)
_CODES = (*range(0x100), *_FIRST_OF_EACH_LEAD, 0x80000, 0xC0000, 0x100000)
_PROBE = "Byte-level:  naïve 試験 \U0001f642 <unk>" + END_OF_DOCUMENT + "".join(map(chr, _CODES))


def run(config: dict[str, Any], inputs: dict[str, StepOutput], output: OutputFolder) -> dict[str, Any]:
    """Write ``tokenizer.json``.

    Raises:
        ConfigError: The given tokenizer does not keep every byte, or has no token for the end of a document.
        DataError: The given tokenizer changed since the plan was made, or a shard cannot be read.
    """
    if config["path"] is not None:
        data, digest = read_tokenizer_file(config["path"])
        if digest != config["sha256"]:
            raise DataError(f"tokenizer.path {config['path']} changed while the run was starting: run again")
        tokenizer = read_tokenizer(data, config["path"])
        if tokenizer.truncation is not None or tokenizer.padding is not None:
            # Made for inputs of one length: it would cut documents short without a word.
            tokenizer.no_truncation()
            tokenizer.no_padding()
            data = tokenizer.to_str().encode()
        check_tokenizer(tokenizer, config["path"])
    else:
        tokenizer = _train(config, inputs["corpus"])
        data = tokenizer.to_str().encode()
    output.write_bytes("tokenizer.json", data)
    return {"sha256": hashlib.sha256(data).hexdigest(), "vocab_size": tokenizer.get_vocab_size()}


def end_of_document(tokenizer: Tokenizer) -> int:
    """Return the id of the token that ends a document."""
    token = tokenizer.token_to_id(END_OF_DOCUMENT)
    if token is None:
        raise ConfigError(f"the tokenizer has no token {END_OF_DOCUMENT}, which ends a document")
    return token


def read_tokenizer(data: bytes, name: str) -> Tokenizer:
    """Return the tokenizer that a file holds.

    Raises:
        ConfigError: It holds none.
    """
    try:
        return Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"{name} is not a tokenizer.json of the tokenizers library: {error}") from error


def check_tokenizer(tokenizer: Tokenizer, name: str) -> None:
    """Make sure that a tokenizer can stand for any text.

    Raises:
        ConfigError: It loses bytes, has gaps between its ids, or has no ``<|endoftext|>`` that text cannot spell.
    """
    end = end_of_document(tokenizer)
    largest, size = max(tokenizer.get_vocab().values()), tokenizer.get_vocab_size()
    if largest >= size:
        raise ConfigError(f"tokenizer {name} has {size} tokens and ids up to {largest}: they must be without gaps")
    tokenizer.encode_special_tokens = True  # as documents are encoded
    ids = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    if tokenizer.decode(ids, skip_special_tokens=False) != _PROBE:
        raise ConfigError(
            f"tokenizer {name} does not give back every text: one of bytes, without a normalizer, is needed"
        )
    if end in ids:
        raise ConfigError(f"tokenizer {name}: {END_OF_DOCUMENT} must be a special token, as text may spell it")


def _train(config: dict[str, Any], corpus: StepOutput) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config["vocab_size"],
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(config["sample_bytes"], corpus), trainer)
    if (size := tokenizer.get_vocab_size()) < config["vocab_size"]:
        _log.warning(
            "[tokenizer] the text gives %d tokens only, not %d: the model gets that many", size, config["vocab_size"]
        )
    return tokenizer


def _sample(sample_bytes: int, corpus: StepOutput) -> Iterator[str]:
    manifest = corpus.read_json("manifest.json")
    share = -(-sample_bytes // len(manifest["shards"]))
    with progress("tokenizer", total=len(manifest["shards"]), unit="shards sampled") as bar:
        for shard in manifest["shards"]:
            taken = 0
            uri = shard_uri(corpus, shard["name"])
            check_unchanged(uri, shard["sha256"])
            for split, text in documents_of(uri, manifest):
                if split == "train":
                    # A single huge document must not become the whole sample.
                    piece = text[: share - taken]
                    taken += len(piece.encode())
                    yield piece
                if taken >= share:
                    break
            bar.advance()
