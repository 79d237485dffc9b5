"""Training states on disk: whole or not there, and without pickle.

A checkpoint is two files. ``step-00000100.safetensors`` holds the tensors; ``step-00000100.json``, written last, holds
everything else and the digests of both parts. A checkpoint without its JSON file does not exist, and one whose digests
do not match is not used. Files get their final name only when their bytes are on the disk, so that a writer killed at
any moment leaves the checkpoints before it as they were. One process writes to a folder at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_log = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d+)\.(json|safetensors)")
_TEMPORARY = ".tmp"
_TENSOR = "__tensor__"
_FORMAT = 1


def write_checkpoint(folder: Path, state: dict[str, Any], step: int, keep: int = 2) -> Path:
    """Write a state and delete what it makes superfluous.

    Afterwards the folder holds the last ``keep`` checkpoints up to this step. Later ones are deleted: training has gone
    back behind them, so they are damaged or of no use. What killed writers left behind is deleted too.

    Args:
        folder: Where to; made when missing.
        state: Nested dicts (with string keys) and lists of tensors, strings, finite numbers, booleans and ``None``.
            Tensors that are the same memory are stored once and are one tensor again when read.
        step: Steps done so far; orders the checkpoints.
        keep: Checkpoints to keep, at least 1.

    Returns:
        The JSON file.

    Raises:
        TypeError: The state holds something else; the message names the place.
        ValueError: A number is not finite, two tensors would get the same name, or ``keep`` is below 1.
        OSError: The folder cannot be written; earlier checkpoints are still there.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    tensors: dict[str, Tensor] = {}
    rest = _take_tensors(state, (), tensors, {})
    head = {"format": _FORMAT, "step": step, "state_sha256": _sha256(_dump(rest)), "state": rest}

    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"step-*{_TEMPORARY}"):
        leftover.unlink(missing_ok=True)
    tensors_file = folder / f"step-{step:08d}.safetensors"
    temporary = tensors_file.with_name(tensors_file.name + _TEMPORARY)
    save_file(_separate(tensors), temporary)
    head["tensors_sha256"] = _file_sha256(temporary)
    _publish(temporary, tensors_file)
    json_file = folder / f"step-{step:08d}.json"
    temporary = json_file.with_name(json_file.name + _TEMPORARY)
    temporary.write_text(_dump(head), encoding="utf-8")
    _publish(temporary, json_file)
    _prune(folder, step, keep)
    return json_file


def read_latest_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Return the state of the newest whole checkpoint, on the CPU, or ``None`` when there is none.

    A damaged checkpoint is skipped with a logged warning; the one before it is used.
    """
    for step in _steps(folder):
        json_file = folder / f"step-{step:08d}.json"
        try:
            return _read(json_file)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            _log.warning("checkpoint %s is damaged and skipped: %s", json_file, error)
    return None


def _read(json_file: Path) -> dict[str, Any]:
    head = json.loads(json_file.read_text(encoding="utf-8"))
    if head["format"] != _FORMAT:
        raise ValueError(f"format {head['format']!r} instead of {_FORMAT}")
    # JSON written from what was read from it is the same text: floats are written with all their digits.
    if _sha256(_dump(head["state"])) != head["state_sha256"]:
        raise ValueError("the sha256 of the state differs")
    tensors_file = json_file.with_suffix(".safetensors")
    if _file_sha256(tensors_file) != head["tensors_sha256"]:
        raise ValueError(f"the sha256 of {tensors_file.name} differs")
    state: dict[str, Any] = _put_tensors(head["state"], load_file(tensors_file))
    return state


def _take_tensors(value: Any, place: tuple[str, ...], tensors: dict[str, Tensor], names: dict[Any, str]) -> Any:
    """Return ``value`` as JSON data; its tensors move to ``tensors``, and a reference stays where each one was."""
    if isinstance(value, Tensor):
        name = "/".join(place)
        memory = (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device)
        if value.numel() and memory in names:
            return {_TENSOR: names[memory]}
        if name in tensors:
            raise ValueError(f"two tensors of the state are called {name!r}")
        names[memory] = name
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or key == _TENSOR:
                raise TypeError(f"the state has the key {key!r} at {'/'.join(place) or 'the top'}")
        return {key: _take_tensors(item, (*place, key), tensors, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_take_tensors(item, (*place, str(index)), tensors, names) for index, item in enumerate(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"the state has a {type(value).__name__} at {'/'.join(place)}")


def _put_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {key: _put_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_put_tensors(item, tensors) for item in value]
    return value


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, contiguous, no two in the same memory: what safetensors can store."""
    separate: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        separate[name] = plain.clone() if storage in storages else plain
        storages.add(storage)
    return separate


def _publish(temporary: Path, final: Path) -> None:
    """Give a file its final name once its bytes are on the disk, and wait until the name is there too."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(folder: Path, step: int, keep: int) -> None:
    kept = [other for other in _steps(folder) if other <= step][:keep]
    for path in sorted(folder.iterdir()):  # the JSON file of a checkpoint goes first
        match = _NAME.fullmatch(path.name)
        if match and int(match[1]) not in kept:
            path.unlink(missing_ok=True)


def _steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, newest first."""
    matches = (_NAME.fullmatch(path.name) for path in folder.glob("step-*.json"))
    return sorted({int(match[1]) for match in matches if match}, reverse=True)


def _dump(data: Any) -> str:
    return json.dumps(data, allow_nan=False, separators=(",", ":"))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
