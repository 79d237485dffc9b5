import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import ConfigError
from pipelines.files import (
    atomic_write,
    check_folder,
    file_lock,
    is_temporary,
    join_uri,
    one_line,
    sha256_file,
    split_uri,
)
from pipelines.store import OutputFolder, Storage

# Replaces one file over and over by 8 MB of a single byte value, and says when it has begun.
WRITER = """
import sys
from pathlib import Path
from pipelines.files import atomic_write
print("ready", flush=True)
for round in range(1_000_000):
    with atomic_write(Path(sys.argv[1])) as temporary, temporary.open("wb") as file:
        for _ in range(64):
            file.write(bytes([round % 256]) * (1 << 17))
"""


def write_half(target: Path, error: type[BaseException]) -> None:
    with atomic_write(target) as temporary:
        temporary.write_bytes(b"half of the n")
        raise error


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_written_file_appears_at_the_end_of_the_block(tmp_path):
    target = tmp_path / "new" / "folder" / "a.txt"
    with atomic_write(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
        assert is_temporary(temporary.name)
        assert temporary.suffix == ".txt", "writers look at the suffix"
    assert target.read_text() == "whole"
    assert names(tmp_path) == {"new/folder/a.txt"}


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
def test_an_error_in_the_block_leaves_the_old_file(tmp_path, error):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(error):
        write_half(target, error)
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == {"a.bin"}


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a"):
        pass
    assert names(tmp_path) == set()


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    target = tmp_path / "a"
    with atomic_write(target) as first, atomic_write(target) as second:
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert target.read_bytes() == b"first", "the one that ends last"
    assert names(tmp_path) == {"a"}


def test_writers_that_care_for_the_suffix_write_where_they_are_told(tmp_path):
    with atomic_write(tmp_path / "a.npy") as temporary:
        np.save(temporary, np.arange(3))
    with atomic_write(tmp_path / "b.parquet") as temporary:
        pq.write_table(pa.table({"text": ["x"]}), temporary)
    assert names(tmp_path) == {"a.npy", "b.parquet"}
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2]


@pytest.mark.fault
def test_a_writer_that_is_killed_leaves_a_whole_file_and_litter_that_is_swept(tmp_path):
    output = OutputFolder(str(tmp_path / "corpus-000000000000"))
    output.write_bytes("other/kept.bin", b"kept")
    output.write_bytes(".hidden", b"also kept")
    target = output.local("deep/data.bin")
    littered = False
    for pause in (0.01, 0.05, 0.11, 0.17, 0.23, 0.31):
        command = [sys.executable, "-c", WRITER, str(target)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(pause)
            process.send_signal(signal.SIGKILL)
        if target.exists():
            data = target.read_bytes()
            assert len(data) == 1 << 23
            assert set(data) == {data[0]}, "two rounds in one file"
        littered = littered or any(is_temporary(path.name) for path in target.parent.iterdir())
        assert set(output.sizes()) <= {"other/kept.bin", ".hidden", "deep/data.bin"}, "litter is no output"
        if littered and target.exists():
            break
    assert littered, "no kill met the writer inside a block"
    output.clear_temporaries()
    assert names(tmp_path) - {f"{output.address}/deep/data.bin"} == {
        f"{output.address}/other/kept.bin",
        f"{output.address}/.hidden",
    }


def test_the_files_of_an_output_are_not_taken_for_temporary_ones():
    for name in ("a.tmp", "a.tmp.npy", ".gitignore", ".keep", "_lease.json", "_SUCCESS", "tmp"):
        assert not is_temporary(name), name


@pytest.mark.parametrize("size", [0, 1, 3_000_001])
def test_sha256_is_that_of_the_bytes(tmp_path, size):
    data = np.random.default_rng(size).bytes(size)
    (tmp_path / "a").write_bytes(data)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("/data/a b", "/data/a b"),
        ("/data/../x/", "/x"),
        ("file:///data/a%20b", "/data/a b"),
        ("/data/100%", "/data/100%"),
        ("/data/a%20b", "/data/a%20b"),
        ("/data/what?#", "/data/what?#"),
    ],
)
def test_local_addresses(uri, path):
    assert split_uri(uri) == (None, path)


def test_relative_and_home_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert split_uri("shards/a") == (None, str(tmp_path / "shards" / "a"))
    assert split_uri("~/shards") == (None, "/home/somebody/shards")


def test_addresses_of_object_stores_lead_to_their_file_system():
    fs, path = split_uri("s3://bucket/folder/file?region=eu-west-1")
    assert fs is not None
    assert (fs.type_name, path) == ("s3", "bucket/folder/file")


def test_options_of_an_address_stay_at_its_end():
    assert join_uri("s3://bucket/steps/?region=eu-west-1", "corpus-1") == "s3://bucket/steps/corpus-1?region=eu-west-1"
    assert join_uri("/data/what?/steps", "corpus-1") == "/data/what?/steps/corpus-1"
    output = Storage("s3://bucket/steps?region=eu-west-1").output("corpus-1")
    assert (output.address, output.step, output._path) == ("corpus-1", "corpus", "bucket/steps/corpus-1")


@pytest.mark.parametrize("uri", ["nope://bucket/a", "http://example.com/a", "http://[x", "c:shards"])
def test_addresses_that_cannot_be_used_are_one_line(uri):
    with pytest.raises(ConfigError) as caught:
        split_uri(uri)
    assert uri in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_one_line_of_an_error():
    assert one_line(ValueError("\nfirst\nsecond")) == "first"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_folders_that_cannot_be_written(tmp_path):
    check_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "b", Path("/proc/nothing")):
        with pytest.raises(OSError, match=r"exists|Not a directory|No such file"):
            check_folder(folder)


@pytest.mark.fault
def test_a_lock_holds_against_other_processes_and_ends_with_its_holder(tmp_path):
    lock = tmp_path / "folder" / "lock"
    holder = (
        "import sys; from pathlib import Path; from pipelines.files import file_lock\n"
        "with file_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    prober = "import sys, fcntl; fcntl.flock(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", holder, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        probe = subprocess.run([sys.executable, "-c", prober, str(lock)], capture_output=True, text=True)
        assert "BlockingIOError" in probe.stderr
        process.kill()
        with file_lock(lock):  # waits for the kernel to drop it
            pass
