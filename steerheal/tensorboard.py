"""Scalars of each round for TensorBoard: results/SEARCH/tensorboard/trial-N, one step per round.

A view like the ledger. A trial that starts again starts its curves again, so none is drawn twice.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

SKIPPED = ("round", "deliverable")  # the step itself, and what the floors say already


class Scalars:
    def __init__(self, folder: Path):
        self.folder = folder / "tensorboard"

    def add(self, trial: int, row: dict[str, Any]) -> None:
        """Write every finite number of a finished round."""
        target = self.folder / f"trial-{trial}"
        if row["round"] == 0:
            shutil.rmtree(target, ignore_errors=True)
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k not in SKIPPED and math.isfinite(v)}
        # a file's name has its second, and two rounds that are replayed may share that
        with SummaryWriter(str(target), filename_suffix=f".{row['round']}") as writer:
            for name, value in numbers.items():
                writer.add_scalar(name, value, row["round"])
