"""Growth curves: one action at several sizes, timed in turn, and the exponent of size that fits its time.

Wall seconds are what a user waits. The exponent is fitted to processor seconds, which a busy machine disturbs less: least
squares in log-log. A fixed cost lowers it, so the exponent of the last step alone stands beside it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass
class Curve:
    name: str
    run: Callable[[int], object]
    sizes: tuple[int, ...]
    setup: Callable[[int], object] = lambda size: None  # before each run, not timed
    memory: Callable[[int], float] | None = None  # peak MiB of a run


def measure(curve: Curve, repeats: int) -> float:
    """Print a curve's line; its exponent."""
    wall: dict[int, list[float]] = {size: [] for size in curve.sizes}
    cpu: dict[int, list[float]] = {size: [] for size in curve.sizes}
    for _ in range(repeats):
        for size in curve.sizes:
            curve.setup(size)
            started = time.perf_counter(), time.process_time()
            curve.run(size)
            wall[size].append(time.perf_counter() - started[0])
            cpu[size].append(time.process_time() - started[1])
    seconds = [statistics.median(cpu[size]) for size in curve.sizes]
    fitted, last = exponent(curve.sizes, seconds), exponent(curve.sizes[-2:], seconds[-2:])
    print(f"{curve.name:26} {' '.join(f'{size:8}' for size in curve.sizes)}   exponent {fitted:.2f}, last {last:.2f}")
    for label, values in (("  seconds", [statistics.median(wall[size]) for size in curve.sizes]),
                          ("  processor seconds", seconds)):
        print(f"{label:26} {' '.join(f'{value:8.3f}' for value in values)}", flush=True)
    if curve.memory:
        peaks = []
        for size in curve.sizes:
            curve.setup(size)
            peaks.append(curve.memory(size))
        print(f"{'  peak MiB':26} {' '.join(f'{peak:8.1f}' for peak in peaks)}", flush=True)
    return fitted


def exponent(sizes: tuple[int, ...], seconds: list[float]) -> float:
    """b of seconds = a * size^b, by least squares in log-log."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
