"""Step outputs: where they are, who writes them, when they are complete.

The output of a step is one folder, ``<storage>/<step>-<12 hex>``, whose name is the hash of everything that decides
its content (see :func:`step_address`). In it stand ``spec.json`` (what was asked), ``provenance.json`` (by which code,
on which machine, how often), the data, ``result.json`` (small facts about it) and, last, ``_SUCCESS`` with the size of
every file. Readers trust a folder only with ``_SUCCESS`` and all files at those sizes. While a step runs, its folder
also holds ``_lease.json`` (see :mod:`pipelines.lease`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.errors import ConfigError
from pipelines.files import atomic_write, check_folder, is_temporary, join_uri, one_line, split_uri
from pipelines.lease import check_lease

SUCCESS_FILE = "_SUCCESS"
RESULT_FILE = "result.json"
SPEC_FILE = "spec.json"
PROVENANCE_FILE = "provenance.json"


def canonical_json(data: Any) -> bytes:
    """Return the one JSON spelling of ``data`` that is hashed: sorted keys, no spaces."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def step_address(step: str, version: int, config: Any, inputs: dict[str, str]) -> str:
    """Return the address of a step's output.

    Args:
        step: Name of the step.
        version: Version of its code; raised by hand when the same input gives another output.
        config: The settings that decide the result, as plain data.
        inputs: Addresses of the outputs it reads, by step name. They stand for their content.

    Returns:
        ``<step>-<first 12 hex digits of the SHA-256 of all of this>``.
    """
    digest = hashlib.sha256(canonical_json([step, version, config, inputs])).hexdigest()
    return f"{step}-{digest[:12]}"


class StepOutput:
    """A step's output folder, to be read.

    Attributes:
        uri: Where the folder is.
        address: Its name, ``<step>-<12 hex>``.
        step: Name of the step.
        local_root: The folder itself where it is on a local disk, else ``None``.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._fs, self._path = split_uri(self.uri)
        self.address = self._path.rpartition("/")[2]
        self.step = self.address.rpartition("-")[0]
        self.local_root = Path(self._path) if self._fs is None else None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"

    def __reduce__(self) -> Any:
        return type(self), (self.uri,)

    def _cache(self) -> Path:
        """Local copies of a folder on an object store; addresses name content, so copies never grow stale."""
        key = hashlib.sha256(self.uri.encode()).hexdigest()[:12]
        base = os.environ.get("DECONV_CACHE") or os.path.join(tempfile.gettempdir(), f"deconv-cache-{os.getuid()}")
        return Path(base) / f"{key}-{self.address}"

    def read_bytes(self, name: str) -> bytes:
        """Return a file's bytes.

        Raises:
            FileNotFoundError: There is no such file.
        """
        if self.local_root is not None:
            return (self.local_root / name).read_bytes()
        with self._fs.open_input_stream(f"{self._path}/{name}") as stream:  # type: ignore[union-attr]
            return stream.read()

    def read_json(self, name: str) -> Any:
        """Return a JSON file's content."""
        return json.loads(self.read_bytes(name))

    def sizes(self, under: str = "") -> dict[str, int]:
        """Return the size in bytes of every file, by its name inside the folder, temporary ones left out."""
        if self.local_root is not None:
            return _local_sizes(self.local_root, under)
        from pyarrow import fs

        selector = fs.FileSelector(f"{self._path}/{under}".rstrip("/"), recursive=True, allow_not_found=True)
        infos = self._fs.get_file_info(selector)  # type: ignore[union-attr]
        return {i.path[len(self._path) + 1 :]: i.size for i in infos if i.type == fs.FileType.File}

    def exists(self, name: str) -> bool:
        """Tell whether a file or folder is there."""
        if self.local_root is not None:
            return (self.local_root / name).exists()
        from pyarrow import fs

        return self._fs.get_file_info(f"{self._path}/{name}").type != fs.FileType.NotFound  # type: ignore[union-attr]

    def local(self, name: str = "") -> Path:
        """Return a local path from which a file or a whole folder can be read, copied from the store if need be."""
        if self.local_root is not None:
            return self.local_root / name
        target = self._cache()
        sizes = self.sizes()
        for file, size in sizes.items():
            wanted = not name or file == name or file.startswith(f"{name}/")
            copy = target / file
            if wanted and not (copy.exists() and copy.stat().st_size == size):
                with atomic_write(copy) as temporary:
                    source = self._fs.open_input_stream(f"{self._path}/{file}")  # type: ignore[union-attr]
                    with source, temporary.open("wb") as sink:
                        shutil.copyfileobj(source, sink, 1 << 20)
        return target / name

    @property
    def result(self) -> dict[str, Any]:
        """The step's small JSON result."""
        return self.read_json(RESULT_FILE)

    def is_complete(self) -> bool:
        """Tell whether the folder may be read: ``_SUCCESS`` is there, and so is every file that it lists."""
        try:
            promised = dict(self.read_json(SUCCESS_FILE)["files"])
        except (OSError, ValueError, KeyError, TypeError):
            return False
        sizes = self.sizes()
        return all(sizes.get(name) == size for name, size in promised.items())


def _local_sizes(root: Path, under: str) -> dict[str, int]:
    sizes = {}
    for folder, _, names in os.walk(root / under):
        for path in (Path(folder, name) for name in names if not is_temporary(name)):
            try:
                sizes[path.relative_to(root).as_posix()] = path.stat().st_size
            except FileNotFoundError:
                continue  # removed by the owner of the folder while it was listed
    return sizes


class OutputFolder(StepOutput):
    """A step's output folder, to be written by the owner of its lease."""

    def __init__(self, uri: str, token: str = "") -> None:
        super().__init__(uri)
        self._token = token

    def __reduce__(self) -> Any:
        return type(self), self.to_task()

    def to_task(self) -> tuple[str, str]:
        """Return what a task on another machine makes the same folder of: ``OutputFolder(*task)``."""
        return self.uri, self._token

    def owned_by(self, token: str) -> OutputFolder:
        """Return the same folder for the holder of a lease: every write then first checks that it still is one."""
        return OutputFolder(self.uri, token)

    @contextmanager
    def write(self, name: str) -> Iterator[Path]:
        """Write a file that appears whole or not at all.

        Yields:
            A temporary local path; its content becomes ``name`` when the block ends without an error.

        Raises:
            InfraError: Another run owns the folder by now.
        """
        target = (self.local_root or self._cache()) / name
        with atomic_write(target) as temporary:
            yield temporary
            self.check_owner()
        if self.local_root is None:
            self._upload(target, name)

    def check_owner(self) -> None:
        """Refuse to go on when another run owns the folder by now.

        Raises:
            InfraError: It does.
        """
        if self._token:
            check_lease(self, self._token)

    def working_folder(self, name: str) -> Path:
        """Return a local folder into which other code writes whole files, for :meth:`publish`."""
        return (self.local_root or self._cache()) / name

    def publish(self, name: str) -> None:
        """Make the output's folder ``name`` what the working folder is; nothing is left to do on a local disk."""
        if self.local_root is not None:
            return
        here = {path.name: path for path in self.working_folder(name).iterdir() if not is_temporary(path.name)}
        there = {file.rpartition("/")[2]: size for file, size in self.sizes(name).items()}
        # Oldest first, as they were written: a file that vouches for another one follows it.
        for file, path in sorted(here.items(), key=lambda item: item[1].stat().st_mtime_ns):
            if there.get(file) != path.stat().st_size:
                self._upload(path, f"{name}/{file}")
        for file in there.keys() - here.keys():
            self._fs.delete_file(f"{self._path}/{name}/{file}")  # type: ignore[union-attr]

    def _upload(self, source: Path, name: str) -> None:
        with source.open("rb") as file, self._fs.open_output_stream(f"{self._path}/{name}") as sink:  # type: ignore[union-attr]
            shutil.copyfileobj(file, sink, 1 << 20)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a small file whole; see :meth:`write`."""
        with self.write(name) as temporary:
            temporary.write_bytes(data)

    def write_json(self, name: str, data: Any) -> None:
        """Write a JSON file whole; see :meth:`write`."""
        self.write_bytes(name, json.dumps(data, indent=2, ensure_ascii=False).encode())

    def remove(self, name: str) -> None:
        """Remove a file or folder if it is there."""
        path = (self.local_root or self._cache()) / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if self.local_root is None and self.exists(name):
            if any(file.startswith(f"{name}/") for file in self.sizes()):
                self._fs.delete_dir(f"{self._path}/{name}")  # type: ignore[union-attr]
            else:
                self._fs.delete_file(f"{self._path}/{name}")  # type: ignore[union-attr]

    def clear_temporaries(self) -> None:
        """Remove what a killed writer left behind; only the owner may do this."""
        if self.local_root is not None:
            for path in self.local_root.rglob(".*"):
                if is_temporary(path.name) and path.is_file():
                    path.unlink(missing_ok=True)

    def finish(self, result: dict[str, Any], seconds: float) -> None:
        """Write ``result.json`` and then ``_SUCCESS``: from here on the folder is complete and never changes."""
        self.write_json(RESULT_FILE, result)
        files = {name: size for name, size in self.sizes().items() if not name.startswith("_")}
        self.write_json(SUCCESS_FILE, {"address": self.address, "seconds": round(seconds, 2), "files": files})


class Storage:
    """The folder that holds the outputs of all steps.

    Attributes:
        uri: A local path or a URI of an object store.
    """

    def __init__(self, uri: str) -> None:
        self._fs, self._path = split_uri(uri)
        self.uri = self._path if self._fs is None else uri.rstrip("/")

    def output(self, address: str) -> OutputFolder:
        """Return the folder of a step's output, whether it is there or not."""
        return OutputFolder(join_uri(self.uri, address))

    def addresses(self) -> list[str]:
        """Return the addresses of all outputs, complete or not, by name."""
        if self._fs is None:
            root = Path(self._path)
            return sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        from pyarrow import fs

        infos = self._fs.get_file_info(fs.FileSelector(self._path, allow_not_found=True))
        return sorted(info.base_name for info in infos if info.type == fs.FileType.Directory)

    def check_writable(self) -> None:
        """Find out before any work is done whether outputs can be written.

        Raises:
            ConfigError: They cannot; the message says why and which setting to change.
        """
        probe = OutputFolder(join_uri(self.uri, f"_probe-{os.getpid()}"))
        try:
            if self._fs is None:
                check_folder(Path(self._path))
            else:
                probe.write_bytes("probe", b"")
                probe.remove("probe")
        except OSError as error:
            reason = error.strerror or one_line(error)
            raise ConfigError(
                f"storage {self.uri} cannot be written ({reason}): set DECONV_STORAGE to a folder that can"
            ) from error
