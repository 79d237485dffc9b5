"""Running one step exactly once, whoever else wants it too.

:func:`run_step` is the only way a step is run, by the flow in its own process or by ``python -m pipelines.steps`` in a
Ray job: it finds a complete output, waits for a living owner, takes over from a dead one, or does the work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipelines.errors import InfraError, interruption_behind
from pipelines.files import one_line
from pipelines.lease import Lease, describe_owner
from pipelines.progress import get_logger
from pipelines.provenance import collect_provenance
from pipelines.steps import StepSpec, load_step
from pipelines.store import PROVENANCE_FILE, SPEC_FILE, SUCCESS_FILE, OutputFolder, StepOutput, Storage

_POLL_S = 0.5
_log = get_logger(__name__)


@dataclass(frozen=True)
class StepReport:
    """How a step ended.

    Attributes:
        output: Its complete output.
        cached: Whether the work had been done before this call, or by another run during it.
        seconds: What the work took when it was done.
    """

    output: StepOutput
    cached: bool
    seconds: float


def is_current(spec: StepSpec, output: OutputFolder) -> bool:
    """Tell whether a step's output is complete and still true.

    A step whose output also lives outside of the storage (a registered version) defines ``is_current`` and looks.
    """
    if not output.is_complete():
        return False
    if spec.step != "register":
        return True
    check: Callable[[dict[str, Any], OutputFolder], bool] = load_step(spec.step).is_current
    return check(spec.config, output)


def run_step(spec: StepSpec, storage: Storage) -> StepReport:
    """Return the step's complete output, doing the work if nobody has done it.

    Raises:
        ConfigError, DataError: By the user's fault; nothing was left as complete.
        InfraError: Running again resumes the work.
    """
    try:
        return _run_step(spec, storage)
    except Exception as error:
        if (interrupt := interruption_behind(error)) is not None:
            raise interrupt from error  # or a cancelled step would count as failed, and be tried again
        if not isinstance(error, OSError):
            raise
        where = f" ({error.filename})" if error.filename else ""
        raise InfraError(f"step {spec.step}: {error.strerror or one_line(error)}{where}") from error


def _run_step(spec: StepSpec, storage: Storage) -> StepReport:
    output = storage.output(spec.address)
    lease = Lease(output)
    waiting = False
    while True:
        if is_current(spec, output):
            return _report(output, cached=True)
        owner = lease.try_acquire()
        if owner is None:
            break
        if not waiting:
            _log.info("[%s] waiting for %s, which does the same work", spec.step, describe_owner(owner))
            waiting = True
        time.sleep(_POLL_S)
    with lease:
        if is_current(spec, output):
            return _report(output, cached=True)
        _do_work(spec, storage, output.owned_by(lease.token))
    return _report(output, cached=False)


def _report(output: OutputFolder, *, cached: bool) -> StepReport:
    return StepReport(StepOutput(output.uri), cached, float(output.read_json(SUCCESS_FILE)["seconds"]))


def _do_work(spec: StepSpec, storage: Storage, output: OutputFolder) -> None:
    inputs = {}
    for name, address in spec.inputs.items():
        inputs[name] = StepOutput(storage.output(address).uri)
        if not inputs[name].is_complete():
            raise InfraError(f"step {spec.step} needs {inputs[name].uri}, which is not complete: run step {name} first")
    start = time.monotonic()
    _log.info("[%s] started: %s", spec.step, output.uri)
    output.remove(SUCCESS_FILE)
    output.clear_temporaries()
    output.write_json(SPEC_FILE, spec.to_dict())
    attempts = output.read_json(PROVENANCE_FILE)["attempts"] if output.exists(PROVENANCE_FILE) else []
    output.write_json(PROVENANCE_FILE, {"attempts": [*attempts, collect_provenance()]})
    result = load_step(spec.step).run(spec.config, inputs, output)
    output.finish(result, time.monotonic() - start)
    _log.info("[%s] done in %.1f s", spec.step, time.monotonic() - start)
