import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import CorpusSection
from pipelines.errors import ConfigError, DataError
from pipelines.sources import describe_source, documented_packages, list_shards, read_tokenizer_file
from tests.pipelines.corpora import flip_a_bit, make_texts, write_shard

TEXTS = make_texts(20)


def fault_of(path: object, column: str = "text", error: type[Exception] = DataError) -> str:
    with pytest.raises(error) as caught:
        describe_source(CorpusSection(path=str(path), text_column=column))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_a_folder_of_shards_is_counted(tmp_path):
    for i in range(3):
        write_shard(tmp_path / f"part-{i}.parquet", TEXTS[: i + 1])
    source = describe_source(CorpusSection(path=str(tmp_path)))
    assert {**source, "stamp": ""} == {"kind": "parquet", "root": str(tmp_path), "shards": 3, "rows": 6, "stamp": ""}


def test_shards_come_in_the_order_of_their_names_from_all_folders_below(tmp_path):
    names = ["b.parquet", "a/z.parquet", "a/b/y.parquet", "c.parquet/part-0.parquet", "a.parquet"]
    for name in names:
        write_shard(tmp_path / name, TEXTS)
    (tmp_path / "notes.txt").write_text("no shard")
    shards = list_shards(str(tmp_path))
    assert [shard.name for shard in shards] == sorted(names, key=lambda name: name.split("/"))
    assert [shard.size for shard in shards] == [(tmp_path / shard.name).stat().st_size for shard in shards]


@pytest.mark.parametrize("name", [".hidden.parquet", "_temporary/a.parquet", "_metadata.parquet", "a/.b/c.parquet"])
def test_files_that_writers_keep_for_themselves_are_left_out(tmp_path, name):
    write_shard(tmp_path / "a.parquet", TEXTS)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"no Parquet")
    assert describe_source(CorpusSection(path=str(tmp_path)))["shards"] == 1


@pytest.mark.parametrize("name", ["one.parquet", "_one.parquet", "one.pq"])
def test_one_file_is_a_corpus_whatever_its_name(tmp_path, name):
    file = write_shard(tmp_path / name, TEXTS)
    write_shard(tmp_path / "other.parquet", TEXTS)
    source = describe_source(CorpusSection(path=str(file)))
    assert (source["shards"], source["rows"], source["root"]) == (1, 20, str(file))


def test_a_folder_of_an_object_store_reads_as_a_local_one(tmp_path):
    for name in ("a.parquet", "b/c.parquet", "_temporary/d.parquet", "b/.e.parquet", "notes.txt"):
        write_shard(tmp_path / name, TEXTS)
    uri = f"fsspec+file://{tmp_path}"
    source = describe_source(CorpusSection(path=uri))
    assert (source["root"], source["shards"], source["rows"]) == (uri, 2, 40)
    assert [shard.name for shard in list_shards(uri)] == ["a.parquet", "b/c.parquet"]
    assert list_shards(f"{uri}/b/c.parquet")[0].uri == f"{uri}/b/c.parquet"
    assert "no such file" in fault_of(f"{uri}/nope", error=ConfigError)
    (tmp_path / "f.parquet").write_bytes(b"")
    assert f"{uri}/f.parquet is empty (0 bytes)" in fault_of(uri)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_every_kind_of_text_column_will_do(tmp_path, kind):
    write_shard(tmp_path / "a.parquet", TEXTS, kind)
    assert describe_source(CorpusSection(path=str(tmp_path)))["rows"] == 20


@pytest.mark.parametrize("name", ["nope", "file/below", "x" * 300])
def test_a_path_that_is_not_there(tmp_path, name):
    (tmp_path / "file").touch()
    error = DataError if len(name) > 255 else ConfigError
    assert str(tmp_path / name) in fault_of(tmp_path / name, error=error)


def test_an_address_that_is_none():
    assert "nope://bucket" in fault_of("nope://bucket", error=ConfigError)
    assert "http://[x" in fault_of("http://[x", error=ConfigError)


def test_a_folder_without_parquet(tmp_path):
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / ".git").mkdir()
    write_shard(tmp_path / ".git" / "a.parquet", TEXTS)
    assert fault_of(tmp_path) == f"corpus.path {tmp_path}: there are no *.parquet files in this folder"


def test_a_link_that_leads_nowhere_is_no_shard_less(tmp_path):
    write_shard(tmp_path / "a.parquet", TEXTS)
    (tmp_path / "b.parquet").symlink_to(tmp_path / "gone.parquet")
    assert "b.parquet" in fault_of(tmp_path)
    (tmp_path / "b.parquet").unlink()
    os.symlink(tmp_path / "a.parquet", tmp_path / "b.parquet")
    assert describe_source(CorpusSection(path=str(tmp_path)))["rows"] == 40


def test_a_column_that_is_not_there_names_those_that_are(tmp_path):
    write_shard(tmp_path / "a.parquet", TEXTS, column="body")
    assert "a.parquet has no column 'text'; its columns are id, body" in fault_of(tmp_path)
    assert describe_source(CorpusSection(path=str(tmp_path), text_column="body"))["rows"] == 20


def test_a_column_that_is_there_twice_is_not_guessed_at(tmp_path):
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert "has 2 columns 'text'" in fault_of(tmp_path)


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array([1, 2]), "int64"),
        (pa.array([b"a", b"b"]), "binary"),
        (pa.array([["a"], ["b"]]), "list<"),
        (pa.array([{"a": "b"}, None]), "struct<"),
        (pa.array([None, None]), "null"),
    ],
)
def test_a_column_of_another_type(tmp_path, column, kind):
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    message = fault_of(tmp_path)
    assert f"a.parquet has column 'text' of type {kind}" in message
    assert "not text" in message


def test_shards_without_rows(tmp_path):
    for name in ("a", "b"):
        write_shard(tmp_path / f"{name}.parquet", [])
    assert "the 2 Parquet shards hold no rows" in fault_of(tmp_path)
    write_shard(tmp_path / "c.parquet", TEXTS)
    assert describe_source(CorpusSection(path=str(tmp_path)))["rows"] == 20, "one empty shard is no fault"


def test_a_shard_of_zero_bytes(tmp_path):
    write_shard(tmp_path / "a.parquet", TEXTS)
    (tmp_path / "b.parquet").write_bytes(b"")
    assert f"{tmp_path / 'b.parquet'} is empty (0 bytes)" in fault_of(tmp_path)


@pytest.mark.parametrize("part", [0.001, 0.3, 0.7, 0.999])
def test_a_shard_that_was_cut_off(tmp_path, part):
    file = write_shard(tmp_path / "a.parquet", TEXTS * 20)
    os.truncate(file, int(file.stat().st_size * part))
    assert f"{file} is truncated or not Parquet" in fault_of(tmp_path)


def test_a_shard_with_a_damaged_footer(tmp_path):
    file = write_shard(tmp_path / "a.parquet", TEXTS)
    flip_a_bit(file, file.stat().st_size - 6)  # the length of the footer
    assert f"{file} is truncated or not Parquet" in fault_of(tmp_path)


def test_a_file_that_is_something_else(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"\x1f\x8b" + bytes(1000))
    assert "is truncated or not Parquet" in fault_of(tmp_path)


def test_all_faults_are_told_at_once_the_first_by_name(tmp_path):
    write_shard(tmp_path / "good.parquet", TEXTS)
    (tmp_path / "empty.parquet").write_bytes(b"")
    write_shard(tmp_path / "other.parquet", TEXTS, column="body")
    os.truncate(write_shard(tmp_path / "cut.parquet", TEXTS), 100)
    message = fault_of(tmp_path)
    assert all(part in message for part in ("empty.parquet is empty", "other.parquet has no column", "cut.parquet is"))
    assert "good.parquet" not in message
    for i in range(7):
        (tmp_path / f"empty-{i}.parquet").write_bytes(b"")
    message = fault_of(tmp_path)
    assert message.count(".parquet ") == 5
    assert "; and 5 more;" in message


def test_the_stamp_of_a_corpus_follows_every_shard(tmp_path):
    def stamp() -> str:
        return describe_source(CorpusSection(path=str(tmp_path)))["stamp"]

    file = write_shard(tmp_path / "a.parquet", TEXTS)
    stamps = [stamp()]
    assert stamp() == stamps[0]
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    stamps.append(stamp())
    file.rename(tmp_path / "b.parquet")
    stamps.append(stamp())
    write_shard(tmp_path / "c.parquet", [])
    stamps.append(stamp())
    assert len(set(stamps)) == 4


def test_without_a_path_the_source_is_the_python_of_this_machine():
    source = describe_source(CorpusSection())
    assert source["kind"] == "python-docs"
    assert source["packages"] == documented_packages()
    assert {"torch", "ray", "mlflow", "numpy"} <= set(source["packages"])
    assert not {"pytest", "ruff", "hypothesis", "deconv"} & set(source["packages"]), "extras differ between machines"


def test_a_tokenizer_file_is_read_with_its_digest(tmp_path):
    (tmp_path / "t.json").write_bytes(b"abc")
    data, digest = read_tokenizer_file(str(tmp_path / "t.json"))
    assert data == b"abc"
    assert digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert read_tokenizer_file(f"fsspec+file://{tmp_path}/t.json") == (data, digest)
    for path in (tmp_path, tmp_path / "nope", f"fsspec+file://{tmp_path}/nope", "\0"):
        with pytest.raises(ConfigError, match=r"tokenizer\.path .* cannot be read"):
            read_tokenizer_file(str(path))
