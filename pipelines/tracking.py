"""The MLflow run of a step: found again after a kill, and filled without doubling anything.

Every function may be called again with the same arguments; what is there already is left alone. All MLflow imports
are inside the functions, because importing it takes more than a second.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipelines.errors import ConfigError, InfraError
from pipelines.files import one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "deconv"
STEP_TAG = "deconv.step"
ARTIFACTS_VARIABLE = "DECONV_MLFLOW_ARTIFACTS"

_METRICS_IN_A_BATCH = 1000  # what the tracking server takes in one request
_PARAMS_IN_A_BATCH = 100
_LONGEST_PARAM = 6000
_PASSWORD = re.compile(r"(://[^/:@\s]*):[^/@\s]*@")
_QUIET = {
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def quiet_environment() -> dict[str, str]:
    """Return the environment of this process with what keeps MLflow silent, for a child process."""
    return {**_QUIET, **os.environ}


def tracking_uri() -> str:
    """Return where the tracking server or database is.

    Raises:
        ConfigError: ``MLFLOW_TRACKING_URI`` is not set.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        raise ConfigError("MLFLOW_TRACKING_URI is not set: give the address of an MLflow server or a sqlite:/// file")
    return uri


def registry_uri() -> str:
    """Return where the model registry is: with the tracking data unless ``MLFLOW_REGISTRY_URI`` says otherwise."""
    return os.environ.get("MLFLOW_REGISTRY_URI") or tracking_uri()


def sqlite_file(uri: str) -> Path | None:
    """Return the database file of a ``sqlite:///`` address, ``None`` for any other kind of address."""
    parts = urlsplit(uri)
    if not parts.scheme.startswith("sqlite") or len(parts.path) < 2:
        return None
    return Path(parts.path[1:])


def shown(text: str) -> str:
    """Return an address, or a text that holds some, as it may be printed: without passwords."""
    return _PASSWORD.sub(r"\1:***@", text)


@contextmanager
def connected() -> Iterator[MlflowClient]:
    """Give a client of the configured MLflow; its failures inside the block become :class:`InfraError`.

    Raises:
        ConfigError: ``MLFLOW_TRACKING_URI`` is not set.
        InfraError: MLflow cannot be reached, or refused what was asked.
    """
    uri = tracking_uri()
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for file in (sqlite_file(uri), sqlite_file(registry_uri())):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)

    import mlflow
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    for logger in ("mlflow", "alembic"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        yield mlflow.MlflowClient()
    except (mlflow.MlflowException, SQLAlchemyError, RequestException) as error:
        raise InfraError(shown(f"MLflow at {uri} failed: {one_line(error)}")) from error


def find_or_create_experiment(client: MlflowClient) -> str:
    """Return the id of the experiment ``deconv``.

    A new one keeps its artifacts under ``DECONV_MLFLOW_ARTIFACTS`` where that is set, else where the server says.
    """
    from mlflow import MlflowException

    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        try:
            return client.create_experiment(EXPERIMENT, os.environ.get(ARTIFACTS_VARIABLE) or None)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(EXPERIMENT)  # another run was faster
    assert experiment is not None
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return experiment.experiment_id


def find_or_create_run(client: MlflowClient, address: str, tags: Mapping[str, str]) -> str:
    """Return the id of the one MLflow run of a step's output.

    Args:
        client: From :func:`connected`.
        address: Address of the step's output; the run carries it as the tag ``deconv.step``.
        tags: More tags for a new run.
    """
    experiment = find_or_create_experiment(client)
    runs = client.search_runs(
        [experiment], f"tags.`{STEP_TAG}` = '{address}'", max_results=1, order_by=["attributes.start_time ASC"]
    )
    if runs:
        return runs[0].info.run_id
    return client.create_run(experiment, run_name=address, tags={STEP_TAG: address, **tags}).info.run_id


def log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    """Log nested settings as ``section.key``; those that the run has already stay as they are."""
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params
    new = [Param(key, str(value)[:_LONGEST_PARAM]) for key, value in flatten(params).items() if key not in known]
    for start in range(0, len(new), _PARAMS_IN_A_BATCH):
        client.log_batch(run_id, params=new[start : start + _PARAMS_IN_A_BATCH])


def log_history(client: MlflowClient, run_id: str, history: Sequence[Mapping[str, Any]]) -> None:
    """Log the numbers of a training by its steps, each step of each number once however often this is called.

    Args:
        client: From :func:`connected`.
        run_id: The run to fill.
        history: Entries with ``step`` and any other numbers.
    """
    from mlflow.entities import Metric

    start_time = client.get_run(run_id).info.start_time
    keys = {key for entry in history for key, value in entry.items() if key != "step" and _is_number(value)}
    logged = {key: {metric.step for metric in client.get_metric_history(run_id, key)} for key in keys}
    new = [
        Metric(key, float(entry[key]), start_time + int(entry["step"]), int(entry["step"]))
        for entry in history
        for key in sorted(keys & entry.keys())
        if _is_number(entry[key]) and int(entry["step"]) not in logged[key]
    ]
    for start in range(0, len(new), _METRICS_IN_A_BATCH):
        client.log_batch(run_id, metrics=new[start : start + _METRICS_IN_A_BATCH])


def flatten(data: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """Return nested mappings and lists as one flat mapping, keys joined by ``separator``."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, list | tuple):
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, Mapping):
            inner = flatten(value, separator)
            flat.update({f"{key}{separator}{name}": item for name, item in inner.items()})
        else:
            flat[str(key)] = value
    return flat


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
