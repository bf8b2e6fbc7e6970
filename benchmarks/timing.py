"""Timing two sides in turn (A B A B), so that a machine that slows down slows both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


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
