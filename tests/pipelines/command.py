"""The command line tool as a user starts it: a process of its own with nothing set but a folder for its state."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_OURS = ("DECONV_", "MLFLOW_", "PREFECT_", "RAY_")


def deconv(
    home: Path,
    *arguments: str,
    module: str = "pipelines.cli",
    python: tuple[str, ...] = (),
    stdin: bytes = b"",
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run ``deconv`` with the state in ``home / "state"`` and ``home`` as working folder."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    environment |= {"DECONV_HOME": str(home / "state"), "COLUMNS": "100", **variables}
    process = subprocess.run(
        [sys.executable, *python, "-m", module, *arguments], cwd=home, env=environment, input=stdin, capture_output=True
    )
    return subprocess.CompletedProcess(
        process.args, process.returncode, process.stdout.decode(), process.stderr.decode(errors="replace")
    )


def refused(home: Path, *arguments: str, **options: object) -> str:
    """Run ``deconv``, which must end at once by the user's fault, and return the one line that it says."""
    result = deconv(home, *arguments, **options)  # type: ignore[arg-type]
    assert result.returncode == 2, result
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ")
    complete = [path for path in (home / "state").rglob("*") if path.name in ("_SUCCESS", "mlflow.db")]
    assert complete == [], "something was left as if it were complete"
    return result.stderr.strip()
