import json

import numpy as np
import pytest

from deconv_model.data import SequenceOrder, TokenStream
from tests.deconv_model.tiny import END, write_shards

SHARDS = [[[5, 6, 7], [8]], [], [[9, 10, 11, 12, 13, 14]], [[]], [[1, 2], [3], [4, 5, 6, 7]], []]


def flat(shards):
    return np.array([token for documents in shards for document in documents for token in [*document, END]])


def one_document(tokens):
    """Return shards with so many tokens, the end token included, each at its own value."""
    return [[list(range(1, tokens))]]


def test_reads_every_range_across_shard_ends(tmp_path):
    stream = TokenStream(write_shards(tmp_path, {"train": SHARDS}), "train")
    tokens = flat(SHARDS)
    assert len(stream) == len(tokens)
    for start in range(len(tokens) + 1):
        for length in range(len(tokens) - start + 1):
            ids = stream.read(start, length)
            assert ids.dtype == np.int64
            assert ids.tolist() == tokens[start : start + length].tolist()


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 25), (24, 1), (3, -1)])
def test_refuses_to_read_outside_the_stream(tmp_path, start, length):
    stream = TokenStream(write_shards(tmp_path, {"train": SHARDS}), "train")
    assert len(stream) == 24
    with pytest.raises(IndexError, match="outside"):
        stream.read(start, length)


def test_yields_documents_in_order_with_their_table(tmp_path):
    stream = TokenStream(write_shards(tmp_path, {"train": SHARDS}), "train")
    documents = [[*document, END] for documents in SHARDS for document in documents]
    assert [ids.tolist() for ids in stream.documents()] == documents
    table = stream.document_table()
    assert table.dtype == np.int64
    assert table[:, 0].tolist() == [len(document) for document in documents]
    assert table[:, 1].tolist() == [3 * (len(document) - 1) for document in documents]


def test_reads_large_vocabularies(tmp_path):
    stream = TokenStream(write_shards(tmp_path, {"train": [[[70_000, 3]]]}, dtype="uint32"), "train")
    assert stream.read(0, 3).tolist() == [70_000, 3, END]


def test_an_empty_split_has_no_tokens_and_no_documents(tmp_path):
    stream = TokenStream(write_shards(tmp_path, {"test": []}), "test")
    assert len(stream) == 0
    assert stream.document_table().shape == (0, 3)
    assert list(stream.documents()) == []


def change_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_shard_that_is_not_what_the_manifest_says_is_named(tmp_path):
    def broken(name, change):
        folder = write_shards(tmp_path / name, {"train": SHARDS})
        change(folder / "train-00002-of-00006.npy")
        with pytest.raises(ValueError, match=r"train-00002-of-00006\.npy"):
            TokenStream(folder, "train")

    broken("missing", lambda path: path.unlink())
    broken("empty", lambda path: path.write_bytes(b""))
    broken("cut", lambda path: path.write_bytes(path.read_bytes()[:-2]))
    broken("longer", lambda path: path.write_bytes(path.read_bytes() + b"\0\0"))
    broken("no header", lambda path: path.write_bytes(b"hello"))
    broken("other tokens", lambda path: np.save(path, np.zeros(6, dtype=np.uint16)))
    broken("other dtype", lambda path: np.save(path, np.zeros(7, dtype=np.uint32)))
    broken("pickled", lambda path: np.save(path, np.array([None] * 7), allow_pickle=True))


def test_a_document_table_that_does_not_add_up_is_named(tmp_path):
    folder = write_shards(tmp_path, {"train": SHARDS})
    np.save(folder / "train-00000-of-00006.docs.npy", np.array([[3, 9, 2], [2, 3, 1]]))
    with pytest.raises(ValueError, match=r"train-00000-of-00006\.docs\.npy.*add up"):
        TokenStream(folder, "train").document_table()


def test_a_folder_that_holds_no_such_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"manifest\.json is missing"):
        TokenStream(tmp_path, "train")
    folder = write_shards(tmp_path, {"train": SHARDS})
    with pytest.raises(ValueError, match="no split 'valid'"):
        TokenStream(folder, "valid")
    for damaged in ("", '{"format": 1', "[1]"):
        (tmp_path / "manifest.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"manifest\.json"):
            TokenStream(tmp_path, "train")
    write_shards(tmp_path, {"train": SHARDS})
    change_manifest(folder, lambda manifest: manifest.update(format=2))
    with pytest.raises(ValueError, match="format 1"):
        TokenStream(folder, "train")


def test_an_epoch_visits_each_window_once_in_another_order_each_time(tmp_path):
    stream = TokenStream(write_shards(tmp_path, {"train": one_document(107)}), "train")
    order = SequenceOrder(stream, 10, seed=3)
    assert len(order) == 9
    orders, offsets = [], set()
    for epoch in range(40):
        starts = [int(order.sample(epoch * 9 + position)[0]) - 1 for position in range(9)]
        offset = min(starts)
        assert sorted(starts) == [offset + 10 * window for window in range(9)]
        orders.append(starts)
        offsets.add(offset)
    assert len({tuple(np.argsort(starts)) for starts in orders}) > 30
    assert offsets == set(range(10))


def test_a_sequence_is_a_contiguous_piece_of_the_stream(tmp_path):
    stream = TokenStream(write_shards(tmp_path, {"train": [[[*range(1, 14)]], [[*range(15, 40)]]]}), "train")
    tokens = stream.read(0, len(stream)).tolist()
    order = SequenceOrder(stream, 6, seed=0)
    for position in range(3 * len(order)):
        sequence = order.sample(position).tolist()
        assert len(sequence) == 7
        assert any(tokens[start : start + 7] == sequence for start in range(len(tokens) - 6))


def test_the_order_depends_on_seed_and_position_alone(tmp_path):
    stream = TokenStream(write_shards(tmp_path, {"train": one_document(200)}), "train")
    order = SequenceOrder(stream, 10, seed=3)
    forwards = [order.sample(position).tolist() for position in range(60)]
    other = SequenceOrder(stream, 10, seed=3)
    assert [other.sample(position).tolist() for position in reversed(range(60))] == forwards[::-1]
    assert [SequenceOrder(stream, 10, seed=4).sample(position).tolist() for position in range(60)] != forwards


def test_the_order_is_the_same_in_every_version(tmp_path):
    stream = TokenStream(write_shards(tmp_path, {"train": one_document(100)}), "train")
    order = SequenceOrder(stream, 8, seed=7)
    starts = [int(order.sample(position)[0]) for position in range(len(order) + 4)]
    assert starts == [44, 20, 84, 28, 76, 68, 12, 60, 52, 36, 4, 86, 6, 22, 14]  # as first released


def test_without_shuffling_windows_follow_each_other_from_the_first_token(tmp_path):
    stream = TokenStream(write_shards(tmp_path, {"valid": one_document(51)}), "valid")
    order = SequenceOrder(stream, 10, seed=3, shuffle=False)
    assert len(order) == 5
    assert [int(order.sample(position)[0]) for position in range(7)] == [1, 11, 21, 31, 41, 1, 11]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_a_batch_across_an_epoch_end(tmp_path, world_size):
    stream = TokenStream(write_shards(tmp_path, {"train": one_document(100)}), "train")
    order = SequenceOrder(stream, 10, seed=3)
    whole = order.batch(6, 5)
    assert whole.shape == (5, 11)
    shares = [order.batch(6, 5, rank, world_size) for rank in range(world_size)]
    for place, row in enumerate(whole):
        assert row.tolist() == order.sample(6 + place).tolist()
        assert row.tolist() == shares[place % world_size][place // world_size].tolist()
    assert sum(len(share) for share in shares) == 5


def test_a_split_needs_two_tokens_more_than_a_sequence(tmp_path):
    folder = write_shards(tmp_path, {"train": one_document(12), "valid": one_document(11)})
    order = SequenceOrder(TokenStream(folder, "train"), 10, seed=0)
    assert {int(order.sample(epoch)[0]) for epoch in range(20)} == {1, 2}
    with pytest.raises(ValueError, match="split 'valid' has 11 tokens, fewer than the 12"):
        SequenceOrder(TokenStream(folder, "valid"), 10, seed=0, shuffle=False)


@pytest.mark.parametrize("tokens", range(12, 45))
def test_no_window_leaves_the_stream_for_any_length(tmp_path, tokens):
    stream = TokenStream(write_shards(tmp_path, {"train": one_document(tokens)}), "train")
    for shuffle in (True, False):
        order = SequenceOrder(stream, 10, seed=1, shuffle=shuffle)
        assert len(order) >= 1
        for position in range(12 * len(order)):
            assert order.sample(position).shape == (11,)
