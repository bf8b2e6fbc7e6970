"""Timing two sides in turn (A B A B), so that a machine that slows down slows both; and the process's peak memory, as the
kernel counts it."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path


def in_turn(sides: dict[str, Callable[[], object]], repeats: int = 3) -> dict[str, float]:
    """Median seconds of each side over `repeats` turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def environment() -> str:
    """Threads, dtype kernels and versions, for the head of a table."""
    import torch
    import transformers

    return f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads"


def forget_peak() -> float:
    """Start the high-water mark of this process's memory again, without what was freed before; GiB in use now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def resident_peak() -> float:
    """GiB at the high-water mark since `forget_peak`."""
    return _status("VmHWM")


def _status(name: str) -> float:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(name + ":"))
    return int(line.split()[1]) / 2**20
