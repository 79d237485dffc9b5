"""Ray: started where it is needed, and one function run over many shards.

A step that finds its work done never comes here, so a cached run starts no Ray.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pipelines import errors
from pipelines.errors import ConfigError, InfraError, PipelineError
from pipelines.files import one_line
from pipelines.guard import start_guard
from pipelines.progress import get_logger, progress

_RETRIES = 3  # of a task whose worker died
_log = get_logger(__name__)
_guards: list[subprocess.Popen[bytes]] = []  # kept: the pipe to a guard closes with its object


def ensure_ray() -> None:
    """Connect to the cluster at ``RAY_ADDRESS``, or start one that lives as long as this process.

    Raises:
        ConfigError: The cluster has several nodes, and the storage is on one of them.
        InfraError: There is no cluster at that address, or none could be started.
    """
    # Read at import: training would otherwise wait up to 2 s for every report.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    _log.info("[ray] %s", f"connecting to {address}" if address else "starting on this machine")
    options: dict[str, Any] = {} if address else {"include_dashboard": False}
    try:
        with _kept_sigterm_handler():
            # "local" never attaches to somebody else's Ray on this machine.
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError, ray.exceptions.RayError) as error:
        raise InfraError(f"Ray at {address or 'this machine'}: {one_line(error)}") from error
    if address and not os.environ.get("DECONV_STORAGE") and sum(node["Alive"] for node in ray.nodes()) > 1:
        raise ConfigError("this Ray has several nodes: set DECONV_STORAGE to a folder or URI that all of them reach")
    if not address:
        _guards.append(start_guard())


@contextmanager
def _kept_sigterm_handler() -> Iterator[None]:
    """Put the handler of SIGTERM back that ``ray.init`` replaces with one that aborts the process."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def map_shards(
    label: str, function: Callable[[dict[str, Any]], dict[str, Any]], tasks: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Run a function over shards with Ray Data, one task a shard.

    A dataset of shard descriptions, where each task reads, works and writes by itself, is two to five times as fast as
    ``read_parquet`` and ``write_parquet``, and a shard's fault is reported with its name.

    Args:
        label: Name of the step, for the progress bar.
        function: A function of a module; takes a task and returns small plain data.
        tasks: Plain data each, small.

    Returns:
        The results in the order of the tasks.

    Raises:
        PipelineError: As raised by the function for one of the tasks.
        InfraError: Ray failed.
    """
    if not tasks:
        return []
    ensure_ray()
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = [{"index": index, "task": json.dumps(task)} for index, task in enumerate(tasks)]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    with warnings.catch_warnings():
        # Ray Data would start a task that kills its worker over and over for ever; 2.60 has no other way to bound it.
        warnings.simplefilter("ignore", DeprecationWarning)
        mapped = dataset.map(functools.partial(_run_task, function), max_retries=_RETRIES)
    results: dict[int, dict[str, Any]] = {}
    try:
        with progress(label, total=len(tasks), unit="shards") as bar:
            for row in mapped.iter_rows():
                if row["error"]:
                    raise getattr(errors, row["error"])(row["result"])
                results[row["index"]] = json.loads(row["result"])
                bar.advance()
    except ray.exceptions.RayError as error:
        raise InfraError(f"step {label}: a Ray task failed: {one_line(error)}") from error
    return [results[index] for index in range(len(tasks))]


def _run_task(function: Callable[[dict[str, Any]], dict[str, Any]], row: dict[str, Any]) -> dict[str, Any]:
    """Run in a Ray worker: errors that are meant for the user travel as data, not as a stack trace."""
    try:
        return {"index": row["index"], "error": "", "result": json.dumps(function(json.loads(row["task"])))}
    except PipelineError as error:
        return {"index": row["index"], "error": type(error).__name__, "result": str(error)}
    except Exception as error:
        _log.exception("%s failed", function.__name__)  # into the log of the worker
        message = f"{function.__name__}: {type(error).__name__}: {error}"
        return {"index": row["index"], "error": "InfraError", "result": message}
