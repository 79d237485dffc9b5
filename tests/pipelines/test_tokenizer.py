import hashlib
import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pipelines.errors import ConfigError, DataError
from pipelines.sources import read_tokenizer_file
from pipelines.steps import tokenizer as step
from pipelines.store import OutputFolder, Storage
from tests.pipelines.corpora import corpus_config, finish_corpus, make_texts, specs_of, write_shard

TEXTS = make_texts(200)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    write_shard(root / "shards" / "a.parquet", TEXTS)
    write_shard(root / "shards" / "b.parquet", make_texts(200, seed=1))
    write_shard(root / "shards" / "c.parquet", [])
    return finish_corpus(specs_of(corpus_config(root / "shards"))["corpus"], Storage(str(root / "steps")))


def train(corpus, output, vocab_size=300, sample_bytes=1_000_000):
    config = {"path": None, "vocab_size": vocab_size, "sample_bytes": sample_bytes}
    return step.run(config, {"corpus": corpus}, output)


def byte_level(**options):
    """Return a small tokenizer of bytes, as people bring them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=options.get("prefix", False))
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=options.get("special", ["<|endoftext|>"]),
        initial_alphabet=options.get("alphabet", pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def use(file, output):
    """Run the step with a tokenizer that is given by path."""
    config = {"path": str(file), "vocab_size": 8192, "sha256": read_tokenizer_file(str(file))[1]}
    return step.run(config, {}, output)


def test_training_gives_the_same_bytes_every_time(corpus, tmp_path):
    outputs = [OutputFolder(str(tmp_path / f"tokenizer-{i}")) for i in range(2)]
    results = [train(corpus, output) for output in outputs]
    one, two = (output.read_bytes("tokenizer.json") for output in outputs)
    assert one == two
    assert results[0] == results[1] == {"sha256": hashlib.sha256(one).hexdigest(), "vocab_size": 300}


def test_a_trained_tokenizer_gives_back_any_text(corpus, tmp_path):
    output = OutputFolder(str(tmp_path / "tokenizer-0"))
    train(corpus, output)
    tokenizer = Tokenizer.from_file(str(output.local("tokenizer.json")))
    step.check_tokenizer(tokenizer, "trained")
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    text = "Ωmega\x00\r\n\t 한국어 🏳️‍🌈 <|endoftext|> " + "".join(map(chr, range(0x2000, 0x2100)))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert 0 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_merges_are_learnt_from_the_train_split_alone(corpus, tmp_path):
    manifest = corpus.read_json("manifest.json")
    everything = OutputFolder(str(tmp_path / "corpus-0123456789ab"))
    everything.write_json("manifest.json", {**manifest, "valid_fraction": 0.0, "test_fraction": 0.0})
    results = [train(c, OutputFolder(str(tmp_path / f"tokenizer-{i}"))) for i, c in enumerate((corpus, everything))]
    assert results[0]["sha256"] != results[1]["sha256"]


def test_a_sample_takes_an_equal_part_of_every_shard(corpus):
    pieces = list(step._sample(3000, corpus))
    assert all(piece for piece in pieces)
    parts = {seed: sum(len(p.encode()) for p in pieces if p.startswith(f"{seed}/")) for seed in (0, 1)}
    for part in parts.values():
        assert 1000 <= part < 1000 + 3 * 1000, "the last piece may be cut by characters, not by bytes"
    assert "".join(step._sample(10**9, corpus)).count("0/") > 50, "all of it where it is small"


def test_a_vocabulary_larger_than_the_text_can_give_is_what_it_gives(corpus, tmp_path, caplog):
    result = train(corpus, OutputFolder(str(tmp_path / "tokenizer-0")), vocab_size=20_000)
    assert 300 < result["vocab_size"] < 20_000
    assert f"gives {result['vocab_size']} tokens only, not 20000" in caplog.text


def test_a_given_tokenizer_is_used_as_it_is(tmp_path):
    file = tmp_path / "mine.json"
    byte_level(special=["<pad>", "<|endoftext|>"]).save(str(file))
    output = OutputFolder(str(tmp_path / "tokenizer-0"))
    result = use(file, output)
    assert output.read_bytes("tokenizer.json") == file.read_bytes()
    assert result == {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "vocab_size": 280}


@pytest.mark.parametrize("length", [3, 5000])
def test_a_given_tokenizer_that_cuts_or_pads_no_longer_does(tmp_path, length):
    tokenizer = byte_level()
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    tokenizer.save(str(tmp_path / "mine.json"))
    output = OutputFolder(str(tmp_path / "tokenizer-0"))
    result = use(tmp_path / "mine.json", output)
    kept = Tokenizer.from_file(str(output.local("tokenizer.json")))
    assert (kept.truncation, kept.padding) == (None, None)
    assert kept.encode("word " * 4000).ids == byte_level().encode("word " * 4000).ids
    assert result["sha256"] == hashlib.sha256(output.read_bytes("tokenizer.json")).hexdigest()


def test_a_given_tokenizer_that_changed_since_the_plan_is_refused(tmp_path):
    file = tmp_path / "mine.json"
    byte_level().save(str(file))
    config = {"path": str(file), "vocab_size": 8192, "sha256": "of another"}
    with pytest.raises(DataError, match="changed while the run was starting"):
        step.run(config, {}, OutputFolder(str(tmp_path / "tokenizer-0")))


def broken(name):
    """Return the file of a tokenizer that must not be used."""
    tokenizer = byte_level()
    data = json.loads(tokenizer.to_str())
    if name == "no end of a document":
        return byte_level(special=["<s>", "</s>"]).to_str()
    if name == "an alphabet of this text only":
        return byte_level(alphabet=[]).to_str()
    if name == "no letter q":
        data["model"]["vocab"]["unused"] = data["model"]["vocab"].pop("q")
    if name == "no lead byte of Georgian":
        data["model"]["vocab"]["unused"] = data["model"]["vocab"].pop("á")
    if name == "gaps between ids":
        data["model"]["vocab"]["unused"] = 70_000
    if name == "an end that text can spell":
        data["added_tokens"][0]["special"] = False
    if name == "a space before every text":
        return byte_level(prefix=True).to_str()
    if name == "lower case":
        tokenizer.normalizer = normalizers.Lowercase()
        return tokenizer.to_str()
    if name == "composed characters":
        tokenizer.normalizer = normalizers.NFC()
        return tokenizer.to_str()
    if name == "whole words":
        words = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        return words.to_str()
    return json.dumps(data)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("no end of a document", "no token <|endoftext|>"),
        ("an alphabet of this text only", "does not give back every text"),
        ("no letter q", "does not give back every text"),
        ("no lead byte of Georgian", "does not give back every text"),
        ("gaps between ids", "ids up to 70000"),
        ("an end that text can spell", "must be a special token"),
        ("a space before every text", "does not give back every text"),
        ("lower case", "does not give back every text"),
        ("composed characters", "does not give back every text"),
        ("whole words", "does not give back every text"),
    ],
)
def test_a_tokenizer_that_would_lose_text_is_refused(tmp_path, name, part):
    (tmp_path / "mine.json").write_text(broken(name))
    output = OutputFolder(str(tmp_path / "tokenizer-0"))
    with pytest.raises(ConfigError) as caught:
        use(tmp_path / "mine.json", output)
    assert part in str(caught.value)
    assert output.sizes() == {}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\x00", b'{"model": {"type": "BPE"}}', b"3"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "mine.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"mine\.json is not a tokenizer\.json"):
        use(tmp_path / "mine.json", OutputFolder(str(tmp_path / "tokenizer-0")))
