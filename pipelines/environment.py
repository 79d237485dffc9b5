"""Settings of the machine, from environment variables; none of them is part of a step's address.

======================  =======================================================  ================================
variable                meaning                                                  default
======================  =======================================================  ================================
DECONV_HOME             folder of everything that is kept without servers        ``.deconv`` in the working folder
DECONV_STORAGE          folder or URI of the step outputs                        ``$DECONV_HOME/steps``
MLFLOW_TRACKING_URI     MLflow server or database                                ``sqlite:///$DECONV_HOME/mlflow.db``
PREFECT_API_URL         Prefect server                                           one that lives as long as the run
RAY_ADDRESS             Ray cluster                                              one on this machine, likewise
======================  =======================================================  ================================
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Environment:
    """Where this process keeps things and which services it uses.

    Attributes:
        home: Folder of the embedded databases.
        storage: Path or URI of the step outputs.
        mlflow_tracking_uri: Of the MLflow server or database.
        mlflow_artifacts: Folder of artifacts when MLflow is a database on this machine, else ``None``.
    """

    home: Path
    storage: str
    mlflow_tracking_uri: str
    mlflow_artifacts: Path | None


def read_environment() -> Environment:
    """Read the settings and export the defaults that libraries and child processes look for."""
    home = Path(os.environ.get("DECONV_HOME") or ".deconv").expanduser().absolute()
    storage = os.environ.get("DECONV_STORAGE") or str(home / "steps")
    tracking = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}"
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        # A relative file would be another one for a process that works in another folder.
        prefix, _, path = (tracking if name == "MLFLOW_TRACKING_URI" else os.environ.get(name, "")).partition(":///")
        if prefix.startswith("sqlite") and path and not path.startswith("/"):
            os.environ[name] = f"{prefix}:///{Path(path).absolute()}"
            tracking = os.environ[name] if name == "MLFLOW_TRACKING_URI" else tracking
    embedded = tracking == f"sqlite:///{home / 'mlflow.db'}"
    artifacts = home / "mlflow-artifacts" if embedded else None
    os.environ["MLFLOW_TRACKING_URI"] = tracking
    if artifacts is not None:
        os.environ["DECONV_MLFLOW_ARTIFACTS"] = artifacts.as_uri()
    # Nothing that runs on the user's machine calls home unasked.
    for name, value in (
        ("DO_NOT_TRACK", "1"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("PREFECT_SERVER_ANALYTICS_ENABLED", "false"),
        ("RAY_USAGE_STATS_ENABLED", "0"),
    ):
        os.environ.setdefault(name, value)
    return Environment(home, storage, tracking, artifacts)
