"""Does a registered version give the score that it was chosen for, in a process that knows nothing but MLflow?"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.errors import InfraError
from pipelines.tracking import quiet_environment

TOLERANCE = 1e-6
_TIMEOUT_S = 600.0
_SCRIPT = """
import json, sys
import mlflow.pyfunc
request = json.load(sys.stdin)
model = mlflow.pyfunc.load_model(request["model"])
answer = model.predict([{"text": text} for text in request["texts"]], params={"max_new_tokens": 0})
with open(request["answer"], "w") as file:
    json.dump(answer["bits_per_byte"].tolist(), file)
"""


def verify_in_fresh_process(model_uri: str, texts: Sequence[str], expected: np.ndarray) -> None:
    """Load a model through MLflow in a new Python process and compare what it says of some texts.

    Args:
        model_uri: Any address that MLflow loads.
        texts: What to score.
        expected: Bits per byte of each, float64 ``[n]``.

    Raises:
        InfraError: The process failed, or a number differs by more than ``TOLERANCE`` of it.
    """
    with tempfile.TemporaryDirectory(prefix="deconv-verify-") as folder:
        answer = Path(folder) / "answer.json"
        request = {"model": model_uri, "texts": list(texts), "answer": str(answer)}
        # In an empty working folder nothing of a checkout can be imported by accident; without byte code nothing is
        # written beside the registered files, which are read where they are when they are on this disk.
        environment = quiet_environment() | {"PYTHONDONTWRITEBYTECODE": "1"}
        try:
            subprocess.run(
                [sys.executable, "-c", _SCRIPT],
                input=json.dumps(request),
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                check=True,
            )
        except subprocess.TimeoutExpired as error:
            raise InfraError(f"{model_uri} did not load and answer in {_TIMEOUT_S:.0f} s in a fresh process") from error
        except subprocess.CalledProcessError as error:
            last = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
            raise InfraError(f"{model_uri} does not load and answer in a fresh process: {last}") from error
        got = np.array(json.loads(answer.read_text()), dtype=np.float64)
    difference = np.abs(got - expected) / np.abs(expected)
    if not (difference <= TOLERANCE).all():
        worst = int(np.argmax(np.nan_to_num(difference, nan=np.inf)))
        raise InfraError(
            f"{model_uri} gives {got[worst]:.9g} bits per byte in a fresh process where this one has "
            f"{expected[worst]:.9g}: it is not the model that was evaluated"
        )
