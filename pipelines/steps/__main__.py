"""Run one step by itself: ``python -m pipelines.steps NAME SPEC.json``.

``SPEC.json`` is a step's ``spec.json``, or one of the ``steps`` that ``deconv plan --json`` prints. The storage is
``DECONV_STORAGE``. The result is printed as JSON and lies in the output folder; exit code 2 means that the input is at
fault, 1 that running again may help.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pipelines.environment import read_environment
from pipelines.errors import ConfigError, PipelineError
from pipelines.progress import configure_logging
from pipelines.runners import run_step
from pipelines.steps import StepSpec
from pipelines.store import Storage


def _read_spec(name: str, path: str) -> StepSpec:
    try:
        data = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is not a step specification")
    data.pop("state", None)  # what a plan adds for people
    spec = StepSpec.from_dict(data)
    if spec.step != name:
        raise ConfigError(f"{path} specifies step {spec.step}, not {name}")
    return spec


def main(arguments: list[str]) -> int:
    """Run the step named on the command line and return the exit code."""
    if len(arguments) != 2:
        print("usage: python -m pipelines.steps NAME SPEC.json", file=sys.stderr)
        return 2
    configure_logging()
    try:
        spec = _read_spec(*arguments)
        storage = Storage(read_environment().storage)
        storage.check_writable()
        report = run_step(spec, storage)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    print(json.dumps({"uri": report.output.uri, "cached": report.cached, "result": report.output.result}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
