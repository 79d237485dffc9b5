"""Files that are either whole or absent, on a local disk or an object store.

A local file is written under a temporary name in its own folder, flushed to the disk and renamed; an object store
receives whole objects. A reader therefore never meets half a file, whenever the writer was killed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pipelines.errors import ConfigError

TEMPORARY_SUFFIX = ".tmp"


def split_uri(uri: str) -> tuple[Any | None, str]:
    """Tell where a URI leads.

    Args:
        uri: A local path, ``file://...``, or a URI that :meth:`pyarrow.fs.FileSystem.from_uri` knows (s3, gs, ...).

    Returns:
        ``(None, absolute local path)``, or ``(pyarrow file system, path inside it)``.

    Raises:
        ConfigError: The scheme is not known or the URI is malformed.
    """
    try:
        scheme = urlsplit(uri).scheme
    except ValueError as error:
        raise ConfigError(f"cannot use the address {uri!r}: {one_line(error)}") from error
    if scheme in ("", "file"):
        path = unquote(urlsplit(uri).path) if scheme else uri
        return None, os.path.abspath(os.path.expanduser(path))
    import pyarrow
    from pyarrow import fs

    try:
        return fs.FileSystem.from_uri(uri)
    except (pyarrow.ArrowInvalid, OSError, ValueError) as error:
        raise ConfigError(f"cannot use the address {uri!r}: {one_line(error)}") from error


def join_uri(uri: str, name: str) -> str:
    """Return the address of something inside a folder; options such as ``?region=...`` stay at the end."""
    folder, question, options = uri.partition("?") if "://" in uri else (uri, "", "")
    return f"{folder.rstrip('/')}/{name}{question}{options}"


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a local file that appears whole or not at all.

    Yields:
        A temporary path beside ``path``; what was written there becomes ``path`` when the block ends without an
        error, and is removed otherwise.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last so that writers which add or look at an extension (numpy, pyarrow) see the real one.
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}.{path.name}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_folder(folder: Path) -> None:
    """Make a folder if need be and see whether files can be written into it.

    Raises:
        OSError: They cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def is_temporary(name: str) -> bool:
    """Tell whether a file name is one that :func:`atomic_write` uses before the rename."""
    return name.startswith(".") and TEMPORARY_SUFFIX in name


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes of one machine; the kernel drops it when the holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
