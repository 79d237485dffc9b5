"""By which code, on which machine and by whom an output was made."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_PACKAGES = (
    "deconv",
    "torch",
    "ray",
    "prefect",
    "mlflow",
    "pyarrow",
    "numpy",
    "tokenizers",
    "gigatoken",
    "safetensors",
)


def _git(*arguments: str) -> str | None:
    """Return what git says of this package's checkout, or ``None`` outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def collect_provenance() -> dict[str, Any]:
    """Return the facts about this process as plain data.

    ``git_commit`` and ``git_dirty`` are those of the checkout that this package runs from; in an image they come from
    ``DECONV_GIT_COMMIT``, and are ``None`` where neither is there.
    """
    inside = _git("ls-files", "--error-unmatch", "provenance.py") is not None
    commit = _git("rev-parse", "HEAD") if inside else os.environ.get("DECONV_GIT_COMMIT")
    return {
        "git_commit": commit,
        "git_dirty": bool(_git("status", "--porcelain")) if inside else None,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "user": os.environ.get("USER") or str(os.getuid()),
        "argv": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
