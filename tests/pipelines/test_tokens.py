import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipelines.documents import SPLITS, split_of
from pipelines.errors import DataError
from pipelines.files import sha256_file
from pipelines.steps import tokens
from pipelines.store import OutputFolder, StepOutput
from tests.pipelines.corpora import RULE, make_texts, token_task, write_shard

SPECIAL = ["<|endoftext|>", "<|pad|>", "[SEP]"]
ODD = [
    "<|endoftext|>",
    "an <|endoftext|> inside, <|pad|> and [SEP]",
    "<|pad|> and [SEP] alone",
    " leading and trailing  ",
    "\r\n\x00\x7f\u2028\ufeff",
    "e\u0301 vs \u00e9, \U0001f3f3\ufe0f\u200d\U0001f308, \u0627\u0644, 試験",
    "don't we'll I'M 1,234.56 x" * 40,
    "a" * 5000,
    "<|endoftext",
    "|>",
]
TEXTS = [*make_texts(300), *ODD, *make_texts(300, seed=1)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer with more special tokens than the one that ends a document."""
    output = OutputFolder(str(tmp_path_factory.mktemp("steps") / "tokenizer-0123456789ab"))
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    output.write_bytes("tokenizer.json", made.to_str().encode())
    output.finish({"vocab_size": made.get_vocab_size(), "sha256": sha256_file(output.local("tokenizer.json"))}, 0.0)
    return StepOutput(output.uri)


@pytest.fixture
def output(tmp_path):
    return OutputFolder(str(tmp_path / "tokens-0123456789ab"))


def reference(tokenizer: StepOutput) -> Tokenizer:
    encoder = Tokenizer.from_file(str(tokenizer.local("tokenizer.json")))
    encoder.encode_special_tokens = True
    return encoder


def check_files(output: OutputFolder, texts: list[str | None], tokenizer: StepOutput) -> None:
    """Compare what was written, document by document, to encoding each text alone with the reference."""
    encoder = reference(tokenizer)
    end = encoder.token_to_id("<|endoftext|>")
    note = output.read_json("notes/00000-of-00001.json")
    for split in SPLITS:
        mine = [text for text in texts if text and split_of(text, 0.2, 0.2) == split]
        flat = np.load(output.local(f"tokens/{split}-00000-of-00001.npy"))
        table = np.load(output.local(f"tokens/{split}-00000-of-00001.docs.npy"))
        assert (flat.dtype, table.dtype, table.shape) == (np.uint16, np.int64, (len(mine), 3))
        documents = np.split(flat, table[:, 0].cumsum()[:-1]) if mine else []
        for text, ids, row in zip(mine, documents, table.tolist(), strict=True):
            expected = encoder.encode(text, add_special_tokens=False).ids
            assert end not in expected
            assert ids.tolist() == [*expected, end]
            assert row == [len(expected) + 1, len(text.encode()), len(text.split()) + text.count("\n") + 1]
        assert note["splits"][split] == {
            "name": f"{split}-00000-of-00001",
            "documents": len(mine),
            **dict(zip(("tokens", "bytes", "words"), table.sum(axis=0).tolist(), strict=True)),
            "sha256": sha256_file(output.local(f"tokens/{split}-00000-of-00001.npy")),
            "docs_sha256": sha256_file(output.local(f"tokens/{split}-00000-of-00001.docs.npy")),
        }


def test_tokens_are_those_of_the_reference(tmp_path, tokenizer, output):
    file = write_shard(tmp_path / "a.parquet", [None, *TEXTS, ""])
    assert tokens.tokenize_shard(token_task(file, tokenizer, output)) == {"label": "00000-of-00001"}
    check_files(output, TEXTS, tokenizer)
    note = output.read_json("notes/00000-of-00001.json")
    assert (note["engine"], note["reason"], note["source"]["rows"]) == ("gigatoken", "", len(TEXTS) + 2)


def test_special_tokens_that_no_sample_meets_are_text_too(tmp_path, tokenizer, output):
    texts = [*make_texts(50, seed=2), *ODD]
    file = write_shard(tmp_path / "a.parquet", texts)
    tokens.tokenize_shard(token_task(file, tokenizer, output, checked=1))
    check_files(output, texts, tokenizer)


@pytest.mark.parametrize("texts", [[], [None, ""], [TEXTS[0]]])
def test_splits_without_documents_have_files_without_tokens(tmp_path, tokenizer, output, texts):
    file = write_shard(tmp_path / "a.parquet", texts)
    tokens.tokenize_shard(token_task(file, tokenizer, output))
    check_files(output, texts, tokenizer)
    assert len(output.sizes("tokens")) == 6


@given(st.lists(st.text() | st.sampled_from([*SPECIAL, "\n\n", "  ", "'s", "試", "\U0001f642"]), max_size=8))
@settings(max_examples=100, deadline=None)
def test_both_engines_agree_on_any_text(tokenizer, pieces):
    text = "".join(pieces)
    file = tokenizer.local("tokenizer.json")
    for texts in ([text], pieces):
        fast, slow = tokens.encode_fast(file, texts), tokens.encode_reference(file, texts)
        assert [ids.tolist() for ids in fast] == [ids.tolist() for ids in slow]
    decoded = reference(tokenizer).decode(slow[-1].tolist(), skip_special_tokens=False) if pieces else ""
    assert decoded == (pieces[-1] if pieces else "")


@pytest.mark.parametrize("fault", ["differs", "fails"])
def test_a_shard_whose_tokens_differ_is_done_by_the_reference(tmp_path, tokenizer, output, monkeypatch, fault):
    honest = tokens.encode_fast

    def encode(file, texts):
        ids = honest(file, texts)
        if fault == "fails":
            raise RuntimeError("not implemented")
        return [ids[0][::-1], *ids[1:]]

    monkeypatch.setattr(tokens, "encode_fast", encode)
    file = write_shard(tmp_path / "a.parquet", TEXTS)
    tokens.tokenize_shard(token_task(file, tokenizer, output))
    check_files(output, TEXTS, tokenizer)
    note = output.read_json("notes/00000-of-00001.json")
    assert note["engine"] == "tokenizers"
    expected = {"differs": "gigatoken differs in sampled document 0", "fails": "gigatoken failed: not implemented"}
    assert note["reason"].startswith(expected[fault])


def test_a_shard_that_changed_since_the_corpus_step_is_refused(tmp_path, tokenizer, output):
    file = write_shard(tmp_path / "a.parquet", TEXTS)
    task = token_task(file, tokenizer, output)
    write_shard(file, TEXTS[:-1])
    with pytest.raises(DataError, match=r"a\.parquet changed since the corpus step"):
        tokens.tokenize_shard(task)
    assert output.sizes() == {}


def test_the_same_shard_gives_the_same_files(tmp_path, tokenizer):
    file = write_shard(tmp_path / "a.parquet", TEXTS)
    outputs = [OutputFolder(str(tmp_path / f"tokens-{i}")) for i in range(2)]
    for output in outputs:
        tokens.tokenize_shard(token_task(file, tokenizer, output))
    one, two = ({name: output.read_bytes(name) for name in output.sizes()} for output in outputs)
    assert one == two


@pytest.mark.parametrize(
    ("text", "words"), [("", 1), ("a", 2), ("a b\u00a0c", 4), ("\n", 2), ("one two\n\nthree\n", 7), (" a  ", 2)]
)
def test_words_are_those_between_white_space_and_every_end_of_a_line_or_document(text, words):
    assert tokens.count_words(text) == words


def test_ids_that_do_not_fit_16_bits_get_32():
    assert tokens.token_dtype(1 << 16) is np.uint16
    assert tokens.token_dtype((1 << 16) + 1) is np.uint32


def test_a_vocabulary_beyond_16_bits_keeps_its_ids(tmp_path, tokenizer):
    data = json.loads(tokenizer.read_bytes("tokenizer.json"))
    vocab = data["model"]["vocab"]
    vocab.update({f"unused{i}": i for i in range(len(vocab), 70_000)})
    vocab["the"], vocab["unused69999"] = 69_999, vocab.get("the", 69_998)
    data["model"]["merges"] = [["t", "h"], ["th", "e"]]
    vocab.setdefault("th", vocab.pop("unused69998"))
    large = OutputFolder(str(tmp_path / "tokenizer-1"))
    large.write_json("tokenizer.json", data)
    output = OutputFolder(str(tmp_path / "tokens-1"))
    file = write_shard(tmp_path / "a.parquet", ["the"])
    tokens.tokenize_shard(
        {**token_task(file, large, output), "rule": {**RULE, "valid_fraction": 0, "test_fraction": 0}}
    )
    flat = np.load(output.local("tokens/train-00000-of-00001.npy"))
    assert (flat.dtype, flat.tolist()) == (np.uint32, [69_999, 0])
