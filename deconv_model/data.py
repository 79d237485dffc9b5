"""Token shards on disk -> the training sequence at a global position.

The order of training is a pure function of a seed and one integer, the number of samples seen so far: nothing else has
to be saved to resume exactly, and the samples of a global batch do not depend on the number of workers that share it.

Shape legend: B sequences, T tokens of context; a sequence holds T + 1 ids because its targets are its inputs moved by
one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

IdArray = NDArray[np.int64]

_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype(np.uint16), "uint32": np.dtype(np.uint32)}


class TokenStream:
    """The tokens of one split: its shards in the order of the manifest, as one memory-mapped sequence.

    Args:
        folder: Folder with ``manifest.json`` and the shards.
        split: ``train``, ``valid`` or ``test``.

    Attributes:
        manifest: The whole manifest.

    Raises:
        ValueError: The manifest is of another format or names no such split, or a shard is missing or does not hold
            what the manifest says; the message names the file.
    """

    def __init__(self, folder: Path, split: str) -> None:
        manifest_file = folder / "manifest.json"
        try:
            manifest = json.loads(manifest_file.read_bytes())
        except FileNotFoundError:
            raise ValueError(f"{manifest_file} is missing: not a folder of token shards") from None
        except ValueError as error:
            raise ValueError(f"{manifest_file} is damaged: {error}") from None
        if not isinstance(manifest, dict) or manifest.get("format") != 1 or manifest.get("dtype") not in _DTYPES:
            raise ValueError(f"{manifest_file} is not a manifest of format 1")
        self.manifest: dict[str, Any] = manifest
        if split not in self.manifest["splits"]:
            raise ValueError(f"{manifest_file} has no split {split!r}: {', '.join(self.manifest['splits'])}")
        self.split = split
        self._folder = folder
        self._shards: list[dict[str, Any]] = self.manifest["splits"][split]["shards"]
        dtype = _DTYPES[self.manifest["dtype"]]
        self._arrays = [
            _open_array(folder / f"{shard['name']}.npy", (shard["tokens"],), dtype) for shard in self._shards
        ]
        self._ends = np.cumsum([array.size for array in self._arrays], dtype=np.int64)

    def __len__(self) -> int:
        """Return the number of tokens."""
        return int(self._ends[-1]) if self._ends.size else 0

    def read(self, start: int, length: int) -> IdArray:
        """Return the ids ``[start, start + length)`` as int64 [length], wherever shards end.

        Raises:
            IndexError: The range is not inside the stream.
        """
        if start < 0 or length < 0 or start + length > len(self):
            raise IndexError(f"tokens {start} to {start + length} are outside the {len(self)} of split {self.split!r}")
        ids = np.empty(length, dtype=np.int64)
        shard = int(np.searchsorted(self._ends, start, side="right"))
        done = 0
        while done < length:
            array = self._arrays[shard]
            begin = start + done - (int(self._ends[shard]) - array.size)
            piece = array[begin : begin + length - done]
            ids[done : done + piece.size] = piece
            done += piece.size
            shard += 1
        return ids

    def documents(self) -> Iterator[IdArray]:
        """Yield the ids of each document, its end-of-document id included, as int64 [tokens]."""
        for index, array in enumerate(self._arrays):
            begin = 0
            for tokens in self._shard_documents(index)[:, 0].tolist():
                yield array[begin : begin + tokens].astype(np.int64)
                begin += tokens

    def document_table(self) -> IdArray:
        """Return one row a document as int64 [documents, 3]: tokens incl. the end token, UTF-8 bytes, words.

        Raises:
            ValueError: A table does not add up to what the manifest says of its shard.
        """
        tables = [self._shard_documents(index) for index in range(len(self._shards))]
        return np.concatenate([np.empty((0, 3), dtype=np.int64), *tables])

    def _shard_documents(self, index: int) -> IdArray:
        shard = self._shards[index]
        path = self._folder / f"{shard['name']}.docs.npy"
        table = np.asarray(_open_array(path, (shard["documents"], 3), np.dtype(np.int64)))
        if table.sum(axis=0).tolist() != [shard["tokens"], shard["bytes"], shard["words"]]:
            raise ValueError(f"{path}: its documents do not add up to the tokens, bytes and words of the manifest")
        return table


def _open_array(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Memory-map an array and hold it against the manifest: shape, dtype and the size of the file."""
    try:
        # An empty file cannot be mapped, and reading it costs nothing.
        array: NDArray[Any] = np.load(path, mmap_mode="r" if 0 not in shape else None, allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing, though the manifest names it") from None
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{path} holds {array.dtype} {array.shape}, the manifest says {dtype} {shape}")
    if isinstance(array, np.memmap) and path.stat().st_size != array.offset + array.nbytes:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, the manifest says {array.offset + array.nbytes}")
    return array


class SequenceOrder:
    """Which sequence of T + 1 tokens comes at which position of the training.

    Epoch ``e = samples_seen // len(order)`` visits its windows in the order of ``permutation(seed, e)``. Its windows
    lie T apart and begin at an offset in [0, T) drawn from (seed, e), so that over the epochs a token is seen at every
    place of the context. Every epoch has the same number of windows; the few tokens before the first and after the last
    one are left out and differ from epoch to epoch.

    Without shuffling, the windows follow each other from the first token on: the order of an evaluation.

    Args:
        stream: Where the tokens come from.
        sequence_length: T, the tokens of context; sequences have one more.
        seed: Seed of permutations and offsets; unused without shuffling.
        shuffle: Permute the windows and move them each epoch.

    Raises:
        ValueError: The split has fewer than T + 2 tokens.
    """

    def __init__(self, stream: TokenStream, sequence_length: int, seed: int, shuffle: bool = True) -> None:
        tokens = len(stream)
        if tokens < sequence_length + 2:
            raise ValueError(
                f"split {stream.split!r} has {tokens} tokens, fewer than the {sequence_length + 2} that one sequence "
                f"of {sequence_length} needs: give it more text or use a shorter context_length"
            )
        self.sequence_length = sequence_length
        self._stream = stream
        self._seed = seed
        self._shuffle = shuffle
        # A shuffled epoch leaves room for any offset below T, however many tokens there are.
        self._windows = max(1, tokens // sequence_length - 1) if shuffle else (tokens - 1) // sequence_length
        self._offsets = min(sequence_length, tokens - self._windows * sequence_length)
        self._epoch = -1
        self._offset = 0
        self._permutation = np.arange(0)

    def __len__(self) -> int:
        """Return the number of sequences in an epoch."""
        return self._windows

    def sample(self, samples_seen: int) -> IdArray:
        """Return the sequence at a global position, counted over all epochs, as int64 [T + 1]."""
        epoch, position = divmod(samples_seen, self._windows)
        window = position
        offset = 0
        if self._shuffle:
            if epoch != self._epoch:
                self._start_epoch(epoch)
            window = int(self._permutation[position])
            offset = self._offset
        return self._stream.read(offset + window * self.sequence_length, self.sequence_length + 1)

    def batch(self, start: int, size: int, rank: int = 0, world_size: int = 1) -> IdArray:
        """Return one worker's share of a global batch as int64 [b, T + 1].

        The global batch is the samples ``start`` to ``start + size``; worker ``rank`` takes those whose place ``i`` in
        it has ``i % world_size == rank``. ``size`` need not be a multiple of ``world_size``, so b may differ between
        workers and may be 0.
        """
        ids = np.empty((len(range(rank, size, world_size)), self.sequence_length + 1), dtype=np.int64)
        for row, place in enumerate(range(rank, size, world_size)):
            ids[row] = self.sample(start + place)
        return ids

    def _start_epoch(self, epoch: int) -> None:
        # Sorting raw bits instead of Generator.permutation: numpy keeps the streams of its bit generators for ever, but
        # not those of the distributions built on them, and a resumed run may meet another numpy.
        bits = np.random.PCG64([self._seed, epoch])
        self._offset = int(bits.random_raw()) % self._offsets
        self._permutation = np.argsort(bits.random_raw(self._windows), kind="stable")
        self._epoch = epoch
