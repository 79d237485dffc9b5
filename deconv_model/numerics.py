"""Which precision and which kernels a device computes with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
import torch.utils.deterministic as memory

from deconv_model.config import Precision

ResolvedPrecision = Literal["float32", "bfloat16"]


def resolve_precision(precision: Precision, device: torch.device) -> ResolvedPrecision:
    """Return the precision of the matrix products: ``auto`` is bfloat16 where the device computes it fast."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_fast = device.type == "cpu" and _cpu_has_bfloat16()
    return "bfloat16" if is_fast else "float32"


def _cpu_has_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if "avx512_bf16" in capabilities:
        return bool(capabilities["avx512_bf16"] or capabilities.get("amx_bf16", False))
    try:  # a torch that does not say
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


@contextmanager
def deterministic_kernels(device: torch.device) -> Iterator[None]:
    """Choose deterministic kernels on a GPU inside the block; those of the CPU are, for a given number of threads.

    An operation that has none warns once and computes on.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may sum in another order
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = memory.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid that costs time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
