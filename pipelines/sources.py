"""Where the text of a corpus comes from: looked at before any work is done.

:func:`describe_source` is what a plan calls. It lists the Parquet shards and reads their footers in parallel, so that a
corpus that cannot be used is refused within a second, with every fault named at once. What it returns is part of the
corpus step's address: a shard that is added, removed or changed (name, size, time of change) makes a new corpus.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config import CorpusSection
from pipelines.errors import ConfigError, DataError
from pipelines.files import join_uri, one_line, split_uri
from pipelines.store import canonical_json

_READERS = 16
_FAULTS_NAMED = 5
OWN_PACKAGE = "deconv"


@dataclass(frozen=True)
class SourceShard:
    """One Parquet file of a corpus.

    Attributes:
        uri: Where it is; a local path or the URI of an object.
        name: Its path inside the corpus' folder.
        size: Bytes.
        modified: Time of the last change, in nanoseconds since the epoch.
    """

    uri: str
    name: str
    size: int
    modified: int


def describe_source(section: CorpusSection) -> dict[str, Any]:
    """Look at the source of a corpus and return what decides its content.

    Raises:
        ConfigError: The path is not there or not an address, or a column is not there.
        DataError: A shard cannot be used.
    """
    if section.path is None:
        return {"kind": "python-docs", "python": platform.python_version(), "packages": documented_packages()}
    shards = list_shards(section.path)
    rows = _check_footers(shards, section.text_column)
    if rows == 0:
        raise DataError(f"corpus.path {section.path}: the {len(shards)} Parquet shards hold no rows")
    fs, root = split_uri(section.path)
    return {
        "kind": "parquet",
        "root": root if fs is None else section.path,
        "shards": len(shards),
        "rows": rows,
        "stamp": stamp_of(shards),
    }


def stamp_of(shards: list[SourceShard]) -> str:
    """Return a digest of the names, sizes and times of change of shards."""
    stamps = [[shard.name, shard.size, shard.modified] for shard in shards]
    return hashlib.sha256(canonical_json(stamps)).hexdigest()


def documented_packages() -> dict[str, str]:
    """Return the installed packages that this one depends on, with their versions.

    Only what every installation has: optional packages would make another corpus of every environment.
    """
    packages = {}
    for requirement in importlib.metadata.requires(OWN_PACKAGE) or []:
        name = requirement.split(";")[0].split("[")[0].rstrip()
        name = name[: next((i for i, c in enumerate(name) if not (c.isalnum() or c in "-_.")), len(name))]
        if "extra ==" in requirement:
            continue
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a requirement of another platform
    return dict(sorted(packages.items()))


def list_shards(path: str) -> list[SourceShard]:
    """Return the Parquet files under a folder (or the one file) in the order of their names.

    Raises:
        ConfigError: There is no such path.
        DataError: There is no Parquet file in it.
    """
    fs, root = split_uri(path)
    if fs is None:
        folder = Path(root)
        try:
            if not folder.exists():
                raise ConfigError(f"corpus.path {path}: there is no such file or folder")
            if folder.is_file():
                return [_local_shard(folder, folder.parent)]
            files = sorted(file for file in folder.rglob("*.parquet") if not file.is_dir())
            visible = [file for file in files if not _is_hidden(file.relative_to(folder).as_posix())]
            shards = [_local_shard(file, folder) for file in visible]
        except OSError as error:
            raise DataError(f"corpus.path {path}: cannot read {error.filename}: {error.strerror}") from error
    else:
        shards = _remote_shards(fs, root, path)
    if not shards:
        raise DataError(f"corpus.path {path}: there are no *.parquet files in this folder")
    return shards


def _is_hidden(name: str) -> bool:
    """Tell whether a path inside a corpus is one that writers of Parquet folders keep for themselves."""
    return any(part[0] in "._" for part in name.split("/"))


def _local_shard(file: Path, base: Path) -> SourceShard:
    stat = file.stat()
    return SourceShard(str(file), file.relative_to(base).as_posix(), stat.st_size, stat.st_mtime_ns)


def _remote_shards(fs: Any, root: str, path: str) -> list[SourceShard]:
    from pyarrow import fs as arrow_fs

    try:
        info = fs.get_file_info(root)
        if info.type == arrow_fs.FileType.NotFound:
            raise ConfigError(f"corpus.path {path}: there is no such file or folder")
        single = info.type == arrow_fs.FileType.File
        infos = [info] if single else fs.get_file_info(arrow_fs.FileSelector(root, recursive=True))
    except OSError as error:
        raise ConfigError(f"corpus.path {path} cannot be listed: {one_line(error)}") from error
    shards = []
    for item in sorted(infos, key=lambda item: item.path):
        if item.type == arrow_fs.FileType.File and (single or item.path.endswith(".parquet")):
            name = item.base_name if single else item.path[len(root.rstrip("/")) + 1 :]
            uri = path if single else join_uri(path, name)
            if single or not _is_hidden(name):
                shards.append(SourceShard(uri, name, item.size, item.mtime_ns or 0))
    return shards


def open_parquet(uri: str) -> Any:
    """Open a Parquet file for reading, wherever it is; pages that carry checksums are checked."""
    import pyarrow.parquet as pq

    fs, path = split_uri(uri)
    return pq.ParquetFile(path, filesystem=fs, page_checksum_verification=True)


def check_column(schema: Any, column: str) -> str | None:
    """Return what is wrong with the text column of an Arrow schema, or ``None``."""
    import pyarrow.types as types

    if column not in schema.names:
        return f"has no column {column!r}; its columns are {', '.join(schema.names)}"
    if (count := schema.names.count(column)) > 1:
        return f"has {count} columns {column!r}"
    kind = schema.field(column).type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        return f"has column {column!r} of type {kind}, not text"
    return None


def _check_footers(shards: list[SourceShard], column: str) -> int:
    """Read all footers and return the rows in all.

    Raises:
        DataError: One line that names the faulty shards and their faults.
    """
    import pyarrow

    def check(shard: SourceShard) -> int | str:
        if shard.size == 0:
            return "is empty (0 bytes)"
        try:
            with open_parquet(shard.uri) as file:
                return check_column(file.schema_arrow, column) or file.metadata.num_rows
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            return f"is truncated or not Parquet ({one_line(error)})"

    with ThreadPoolExecutor(_READERS) as pool:
        outcomes = list(pool.map(check, shards))
    faults = [f"{shard.uri} {fault}" for shard, fault in zip(shards, outcomes, strict=True) if isinstance(fault, str)]
    if faults:
        raise DataError(f"corpus: {summarise(faults)}; mend or remove them, or set corpus.text_column")
    return sum(rows for rows in outcomes if isinstance(rows, int))


def summarise(faults: list[str]) -> str:
    """Join faults into one line, the first few by name and the rest by number."""
    more = f"; and {len(faults) - _FAULTS_NAMED} more" if len(faults) > _FAULTS_NAMED else ""
    return "; ".join(faults[:_FAULTS_NAMED]) + more


def read_tokenizer_file(path: str) -> tuple[bytes, str]:
    """Return the bytes of a tokenizer file and their SHA-256.

    Raises:
        ConfigError: It cannot be read.
    """
    fs, local = split_uri(path)
    try:
        if fs is None:
            data = Path(local).read_bytes()
        else:
            with fs.open_input_stream(local) as stream:
                data = stream.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ConfigError(f"tokenizer.path {path!r} cannot be read: {reason}") from error
    return data, hashlib.sha256(data).hexdigest()
