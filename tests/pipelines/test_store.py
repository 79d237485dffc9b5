import json
import os
import pickle
import threading
from pathlib import Path

import pytest

from pipelines.errors import ConfigError
from pipelines.files import atomic_write
from pipelines.store import OutputFolder, StepOutput, Storage, canonical_json, step_address

OBJECT_STORE = "fsspec+memory://"


@pytest.fixture(params=["local", "object store"])
def storage(request, tmp_path, monkeypatch):
    """A storage on a disk, and one behind a file system where nothing can be opened as a local file."""
    monkeypatch.setenv("DECONV_CACHE", str(tmp_path / "cache"))
    return Storage(str(tmp_path / "steps") if request.param == "local" else f"{OBJECT_STORE}{tmp_path.name}/steps")


@pytest.fixture
def output(tmp_path):
    """A complete output with a small file in each of two folders."""
    output = OutputFolder(str(tmp_path / "tokens-0123456789ab"))
    output.write_bytes("tokens/a.npy", b"0123456789")
    output.write_json("notes/00000.json", {"word": "naïve"})
    output.finish({"documents": 3}, 1.25)
    return output


def test_an_output_is_named_after_its_step_and_address(tmp_path):
    output = StepOutput(f"{tmp_path}/train-1a2b3c4d5e6f/")
    assert (output.step, output.address) == ("train", "train-1a2b3c4d5e6f")
    assert output.uri == str(tmp_path / "train-1a2b3c4d5e6f")


def test_outputs_travel_to_other_processes_as_their_address(output):
    for original in (StepOutput(output.uri), output.owned_by("secret"), Storage(OBJECT_STORE).output("corpus-1")):
        copy = pickle.loads(pickle.dumps(original))
        assert type(copy) is type(original)
        assert copy.uri == original.uri
        assert copy.__reduce__() == original.__reduce__()
    assert pickle.loads(pickle.dumps(output.owned_by("secret"))).__reduce__()[1] == (output.uri, "secret")


def test_what_is_written_is_read_back(storage):
    output = storage.output("tokens-0123456789ab")
    assert not output.exists("notes")
    assert not output.is_complete()
    assert (output.sizes(), storage.addresses()) == ({}, [])
    with pytest.raises(FileNotFoundError):
        output.read_bytes("a.bin")
    output.write_json("notes/00000.json", {"word": "naïve"})
    output.write_bytes("a.bin", b"12345")
    with output.write("deep/er/b.txt") as path:
        path.write_text("text")
    assert output.read_json("notes/00000.json") == {"word": "naïve"}
    assert output.local("deep/er/b.txt").read_text() == "text"
    assert [path.name for path in output.local("notes").iterdir()] == ["00000.json"]
    assert not output.is_complete()
    output.finish({"documents": 3}, 1.25)
    assert output.is_complete()
    assert output.result == {"documents": 3}
    assert output.sizes()["a.bin"] == 5
    assert set(output.sizes("deep")) == {"deep/er/b.txt"}
    assert output.read_json("_SUCCESS") == {
        "address": "tokens-0123456789ab",
        "seconds": 1.25,
        "files": {name: size for name, size in output.sizes().items() if name != "_SUCCESS"},
    }
    assert storage.addresses() == ["tokens-0123456789ab"]
    output.write_bytes("a.bin", b"123")
    assert output.read_bytes("a.bin") == b"123", "the last writing holds"
    output.remove("a.bin")
    output.remove("deep")
    output.remove("deep")
    assert not output.exists("a.bin")
    assert not output.exists("deep")
    assert set(output.sizes()) == {"notes/00000.json", "result.json", "_SUCCESS"}


def test_an_error_while_writing_leaves_nothing(storage):
    output = storage.output("tokens-0123456789ab")

    def write_half() -> None:
        with output.write("a.bin") as path:
            path.write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert not output.exists("a.bin")
    assert output.sizes() == {}


def test_a_local_copy_follows_the_store(tmp_path, monkeypatch):
    monkeypatch.setenv("DECONV_CACHE", str(tmp_path / "cache"))
    uri = f"{OBJECT_STORE}{tmp_path.name}/train-0123456789ab"
    output = OutputFolder(uri)
    output.write_bytes("model/a", b"12")
    monkeypatch.setenv("DECONV_CACHE", str(tmp_path / "cache of another machine"))
    assert StepOutput(uri).local("model/a").read_bytes() == b"12"
    output.local("model/a").write_bytes(b"1")  # cut off
    assert StepOutput(uri).local("model/a").read_bytes() == b"12"


def test_a_working_folder_is_published_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("DECONV_CACHE", str(tmp_path / "cache"))
    output = OutputFolder(f"{OBJECT_STORE}{tmp_path.name}/train-0123456789ab")
    folder = output.working_folder("checkpoints")
    for step in (1, 2, 3):
        with atomic_write(folder / f"step-{step}") as path:
            path.write_bytes(b"x" * step)
        (folder / f"step-{step - 2}").unlink(missing_ok=True)
        output.publish("checkpoints")
        kept = {f"checkpoints/step-{i}": i for i in (step - 1, step) if i}
        assert output.sizes("checkpoints") == kept


def test_a_complete_output_with_a_missing_file_is_not_complete(output):
    assert output.is_complete()
    output.remove("tokens/a.npy")
    assert not output.is_complete()


@pytest.mark.parametrize("size", [0, 9, 11])
def test_a_complete_output_with_a_file_of_another_size_is_not_complete(output, size):
    os.truncate(output.local("tokens/a.npy"), size)
    assert not output.is_complete()


@pytest.mark.parametrize(
    "garbage", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"3", b"{}", b'{"files": 3}', b'{"files": ["a"]}']
)
def test_a_damaged_success_file_is_none(output, garbage):
    output.local("_SUCCESS").write_bytes(garbage)
    assert not output.is_complete()


def test_sizes_leave_out_what_is_being_written(output):
    before = output.sizes()
    with output.write("tokens/b.npy") as path:
        path.write_bytes(b"half")
        assert output.sizes() == before
    assert output.sizes() == {**before, "tokens/b.npy": 4}


def test_sizes_can_be_asked_for_while_the_owner_makes_and_removes_files(output):
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            for i in range(30):
                output.write_bytes(f"parsed/{i}", b"x")
            output.remove("parsed")

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(300):
            assert output.sizes()["tokens/a.npy"] == 10
    finally:
        stop.set()
        thread.join()


def test_sweeping_removes_temporary_files_only(output):
    before = output.sizes()
    litter = output.local("tokens") / ".0a1b2c3d.tmp.a.npy"
    litter.write_bytes(b"half")
    hidden = output.local("tokens") / ".keep"
    hidden.write_bytes(b"")
    output.clear_temporaries()
    assert not litter.exists()
    assert output.sizes() == {**before, "tokens/.keep": 0}


def test_a_storage_that_can_be_written_says_nothing_and_holds_nothing(storage):
    storage.check_writable()
    assert storage.addresses() == []


@pytest.mark.parametrize("folder", ["file", "file/steps", "/proc/steps", "/proc/self/steps"])
def test_a_storage_that_cannot_be_written_is_one_line(tmp_path, folder):
    (tmp_path / "file").write_text("not a folder")
    uri = str(tmp_path / folder)
    with pytest.raises(ConfigError, match=r"cannot be written .* set DECONV_STORAGE") as caught:
        Storage(uri).check_writable()
    assert uri in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_storage_below_a_file_holds_nothing(tmp_path):
    (tmp_path / "file").touch()
    storage = Storage(str(tmp_path / "file" / "steps"))
    assert storage.addresses() == []
    assert not storage.output("corpus-0123456789ab").is_complete()
    assert not storage.output("corpus-0123456789ab").exists("spec.json")


def test_addresses_do_not_change_with_the_release():
    config = {"steps": 300, "lr": 0.02, "name": "naïve", "none": None, "levels": [{"width": 192}]}
    address = step_address("train", 1, config, {"tokens": "tokens-0", "tokenizer": "tokenizer-0"})
    assert address == "train-97afc73ab7a9"


def test_an_address_is_decided_by_content_not_by_order():
    one = step_address("train", 1, {"a": 1, "b": {"c": 2, "d": 3}}, {"x": "x-1", "y": "y-1"})
    assert one == step_address("train", 1, {"b": {"d": 3, "c": 2}, "a": 1}, {"y": "y-1", "x": "x-1"})
    assert one == step_address(
        "train", 1, json.loads(json.dumps({"a": 1, "b": {"c": 2, "d": 3}})), {"y": "y-1", "x": "x-1"}
    )
    others = {
        step_address("tokens", 1, {"a": 1, "b": {"c": 2, "d": 3}}, {"x": "x-1", "y": "y-1"}),
        step_address("train", 2, {"a": 1, "b": {"c": 2, "d": 3}}, {"x": "x-1", "y": "y-1"}),
        step_address("train", 1, {"a": 1, "b": {"c": 2, "d": 4}}, {"x": "x-1", "y": "y-1"}),
        step_address("train", 1, {"a": 1, "b": {"c": 2}, "d": 3}, {"x": "x-1", "y": "y-1"}),
        step_address("train", 1, {"a": 1, "b": {"c": 2, "d": 3}}, {"x": "x-1", "y": "y-2"}),
        step_address("train", 1, {"a": 1, "b": {"c": 2, "d": 3}}, {"x": "y-1", "y": "x-1"}),
    }
    assert len(others | {one}) == 7


def test_any_text_has_a_canonical_spelling():
    assert canonical_json({"b": "é\n", "a": 1.0}) == '{"a":1.0,"b":"é\\n"}'.encode()
    assert canonical_json("\ud800") != canonical_json("\ud801")


def test_local_paths_stay_what_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Storage("steps").uri == str(tmp_path / "steps"), "Ray workers have another working folder"
    assert Storage(f"file://{tmp_path}/steps").output("corpus-1").local_root == Path(tmp_path / "steps" / "corpus-1")
