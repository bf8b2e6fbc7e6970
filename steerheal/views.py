"""The front's adapters in a search's folder."""

from __future__ import annotations

import shutil
from typing import Any

from steerheal.export import Member, base_name, factors
from steerheal.plan import Plan
from steerheal.stages import atomic_write


def export(plan: Plan, table: Any) -> int:
    """Write the front's adapters in PEFT's format to adapters/<trial>/r<round>/, and nothing else there; how many.

    Raises:
        UserError: the stage store lost a round of one.
    """
    target = plan.folder / "adapters"
    wanted = {target / str(row["trial"]) / f"r{row['round']}": Member(plan.folder, row, plan.settings, plan.commit)
              for _, row in table[table["front"]].iterrows()}
    for old in target.glob("*/r*"):
        if old not in wanted:
            shutil.rmtree(old)
    for folder, member in wanted.items():
        written = folder / ".adapter"  # last, so that it means a whole adapter, and this one: another may have had its name
        if not written.exists() or written.read_text() != member.row["adapter"]:
            from steerheal import history  # torch and PEFT take seconds to load, and mostly there is nothing to write

            history.export(factors(member), folder, base_name(plan.settings.model), plan.commit)
            atomic_write(written, member.row["adapter"].encode())
    return len(wanted)
