"""The views of a search's folder that are more than tables: its picture, and the front's adapters."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from steerheal.errors import UserError
from steerheal.plan import Plan


def draw(folder: Path) -> bool:
    """Refresh pareto.png; a failure to draw never ends a search."""
    try:
        from analysis import pareto

        pareto.draw_folder(folder)
        return True
    except Exception as error:
        print(f"warning: pareto.png could not be drawn: {type(error).__name__}: {error}", file=sys.stderr)
        return False


def export(plan: Plan, table: Any) -> int:
    """Write the front's adapters in PEFT's format to adapters/<trial>/r<round>/, and nothing else there."""
    from steerheal import history, weights
    from steerheal.stages import Store

    target = plan.folder / "adapters"
    wanted = {target / str(row["trial"]) / f"r{row['round']}": json.loads(row["chain"])
              for _, row in table[table["front"]].iterrows()}
    for old in target.glob("*/r*"):
        if old not in wanted:
            shutil.rmtree(old)
    name = plan.settings.model
    base = str(weights.locate(name)) if name in weights.WHEEL_MODELS else name
    store = Store(plan.store)
    for folder, chain in wanted.items():
        if not (folder / "adapter_config.json").exists():  # written last, so its presence means a whole adapter
            rounds = [history.from_tensors(found.tensors) for digest in chain if (found := store.load(digest))]
            if len(rounds) < len(chain):
                raise UserError(f"{folder} cannot be written: the stage store lost a round of it. The same command with "
                                f"--name OTHER computes what is missing, and nothing else; then give this command again.")
            history.export(history.fold(rounds), folder, base)
    return len(wanted)
