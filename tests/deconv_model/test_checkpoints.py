import json
import logging
import os
import signal

import pytest
import torch

from deconv_model.checkpoints import read_latest_checkpoint, write_checkpoint
from tests.deconv_model.tiny import assert_same, run_ranks


def state_of(step):
    return {"step": step, "model": {"weight": torch.full((3, 2), float(step))}, "history": [{"loss": 0.1 * step}]}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def files_of(*steps):
    return sorted(f"step-{step:08d}.{end}" for step in steps for end in ("json", "safetensors"))


def test_a_state_comes_back_bit_for_bit(tmp_path):
    buffer = torch.randn(12)
    state = {
        "text": 'a "quoted" é 😀',
        "numbers": [0, -7, 2**62, 0.1, -0.0, 1e-300, 1 / 3, True, None],
        "nothing": {},
        "empty list": [],
        "tensors": {
            "scalar": torch.tensor(3.0),
            "count": torch.tensor(2**40),
            "flags": torch.tensor([True, False]),
            "half": torch.randn(3, 2).bfloat16(),
            "double": torch.randn(2, dtype=torch.float64),
            "no elements": torch.empty(0, 4),
            "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
            "transposed": torch.randn(3, 4).t(),
            "every second": torch.arange(10)[::2],
            "left of a buffer": buffer[:8],
            "right of a buffer": buffer[4:],
            "whole": buffer,
            "reshaped": buffer.view(3, 4),
            "expanded": torch.ones(1).expand(5),
            "parameter": torch.nn.Parameter(torch.randn(2)),
            "a/b.c": torch.zeros(1),
        },
        "in a list": [torch.ones(2), {"deep": [torch.zeros(())]}],
    }
    write_checkpoint(tmp_path, state, 5)
    read = read_latest_checkpoint(tmp_path)
    state["tensors"]["parameter"] = state["tensors"]["parameter"].detach()
    not_finite = read["tensors"].pop("not finite")
    assert not_finite.view(torch.int32).tolist() == state["tensors"].pop("not finite").view(torch.int32).tolist()
    assert_same(read, state)


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path):
    weight = torch.randn(100, 100)
    path = write_checkpoint(tmp_path, {"in": weight, "out": {"head": weight}, "copy": weight.clone()}, 1)
    assert path.with_suffix(".safetensors").stat().st_size < 2.2 * weight.nbytes
    read = read_latest_checkpoint(tmp_path)
    assert torch.equal(read["in"], weight)
    assert read["in"].data_ptr() == read["out"]["head"].data_ptr() != read["copy"].data_ptr()


def test_the_tensors_file_is_the_same_for_the_same_state(tmp_path):
    first = write_checkpoint(tmp_path / "a", state_of(4), 4).with_suffix(".safetensors").read_bytes()
    assert write_checkpoint(tmp_path / "b", state_of(4), 4).with_suffix(".safetensors").read_bytes() == first


@pytest.mark.parametrize(
    ("state", "error", "place"),
    [
        ({"a": {"b": [1, (2, 3)]}}, TypeError, "tuple at a/b/1"),
        ({"a": {1: 2}}, TypeError, "key 1 at a"),
        ({"a": {"__tensor__": "x"}}, TypeError, "__tensor__"),
        ({"a": object()}, TypeError, "object at a"),
        ({"a": float("nan")}, ValueError, "not JSON compliant"),
        ({"a/b": torch.zeros(1), "a": {"b": torch.zeros(1)}}, ValueError, "a/b"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path, state, error, place):
    with pytest.raises(error, match=place):
        write_checkpoint(tmp_path / "new", state, 1)
    assert not (tmp_path / "new").exists()


def test_there_is_no_checkpoint_in_a_missing_or_empty_folder(tmp_path):
    assert read_latest_checkpoint(tmp_path) is None
    assert read_latest_checkpoint(tmp_path / "missing") is None


def test_the_last_ones_are_kept(tmp_path):
    for step in (9, 10, 11, 100_000_000):
        write_checkpoint(tmp_path, state_of(step), step, keep=2)
    assert names(tmp_path) == files_of(11, 100_000_000)
    assert read_latest_checkpoint(tmp_path)["step"] == 100_000_000
    write_checkpoint(tmp_path, state_of(100_000_001), 100_000_001, keep=1)
    assert names(tmp_path) == files_of(100_000_001)
    with pytest.raises(ValueError, match="keep"):
        write_checkpoint(tmp_path, state_of(1), 1, keep=0)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path, old, new):
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


DAMAGE = {
    "tensors cut off": lambda path: truncate(path.with_suffix(".safetensors")),
    "tensors emptied": lambda path: path.with_suffix(".safetensors").write_bytes(b""),
    "tensors gone": lambda path: path.with_suffix(".safetensors").unlink(),
    "a bit of the tensors": lambda path: flip(
        path.with_suffix(".safetensors"),
        torch.full((6,), 20.0).numpy().tobytes(),
        torch.full((6,), 20.5).numpy().tobytes(),
    ),
    "json cut off": truncate,
    "json emptied": lambda path: path.write_bytes(b""),
    "json not text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "json of something else": lambda path: path.write_text("[1]"),
    "a digit of the json": lambda path: flip(path, b'"loss":2.0', b'"loss":2.5'),
    "format of the future": lambda path: flip(path, b'"format":1', b'"format":9'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_one_is_skipped_with_a_warning(tmp_path, caplog, damage):
    write_checkpoint(tmp_path, state_of(10), 10)
    DAMAGE[damage](write_checkpoint(tmp_path, state_of(20), 20))
    with caplog.at_level(logging.WARNING):
        assert_same(read_latest_checkpoint(tmp_path), state_of(10))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "step-00000020.json is damaged and skipped" in caplog.text


def test_training_past_a_damaged_one_replaces_it(tmp_path):
    write_checkpoint(tmp_path, state_of(10), 10, keep=1)
    path = write_checkpoint(tmp_path, state_of(20), 20, keep=2)
    truncate(path)
    write_checkpoint(tmp_path, state_of(15), 15, keep=1)  # keeps this one, not the damaged one after it
    assert names(tmp_path) == files_of(15)
    assert read_latest_checkpoint(tmp_path)["step"] == 15


def test_nothing_is_read_when_all_are_damaged(tmp_path, caplog):
    for step in (1, 2):
        truncate(write_checkpoint(tmp_path, state_of(step), step))
    assert read_latest_checkpoint(tmp_path) is None
    assert len(caplog.records) == 2


def test_a_disk_that_is_full_leaves_the_one_before(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, state_of(10), 10)

    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        write_checkpoint(tmp_path, state_of(20), 20)
    assert read_latest_checkpoint(tmp_path)["step"] == 10


def write_until_killed(rank, world_size, folder, syncs):
    real, calls = os.fsync, []

    def fsync(descriptor):
        if len(calls) == syncs:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(descriptor)
        real(descriptor)

    os.fsync = fsync
    write_checkpoint(folder / "checkpoints", state_of(20), 20)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.fault
@pytest.mark.parametrize(("syncs", "newest"), [(0, 10), (1, 10), (2, 10), (3, 20), (4, 20)])
def test_a_writer_killed_anywhere_leaves_a_whole_checkpoint(tmp_path, caplog, syncs, newest):
    folder = tmp_path / "checkpoints"
    for step in (5, 10):
        write_checkpoint(folder, state_of(step), step)
    with pytest.raises(Exception, match="SIGKILL"):
        run_ranks(1, write_until_killed, tmp_path, syncs)
    left = names(folder)
    assert_same(read_latest_checkpoint(folder), state_of(newest))
    assert not caplog.records  # a checkpoint that was never finished is not a damaged one
    if syncs < 4:
        assert left != files_of(10, 20)
    write_checkpoint(folder, state_of(30), 30)
    assert names(folder) == files_of(newest, 30)


def test_the_json_file_can_be_read_by_a_person(tmp_path):
    path = write_checkpoint(tmp_path, state_of(3), 3)
    assert path.name == "step-00000003.json"
    content = json.loads(path.read_text())
    assert content["step"] == 3
    assert content["state"]["model"]["weight"] == {"__tensor__": "model/weight"}
