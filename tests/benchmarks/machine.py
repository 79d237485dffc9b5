"""What a benchmark runs on, and its clock."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import torch

from deconv_model.numerics import resolve_precision


def device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def clock() -> float:
    """Return the seconds that count: of this process on a CPU, so that others do not; of the wall with a GPU."""
    return time.process_time() if device().type == "cpu" else time.perf_counter()


def wait() -> None:
    """Wait until the device has done all it was asked for."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def cpu_precision() -> torch.autocast:
    """Return the context in which a CPU computes matrix products as fast as it can."""
    fast = resolve_precision("auto", torch.device("cpu")) == "bfloat16"
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast)


def describe_machine() -> str:
    """Return the device, the cores and the version of torch in one line."""
    if device().type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = f"{names[0] if names else platform.machine()}, no GPU"
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
