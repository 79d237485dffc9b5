import hashlib
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.documents import documents_of, read_texts, sha256_of, shard_uri, split_of
from pipelines.errors import DataError
from pipelines.steps.corpus import scan_shard
from pipelines.store import StepOutput
from tests.pipelines.corpora import RULE, flip_a_bit, make_texts, write_bytes_column, write_shard

TEXTS = make_texts(3000)


def fault_of(file, column="text"):
    with pytest.raises(DataError) as caught:
        list(read_texts(str(file), column))
    assert str(file) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "draw"),
    [
        ("", 0.8931675160897388),
        ("a", 0.25379361057584854),
        ("Return the length.", 0.5920782838750134),
        ("naïve 試験 🙂\n", 0.9062149419390815),
    ],
)
def test_the_split_of_a_text_never_changes(text, draw):
    assert int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2.0**64 == draw
    assert split_of(text, 0.0, draw + 1e-9) == "test"
    assert split_of(text, 0.0, draw - 1e-9) == "train"
    assert split_of(text, draw + 1e-9, 0.0) == "valid"


def test_some_texts_and_their_splits_of_a_released_corpus():
    texts = [f"document {i}" for i in range(24)]
    letters = "".join(split_of(text, 0.25, 0.25)[1] for text in texts)
    assert letters == "aaarrraararerrrerrrrrara"


def test_splits_have_about_the_parts_that_were_asked_for():
    counts = Counter(split_of(text, 0.1, 0.2) for text in TEXTS)
    # Four standard deviations of a binomial; a fixed hash either fits or does not.
    assert counts["test"] == pytest.approx(600, abs=4 * 22)
    assert counts["valid"] == pytest.approx(300, abs=4 * 17)
    assert sum(counts.values()) == 3000


@given(st.text(), st.floats(0.01, 0.49), st.floats(0.01, 0.49))
def test_a_test_document_stays_one_when_more_is_asked_for(text, valid, test):
    split = split_of(text, valid, test)
    assert split_of(text, valid / 2, test) in (split, "train")
    if split == "test":
        assert split_of(text, 0.01, 0.49) == "test"


def test_documents_keep_their_order_and_lose_what_is_no_text(tmp_path):
    file = write_shard(tmp_path / "a.parquet", ["one", None, "", "two", " ", "one"])
    assert list(read_texts(str(file), "text")) == ["one", None, "", "two", " ", "one"]
    documents = list(documents_of(str(file), RULE))
    assert [text for _, text in documents] == ["one", "two", " ", "one"]
    assert documents[0] == documents[3], "a text that is there twice is in one split"


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_every_kind_of_text_reads_the_same(tmp_path, kind):
    file = write_shard(tmp_path / "a.parquet", TEXTS, kind, row_group_size=700)
    assert list(read_texts(str(file), "text")) == TEXTS


def test_the_column_is_the_one_of_that_very_name(tmp_path):
    pq.write_table(pa.table({"text.en": ["wrong"], "text": ["right"], "texts": ["wrong"]}), tmp_path / "a.parquet")
    assert list(read_texts(str(tmp_path / "a.parquet"), "text")) == ["right"]
    pq.write_table(pa.table({"body": [{"text": "nested"}], "body.text": ["dotted"]}), tmp_path / "b.parquet")
    assert list(read_texts(str(tmp_path / "b.parquet"), "body.text")) == ["dotted"]


def test_a_huge_document_is_read_whole(tmp_path):
    text = "naïve " * 1_000_000
    file = write_shard(tmp_path / "a.parquet", ["small", text])
    assert list(read_texts(str(file), "text")) == ["small", text]


@pytest.mark.parametrize("bad", [b"caf\xe9", b"\xff", b"\xed\xa0\x80", b"ok \xf0\x9f\x99"])
def test_text_that_is_not_utf8_is_named_with_its_rows(tmp_path, bad):
    file = write_bytes_column(tmp_path / "a.parquet", [b"fine"] * 1500 + [bad])
    assert "text that is not UTF-8 in rows 1024 to 2048" in fault_of(file)


def test_pages_with_a_flipped_bit_are_refused(tmp_path):
    file = write_shard(tmp_path / "a.parquet", TEXTS)
    good = file.read_bytes()
    chunk = pq.read_metadata(file).row_group(0).column(1)
    start, size = chunk.dictionary_page_offset, chunk.total_compressed_size
    for part in (0.2, 0.4, 0.6, 0.8, 0.95):
        file.write_bytes(good)
        flip_a_bit(file, start + int(size * part))
        pq.read_schema(file)  # the footer is whole: a look at it sees nothing
        assert "cannot be read after row" in fault_of(file)


def test_a_shard_that_lost_its_end_or_itself_since_the_plan(tmp_path):
    file = write_shard(tmp_path / "a.parquet", TEXTS)
    file.write_bytes(file.read_bytes()[:2000])
    assert "cannot be read after row 0" in fault_of(file)
    file.unlink()
    assert "cannot be read after row 0" in fault_of(file)


def test_a_column_that_went_missing_since_the_plan(tmp_path):
    file = write_shard(tmp_path / "a.parquet", TEXTS, column="body")
    assert "has no column 'text'" in fault_of(file)


def test_digests_are_the_same_on_a_disk_and_in_an_object_store(tmp_path):
    file = write_shard(tmp_path / "a.parquet", TEXTS)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert sha256_of(str(file)) == sha256_of(f"file://{file}") == sha256_of(f"fsspec+file://{file}") == digest


def test_gathered_shards_lie_in_the_output_and_given_ones_where_they_were(tmp_path):
    corpus = StepOutput(str(tmp_path / "corpus-0123456789ab"))
    assert shard_uri(corpus, "shards/part-00000.parquet") == f"{corpus.uri}/shards/part-00000.parquet"
    assert shard_uri(corpus, "/data/shards/a.parquet") == "/data/shards/a.parquet"
    assert shard_uri(corpus, "s3://bucket/a.parquet") == "s3://bucket/a.parquet"


def test_a_scanned_shard_is_counted_by_split(tmp_path):
    texts = [*TEXTS[:200], None, "", *TEXTS[:3]]
    file = write_shard(tmp_path / "a.parquet", texts, row_group_size=50)
    facts = scan_shard({"name": "a", "uri": str(file), "rule": RULE})
    assert (facts["rows"], facts["empty"], facts["sha256"]) == (205, 2, sha256_of(str(file)))
    for split, counts in facts["splits"].items():
        mine = [text for text in texts if text and split_of(text, 0.2, 0.2) == split]
        assert counts == {"documents": len(mine), "bytes": sum(len(text.encode()) for text in mine)}
    assert all(counts["documents"] for counts in facts["splits"].values())
