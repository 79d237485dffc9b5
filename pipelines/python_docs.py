"""Real text that every machine has: documentation strings of the standard library and the installed packages.

A document is all documentation strings of one source file. A string that occurs in several files stays in the first
one only. Files come in the order of a hash of their names, so that a bounded corpus is a fair mixture of the packages.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.cluster import map_shards
from pipelines.errors import DataError
from pipelines.store import OutputFolder

SHARDS = 16
_GROUPS = 32  # tasks that parse; more than the workers of a laptop, so that they end together
_SHORTEST = 40  # characters; shorter strings say little
_DOCS_PER_SOURCE = 0.12  # bytes of documentation in a byte of source: a little less than the measured 0.16
_NOT_LIBRARY = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}


def list_source_files(packages: dict[str, str]) -> list[tuple[str, str, int]]:
    """Return ``(name, path, size)`` of every Python file of the library and the packages, in the corpus' order."""
    library = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in library.rglob("*.py"):
        name = path.relative_to(library)
        if not _NOT_LIBRARY & set(name.parts):
            files.append((f"python/{name.as_posix()}", str(path), path.stat().st_size))
    for package in packages:
        distribution = importlib.metadata.distribution(package)
        if distribution.files is None:
            raise DataError(f"package {package} does not list its files: reinstall it with pip, or set corpus.path")
        for file in distribution.files:
            path = Path(str(distribution.locate_file(file)))
            if file.suffix == ".py" and (file.size or 0) > 0 and path.exists():
                files.append((f"{package}/{file.as_posix()}", str(path), file.size or 0))
    return sorted(files, key=lambda item: hashlib.sha256(item[0].encode()).digest())


def gather(packages: dict[str, str], max_bytes: int, output: OutputFolder) -> list[str]:
    """Write the documentation strings as Parquet shards with the columns ``id`` and ``text``.

    Returns:
        The names of the shards inside the output folder.
    """
    chosen: list[tuple[str, str]] = []
    source_bytes = 0
    for name, path, size in list_source_files(packages):
        if source_bytes >= max_bytes / _DOCS_PER_SOURCE:
            break
        source_bytes += size
        chosen.append((name, path))
    size = -(-len(chosen) // _GROUPS)
    groups = [chosen[i : i + size] for i in range(0, len(chosen), size)]
    tasks: list[dict[str, Any]] = [
        {"folder": output.to_task(), "name": f"parsed/group-{i:03d}.parquet", "files": group}
        for i, group in enumerate(groups)
    ]
    map_shards("corpus", parse_group, [task for task in tasks if not output.exists(task["name"])])
    names = _write_shards([task["name"] for task in tasks], max_bytes, output)
    output.remove("parsed")
    return names


def parse_group(task: dict[str, Any]) -> dict[str, Any]:
    """Parse some source files and write their documentation strings, one row a string (a Ray task)."""
    ids: list[str] = []
    strings: list[str] = []
    for name, path in task["files"]:
        for text in documentation_strings(Path(path)):
            ids.append(name)
            strings.append(text)
    with OutputFolder(*task["folder"]).write(task["name"]) as temporary:
        pq.write_table(pa.table({"id": ids, "text": strings}), temporary, compression="zstd")
    return {"strings": len(strings)}


def documentation_strings(path: Path) -> list[str]:
    """Return the documentation strings of a source file in the order of the syntax tree; none if it does not parse."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    try:
        source = path.read_bytes()
        if b'"""' not in source and b"'''" not in source:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    # A lone surrogate written as an escape is no text that UTF-8 can hold.
    return [text.encode("utf-8", "ignore").decode() for text in found if text and len(text) >= _SHORTEST]


def _write_shards(parsed: list[str], max_bytes: int, output: OutputFolder) -> list[str]:
    """Drop repeated strings, join those of a file to one document, and write ``SHARDS`` shards of equal counts."""
    seen: set[bytes] = set()
    documents: dict[str, list[str]] = {}
    total = 0
    for name in parsed:
        table = pq.read_table(output.local(name))
        for file, text in zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True):
            data = text.encode()
            key = hashlib.blake2b(data, digest_size=16).digest()
            size = len(data) + len("\n\n")
            if key not in seen and total + size <= max_bytes:
                seen.add(key)
                documents.setdefault(file, []).append(text)
                total += size
    ids = list(documents)
    names = []
    for shard in range(SHARDS):
        part = ids[shard::SHARDS]
        table = pa.table({"id": pa.array(part, pa.string()), "text": ["\n\n".join(documents[i]) for i in part]})
        names.append(f"shards/part-{shard:05d}-of-{SHARDS:05d}.parquet")
        with output.write(names[-1]) as temporary:
            pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
    return names
