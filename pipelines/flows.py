"""The Prefect flow that chains the steps. The only file that imports Prefect.

Each step is a task named after it. What is done and what is not is decided by the outputs in the storage
(:mod:`pipelines.runners`), never by Prefect's own cache or state: a retry, a re-run or another flow run finds the work
of this one. Errors of the user are not retried; others are retried once, which resumes.
"""

from __future__ import annotations

import time
from typing import Any

from prefect import flow, task
from prefect.client.schemas.objects import State, TaskRun
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.tasks import Task

from pipelines.config import PipelineConfig
from pipelines.environment import read_environment
from pipelines.errors import InfraError
from pipelines.runners import run_step
from pipelines.steps import StepSpec, plan
from pipelines.store import Storage
from pipelines.summary import summarise_run

_RETRY_DELAY_S = 5.0
_DRAIN_S = 10.0


def _is_infra_error(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    return isinstance(state.result(raise_on_failure=False), InfraError)


@task(retries=1, retry_delay_seconds=_RETRY_DELAY_S, retry_condition_fn=_is_infra_error, persist_result=False)
def do_step(spec: dict[str, Any], storage: str) -> dict[str, Any]:
    """Run one step if nobody has, and say how it ended."""
    report = run_step(StepSpec.from_dict(spec), Storage(storage))
    return {
        "step": report.output.step,
        "address": report.output.address,
        "uri": report.output.uri,
        "cached": report.cached,
        "seconds": report.seconds,
    }


@flow(name="train-language-model", persist_result=False)
def train_language_model(config: PipelineConfig) -> dict[str, Any]:
    """Turn a corpus into a registered language model.

    Args:
        config: What to do; the storage and the services come from the environment.

    Returns:
        The summary of the run: steps, metrics, samples, the registered version (see :mod:`pipelines.summary`).

    Raises:
        ConfigError, DataError: By the user's fault; nothing was registered.
        InfraError: Running again resumes the work.
    """
    start = time.monotonic()
    storage = Storage(read_environment().storage)
    storage.check_writable()
    steps = []
    for spec in plan(config):
        named = do_step.with_options(name=spec.step, task_run_name=spec.address)
        steps.append(named(spec.to_dict(), storage.uri))
    return summarise_run(steps, storage, time.monotonic() - start)


def run_flow(config: PipelineConfig) -> dict[str, Any]:
    """Run the flow in this process and return its summary, when all that was logged has reached the server.

    Without that wait a server that ends with the run would be gone before the last lines come, and Prefect would try
    for a minute to deliver them.
    """
    try:
        return train_language_model(config)
    finally:
        for worker in (APILogWorker, EventsWorker):
            worker.drain_all(timeout=_DRAIN_S)
