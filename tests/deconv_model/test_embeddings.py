import gzip
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from deconv_model.config import LevelConfig, ModelConfig, StackConfig
from deconv_model.embeddings import WordVectors, freeze_rows, initialise_embedding, read_vectors, wanted_words
from deconv_model.language_model import LanguageModel
from deconv_model.saving import load_model, save_model
from tests.deconv_model.tiny import (
    CONFIG,
    CONTEXT,
    VOCABULARY,
    assert_same_training,
    stop_after,
    tiny_trainer,
    train,
    write_tiny_shards,
)

FORMATS = ["word2vec", "word2vec-binary", "glove"]
WORDS = ["the", "The", "café", "日本", "1990", "-1", ".", "nan", "x" * 300]


def _random_vectors(words: list[str], size: int, seed: int = 0) -> WordVectors:
    values = np.random.default_rng(seed).normal(0.0, 0.3, (len(words), size)).astype(np.float32)
    return WordVectors({word: row for row, word in enumerate(words)}, values)


def _encode(vectors: WordVectors, format: str, newline: bytes = b"\n") -> bytes:
    """Write vectors as the tools do; nine digits bring every float32 back."""
    parts = [] if format == "glove" else [b"%d %d\n" % vectors.vectors_ND.shape]
    for word, row in vectors.rows.items():
        vector = vectors.vectors_ND[row]
        if format == "word2vec-binary":
            parts.append(word.encode() + b" " + vector.astype("<f4").tobytes() + newline)
        else:
            parts.append(b" ".join([word.encode(), *(b"%.9g" % value for value in vector)]) + newline)
    return b"".join(parts)


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _assert_same(read: WordVectors, expected: WordVectors) -> None:
    assert read.rows == expected.rows
    assert read.vectors_ND.dtype == np.float32
    assert np.array_equal(read.vectors_ND, expected.vectors_ND)


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_recognised_and_gives_the_numbers_back(tmp_path, format, compressed):
    vectors = _random_vectors(WORDS, 7)
    data = _encode(vectors, format)
    path = _write(tmp_path / "vectors", gzip.compress(data) if compressed else data)
    _assert_same(read_vectors(path), vectors)
    _assert_same(read_vectors(path, format=format), vectors)


@pytest.mark.parametrize(
    ("format", "newline"),
    [("word2vec-binary", b""), ("word2vec", b" \n"), ("word2vec", b"\r\n"), ("glove", b" \n"), ("glove", b"\r\n")],
)
def test_ends_of_records_may_differ(tmp_path, format, newline):
    vectors = _random_vectors(WORDS, 7)
    _assert_same(read_vectors(_write(tmp_path / "vectors", _encode(vectors, format, newline))), vectors)


def test_separators_may_be_tabs_and_the_last_line_may_lack_its_end(tmp_path):
    vectors = _random_vectors(WORDS, 7)
    data = _encode(vectors, "glove").replace(b" ", b"\t").rstrip()
    _assert_same(read_vectors(_write(tmp_path / "vectors", data)), vectors)


def test_words_with_spaces_are_read_whole_and_of_a_word_that_comes_twice_the_first(tmp_path):
    words = [". . .", "the", "at name@domain.com", "twice", "1 a", "other"]
    vectors = _random_vectors(words, 4)
    again = WordVectors({"twice": 0}, np.ones((1, 4), dtype=np.float32))
    data = _encode(vectors, "glove") + _encode(again, "glove")
    _assert_same(read_vectors(_write(tmp_path / "vectors", data)), vectors)


@pytest.mark.parametrize("format", FORMATS)
def test_only_wanted_words_are_kept(tmp_path, format):
    vectors = _random_vectors(WORDS, 7)
    path = _write(tmp_path / "vectors", _encode(vectors, format))
    rows = [WORDS.index(word) for word in ("café", "1990")]
    expected = WordVectors({"café": 0, "1990": 1}, vectors.vectors_ND[rows])
    _assert_same(read_vectors(path, {"1990", "café", "missing"}), expected)
    _assert_same(read_vectors(path, lambda word: word in ("café", "1990")), expected)
    nothing = read_vectors(path, {"missing"})
    assert (nothing.rows, nothing.vectors_ND.shape) == ({}, (0, 7))


@pytest.mark.parametrize("format", FORMATS)
def test_a_large_file_streams_through(tmp_path, format):
    words = [f"word{i}" for i in range(20_000 if format == "word2vec-binary" else 5_000)]
    vectors = _random_vectors(words, 64)
    path = _write(tmp_path / "vectors", _encode(vectors, format))
    assert path.stat().st_size > 3_000_000
    wanted = set(words[::500])
    tracemalloc.start()
    read = read_vectors(path, wanted)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_200_000  # pieces of 256 KiB
    assert list(read.rows) == words[::500]
    assert np.array_equal(read.vectors_ND, vectors.vectors_ND[::500])


def test_a_vector_may_be_larger_than_a_piece_of_the_file(tmp_path):
    vectors = _random_vectors(WORDS, 2**16)
    _assert_same(read_vectors(_write(tmp_path / "vectors", _encode(vectors, "word2vec-binary"))), vectors)


TEXT = b"3 2\nthe 1 2\nof 3 4\nand 5 6\n"
BINARY = b"2 2\nthe " + np.array([1, 2], "<f4").tobytes() + b"\nof " + np.array([3, 4], "<f4").tobytes() + b"\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "FILE: is empty"),
        (b"\n", "FILE:1: not a vector file"),
        (b"it was a dark night\n", "FILE:1: not a vector file .*; 'night' is no number"),
        (b"PK\x03\x04\x00\x00", "FILE:1: not a vector file .*unpack a .zip"),
        (b"the 1 x 3 4\nof 1 2 3 4\n", "FILE:1: .*; 'x' is no number"),
        (b"the 1 2 3\nof 1 2\n", "FILE:2: 2 numbers after the word, but line 1 has 3"),
        (b"the 1 2 3\nof 1 2 3 4\n", "FILE:2: 4 numbers after the word, but line 1 has 3"),
        (b"the 1 2 3\n4 5 6\n", "FILE:2: 2 numbers after the word, but line 1 has 3"),
        (b"the 1 2 3\nof 1 2\xff 3\n", "FILE:2: '2\ufffd' is no number"),
        (b"the 1 2 3\nof 1 2  \n", "FILE:2: 2 numbers after the word, but line 1 has 3"),
        (b"the 1 2 3\nof 1 nan 3\n", "FILE:2: a number of 'of' is not finite"),
        (b"the 1 2 3\nof 1 1e39 3\n", "FILE:2: a number of 'of' is not finite"),
        (TEXT.replace(b"3 2", b"4 2"), "FILE: line 1 says 4 words, but 3 lines follow it"),
        (TEXT.replace(b"3 2", b"2 2"), "FILE: line 1 says 2 words, but 3 lines follow it"),
        (TEXT.replace(b"3 2", b"3 3"), "FILE:2: 2 numbers after the word, but line 1 says 3"),
        (TEXT.replace(b"3 2", b"0 2"), "FILE:1: no vector file has 0 vectors of 2 numbers"),
        (BINARY[:-6], "FILE: cut off in word 2 of the 2"),
        (BINARY.replace(b"2 2\n", b"3 2\n"), "FILE: cut off in word 3 of the 3"),
        (BINARY.replace(b"2 2\n", b"1 2\n"), "FILE: goes on after the 1 words of 2 numbers"),
        (BINARY.replace(b"2 2\n", b"2 3\n"), "FILE: cut off in word 2 of the 2"),
        (BINARY[:-9] + np.array([3, np.inf], "<f4").tobytes(), "FILE: word 2: a number of 'of' is not finite"),
        (BINARY[:16] + b"o" * 5000 + BINARY[16:], "FILE: word 2: no end of the word in 4096 bytes"),
        (gzip.compress(TEXT)[:-9], "FILE: not a whole gzip file"),
        (gzip.compress(TEXT)[:-8] + bytes(8), "FILE: not a whole gzip file"),
    ],
)
def test_a_damaged_file_is_refused_with_its_place(tmp_path, data, message):
    path = _write(tmp_path / "vectors", data)
    with pytest.raises(ValueError, match=f"^{message.replace('FILE', str(path))}") as error:
        read_vectors(path)
    assert "\n" not in str(error.value)


def test_ragged_rows_are_refused_even_of_words_that_nobody_wants(tmp_path):
    path = _write(tmp_path / "vectors", b"the 1 2 3\nof 1 2\nand 1 2 3\n")
    with pytest.raises(ValueError, match=":2: 2 numbers"):
        read_vectors(path, {"the", "and"})


@pytest.mark.parametrize(
    ("data", "format", "message"),
    [
        (TEXT, "glove", ":1: not a vector file"),
        (TEXT[4:], "word2vec", ":1: must be 'count size' in format word2vec"),
        (TEXT, "word2vec-binary", ": cut off in word"),
        (BINARY, "word2vec", "(numbers after the word|is no number)"),
        (TEXT, "fasttext", "^format must be one of auto, word2vec, word2vec-binary, glove, got 'fasttext'"),
    ],
)
def test_a_format_that_is_given_is_not_guessed(tmp_path, data, format, message):
    with pytest.raises(ValueError, match=message):
        read_vectors(_write(tmp_path / "vectors", data), format=format)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=f"^{path}: cannot be read: "):
            read_vectors(path)


def _refusal(path: Path) -> str:
    try:
        vectors = read_vectors(path)
    except ValueError as error:
        return str(error)
    assert np.isfinite(vectors.vectors_ND).all()
    assert len(vectors.rows) == len(vectors.vectors_ND)
    return ""


@pytest.mark.parametrize("format", FORMATS)
def test_no_damage_ends_in_anything_but_a_line_that_names_the_file(tmp_path, format):
    whole = _encode(_random_vectors(WORDS, 3), format)
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(random.integers(1, 4)):
            at = int(random.integers(len(data)))
            if random.integers(2):
                del data[at : at + int(random.integers(1, 30))]
            else:
                data[at : at + 1] = random.bytes(int(random.integers(0, 4)))
        path = _write(tmp_path / "vectors", bytes(data))
        message = _refusal(path)
        assert message.startswith(f"{path}:") or not message, data
        assert "\n" not in message, data
        refused += bool(message)
    assert 25 < refused < 150  # some damage is to a word, or makes one number of another


def _byte_level_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["the café The Paris PARIS the 日本 river", "the dog café Paris river the unknown"]
    tokenizer.train_from_iterator(text * 5, trainer)
    tokenizer.add_tokens(["New York"])
    return tokenizer


class Embedded(nn.Module):
    """Nothing but an embedding at a language model's initial scale."""

    def __init__(self, tokenizer: Tokenizer, channels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.embedding = nn.Parameter(torch.randn(tokenizer.get_vocab_size(), channels, generator=generator) * 0.02)


def _cosines(left: torch.Tensor, right: np.ndarray) -> np.ndarray:
    a = left.detach().double().numpy()
    return np.asarray((a * right).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(right, axis=-1))


def test_tokens_of_a_byte_level_tokenizer_get_the_vector_of_the_word_they_spell():
    tokenizer = _byte_level_tokenizer()
    vectors = _random_vectors(["the", "The", "café", "Paris", "paris", "日本", "New York", "<|end|>", "r", "zebra"], 12)
    model = Embedded(tokenizer, 12)
    before = model.embedding.detach().clone()
    coverage = initialise_embedding(model, tokenizer, vectors)

    used = ["the", "The", "café", "Paris", "paris", "日本", "New York", "r"]  # not a special token, not a strange word
    centred = vectors.vectors_ND - vectors.vectors_ND[[vectors.rows[word] for word in used]].mean(axis=0)
    expected = {
        "the": "the",
        "Ġthe": "the",
        "ĠThe": "The",
        "cafÃ©": "café",
        "ĠcafÃ©": "café",
        "ĠParis": "Paris",
        "ĠPARIS": "paris",
        "ĠæĹ¥æľ¬": "日本",
        "New York": "New York",
        "r": "r",
        "Ġr": "r",
    }
    vocabulary = tokenizer.get_vocab()
    found = {token: word for token, word in expected.items() if token in vocabulary}
    assert {"the", "Ġthe", "ĠcafÃ©", "ĠParis", "ĠPARIS", "ĠæĹ¥æľ¬", "New York", "r"} <= found.keys()
    closest = {}
    for row in coverage.rows_R.tolist():
        closest[row] = max(used, key=lambda word: _cosines(model.embedding[row], centred[vectors.rows[word]]))
    words = {token: closest[index] for token, index in vocabulary.items() if index in closest}
    assert {token: word for token, word in words.items() if token in found} == found
    assert set(words) - set(found) <= {"Ġ日本", "The", "Paris", "PARIS", "R"}  # nothing that spells no such word
    assert coverage.rows_R.tolist() == sorted(closest)
    assert coverage.lower_case == len({"ĠPARIS", "PARIS", "R"} & words.keys())

    rest = torch.ones(len(before), dtype=torch.bool)
    rest[coverage.rows_R] = False
    assert torch.equal(model.embedding[rest], before[rest])


def test_a_token_that_shares_its_vector_with_none_gets_exactly_its_direction_at_the_initial_scale():
    tokenizer = _byte_level_tokenizer()
    vectors = _random_vectors(["日本", "New York", "the"], 12)
    model = Embedded(tokenizer, 12)
    scale = model.embedding.detach().square().mean().sqrt().item()
    initialise_embedding(model, tokenizer, vectors)
    centred = vectors.vectors_ND - vectors.vectors_ND.mean(axis=0)
    alone = model.embedding[[tokenizer.token_to_id("ĠæĹ¥æľ¬"), tokenizer.token_to_id("New York")]]
    np.testing.assert_allclose(_cosines(alone, centred[:2]), 1.0, atol=1e-6)
    shared = model.embedding[[tokenizer.token_to_id("the"), tokenizer.token_to_id("Ġthe")]]
    assert not torch.equal(shared[0], shared[1])  # a tied softmax can tell them apart
    assert (_cosines(shared, centred[[2, 2]]) > 0.85).all()
    rows = torch.cat((alone, shared)).detach()
    torch.testing.assert_close(rows.square().mean(dim=1).sqrt(), torch.full((4,), scale))


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (
            Tokenizer(models.WordLevel({"<unk>": 0, "dog": 1, "Cat": 2, "x": 3}, unk_token="<unk>")),
            {1: "dog", 2: "cat"},
        ),
        (
            Tokenizer(models.WordPiece({"[UNK]": 0, "dog": 1, "##cat": 2, "##s": 3}, unk_token="[UNK]")),
            {1: "dog", 2: "cat"},
        ),
        (
            Tokenizer(models.Unigram([("<unk>", 0.0), ("▁dog", -1.0), ("cat", -2.0), ("▁", -3.0)], 0)),
            {1: "dog", 2: "cat"},
        ),
    ],
    ids=["words", "WordPiece", "unigram"],
)
@pytest.mark.parametrize("with_decoder", [False, True])
def test_tokens_of_other_tokenizers_spell_words_too(tokenizer, expected, with_decoder):
    if with_decoder and isinstance(tokenizer.model, models.WordPiece):
        tokenizer.decoder = decoders.WordPiece()
    elif with_decoder and isinstance(tokenizer.model, models.Unigram):
        tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken("bird", special=True)])
    vectors = _random_vectors(["dog", "cat", "bird"], 3)
    model = Embedded(tokenizer, 3)
    assert initialise_embedding(model, tokenizer, vectors).rows_R.tolist() == list(expected)
    centred = vectors.vectors_ND[:2] - vectors.vectors_ND[:2].mean(axis=0)
    given = centred[[vectors.rows[word] for word in expected.values()]]
    np.testing.assert_allclose(_cosines(model.embedding[list(expected)], given), 1.0, atol=1e-6)


def test_wanted_words_are_all_that_initialising_needs(tmp_path):
    tokenizer = _byte_level_tokenizer()
    wanted = wanted_words(tokenizer)
    assert {"the", "café", "日本", "PARIS", "paris", "New York"} <= wanted
    assert not {"<|end|>", "Ġthe", " the", ""} & wanted
    vectors = _random_vectors(["zebra", *sorted(wanted - {"\0"}), "yak"], 5)
    path = _write(tmp_path / "vectors.gz", gzip.compress(_encode(vectors, "word2vec")))
    some, every = Embedded(tokenizer, 4), Embedded(tokenizer, 4)
    initialise_embedding(some, tokenizer, read_vectors(path, wanted))
    initialise_embedding(every, tokenizer, read_vectors(path))
    assert torch.equal(some.embedding, every.embedding)


def _words_tokenizer(size: int = VOCABULARY) -> Tokenizer:
    return Tokenizer(models.WordLevel({f"word{i}": i for i in range(size)}, unk_token="word0"))


def test_larger_vectors_keep_the_most_of_their_variance():
    tokenizer = _words_tokenizer(40)
    words = [f"word{i}" for i in range(30)]
    vectors = _random_vectors(words, 20)
    vectors.vectors_ND[:] = vectors.vectors_ND * np.linspace(3.0, 0.1, 20, dtype=np.float32) + 5.0
    model = Embedded(tokenizer, 6)
    coverage = initialise_embedding(model, tokenizer, vectors)
    centred = vectors.vectors_ND.astype(np.float64)
    centred -= centred.mean(axis=0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    assert coverage.variance == pytest.approx((singular[:6] ** 2).sum() / (singular**2).sum())
    assert f"{coverage.variance:.1%} of the variance" in str(coverage)
    best = left[:, :6] * singular[:6]
    best /= np.linalg.norm(best, axis=1, keepdims=True)
    rows = model.embedding[:30].detach().double().numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(np.abs(rows), np.abs(best), atol=1e-5)  # but for the signs of the directions
    np.testing.assert_allclose(rows @ rows.T, best @ best.T, atol=1e-5)


def test_smaller_vectors_leave_the_other_channels_as_they_are():
    tokenizer = _words_tokenizer(40)
    vectors = _random_vectors([f"word{i}" for i in range(30)], 6)
    model = Embedded(tokenizer, 20)
    before = model.embedding.detach().clone()
    coverage = initialise_embedding(model, tokenizer, vectors)
    assert coverage.variance == 1.0
    assert torch.equal(model.embedding[:, 6:], before[:, 6:])
    assert torch.equal(model.embedding[30:], before[30:])
    centred = vectors.vectors_ND - vectors.vectors_ND.mean(axis=0)
    np.testing.assert_allclose(_cosines(model.embedding[:30, :6], centred), 1.0, atol=1e-6)
    scale = before.square().mean().sqrt()
    torch.testing.assert_close(model.embedding[:30, :6].square().mean(dim=1).sqrt(), scale.expand(30))


def test_a_vector_of_zeros_covers_nothing():
    vectors = _random_vectors(["word1", "word2", "word3"], 4)
    vectors.vectors_ND[1] = 0.0
    tokenizer = _words_tokenizer()
    assert initialise_embedding(Embedded(tokenizer, 4), tokenizer, vectors).rows_R.tolist() == [1, 3]


def test_coverage_counts_tokens_and_running_tokens():
    tokenizer = _words_tokenizer(10)
    counts = np.array([5, 100, 50, 0, 20, 7, 7, 0, 1, 10, 800])  # an id that no token has
    vectors = _random_vectors(["word1", "word4", "word3"], 4)
    plain = initialise_embedding(Embedded(tokenizer, 4), tokenizer, vectors)
    assert (plain.rows_R.tolist(), plain.tokens, plain.share) == ([1, 3, 4], 10, 0.3)
    assert (plain.running_share, plain.uncovered) == (None, ())
    assert str(plain).startswith("word vectors cover 3 of 10 tokens (30.0%)")
    assert "\n" not in str(plain)
    coverage = initialise_embedding(Embedded(tokenizer, 4), tokenizer, vectors, counts_V=counts[:10])
    assert coverage.running_share == pytest.approx(120 / 200)
    assert coverage.uncovered == (("word2", 50), ("word9", 10), ("word5", 7), ("word6", 7), ("word0", 5), ("word8", 1))
    assert "60.0% of the running tokens" in str(coverage)
    assert "'word2' (50), 'word9' (10)" in str(coverage)


@pytest.mark.parametrize(
    ("words", "rows", "counts", "message"),
    [
        (["word1", "word2"], 9, None, "embedding has 9 rows, the tokenizer ids up to 9"),
        (["word1", "word2"], 10, 9, "counts_V must have a number for each of 10 ids, got shape \\(9,\\)"),
        (["word1", "dog"], 10, None, "vectors: 1 of the tokenizer's words have one"),
        (["dog", "cat"], 10, None, "vectors: 0 of the tokenizer's words have one"),
    ],
)
def test_vectors_that_do_not_fit_are_refused_and_change_nothing(words, rows, counts, message):
    model = Embedded(_words_tokenizer(rows), 4)
    before = model.embedding.detach().clone()
    counts_V = None if counts is None else np.ones(counts, dtype=np.int64)
    with pytest.raises(ValueError, match=f"^{message}"):
        initialise_embedding(model, _words_tokenizer(10), _random_vectors(words, 4), counts_V=counts_V)
    assert torch.equal(model.embedding, before)


def _language_model() -> LanguageModel:
    torch.manual_seed(4)
    stack = StackConfig(layers=1, hidden=10)
    fine = LevelConfig(width=8, encoder=stack, decoder=stack)
    coarse = LevelConfig(width=12, stride=2, encoder=stack)
    return LanguageModel(ModelConfig(vocab_size=VOCABULARY, context_length=CONTEXT, levels=(fine, coarse)))


@pytest.fixture
def shards(tmp_path):
    return write_tiny_shards(tmp_path / "shards")


VECTORS = _random_vectors([f"word{i}" for i in range(0, VOCABULARY, 2)], 10)
FROZEN = torch.arange(0, VOCABULARY, 2)


def _initialised(freeze: bool = True) -> LanguageModel:
    model = _language_model()
    coverage = initialise_embedding(model, _words_tokenizer(), VECTORS)
    assert torch.equal(coverage.rows_R, FROZEN)
    if freeze:
        freeze_rows(model, coverage.rows_R)
    return model


def _moved(model: LanguageModel) -> torch.Tensor:
    return torch.nonzero((model.embedding != _initialised().embedding).any(dim=1))[:, 0]


def test_training_leaves_frozen_rows_as_they_are_bit_for_bit_and_moves_all_others(shards):
    model = _initialised()
    trainer = train(tiny_trainer(shards, CONFIG, model))
    assert trainer.step == CONFIG.steps > 10
    others = torch.arange(1, VOCABULARY, 2)
    assert torch.equal(_moved(model), others)
    tuned = _initialised(freeze=False)
    train(tiny_trainer(shards, CONFIG, tuned))
    assert torch.equal(_moved(tuned), torch.arange(VOCABULARY))


def test_only_the_gradient_of_frozen_rows_is_gone(shards):
    config = replace(CONFIG, steps=1, gradient_clip=0.0)
    frozen, tuned = _initialised(), _initialised(freeze=False)
    train(tiny_trainer(shards, config, frozen))
    train(tiny_trainer(shards, config, tuned))
    assert frozen.embedding.grad is not None
    assert tuned.embedding.grad is not None
    assert tuned.embedding.grad[FROZEN].all(dim=1).all()
    assert not frozen.embedding.grad[FROZEN].any()
    tuned.embedding.grad[FROZEN] = 0.0
    for (name, ours), theirs in zip(frozen.named_parameters(), tuned.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad), name


def test_a_resumed_run_is_the_same_if_the_rows_are_frozen_again(shards):
    whole = train(tiny_trainer(shards, CONFIG, _initialised()))
    states = []
    first = tiny_trainer(shards, CONFIG, _initialised())
    train(first, should_stop=stop_after(first, 6), on_checkpoint=states.append)
    assert states[-1]["step"] == 6

    model = _language_model()
    freeze_rows(model, FROZEN)
    resumed = tiny_trainer(shards, CONFIG, model)
    resumed.load_state_dict(states[-1])  # in place: the hook stays
    assert_same_training(train(resumed), whole)

    forgotten = tiny_trainer(shards, CONFIG, _language_model())
    forgotten.load_state_dict(states[-1])
    train(forgotten)
    assert torch.equal(_moved(forgotten.model), torch.arange(VOCABULARY))


def test_a_saved_model_holds_the_rows_but_not_that_they_are_frozen(shards, tmp_path):
    model = _initialised()
    train(tiny_trainer(shards, CONFIG, model))
    tokenizer_file = tmp_path / "tokenizer.json"
    _words_tokenizer().save(str(tokenizer_file))
    save_model(tmp_path / "model", model, tokenizer_file)
    loaded, _ = load_model(tmp_path / "model")
    assert torch.equal(loaded.embedding, model.embedding)
    freeze_rows(loaded, FROZEN[:3])
    train(tiny_trainer(shards, CONFIG, loaded))
    assert torch.equal(_moved(loaded), torch.tensor([i for i in range(VOCABULARY) if i not in (0, 2, 4)]))


def test_rows_thaw_when_the_hook_is_removed(shards):
    model = _initialised(freeze=False)
    hook = freeze_rows(model, FROZEN)
    hook.remove()
    train(tiny_trainer(shards, replace(CONFIG, steps=1), model))
    assert torch.equal(_moved(model), torch.arange(VOCABULARY))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_rows_of_a_sharded_model_can_be_frozen(tmp_path):
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    model = _initialised(freeze=False)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
        register_fsdp_forward_method(model, "token_losses")
        freeze_rows(model, FROZEN)
        ids = torch.arange(16).view(2, 8)
        for _ in range(2):  # the second adds to the gradient of the first
            model.token_losses(ids, ids + 1).sum().backward()
        has_gradient_V = model.embedding.grad.to_local().any(dim=1)
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(torch.nonzero(has_gradient_V)[:, 0], torch.arange(1, VOCABULARY, 2))


@pytest.mark.parametrize("row", [-1, VOCABULARY])
def test_a_row_that_does_not_exist_cannot_be_frozen(row):
    with pytest.raises(ValueError, match=f"^rows_R must be from 0 to {VOCABULARY - 1}"):
        freeze_rows(_language_model(), torch.tensor([0, row]))
