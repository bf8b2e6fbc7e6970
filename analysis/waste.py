"""python -m analysis.waste results/SEARCH: stages computed, shared and replayed, and what that saved.

`saved` is the time that the same trials would have taken on top without the store, each computing what it wants once.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pandas as pd

from steerheal import events
from steerheal.cli import run_main
from steerheal.errors import UserError
from steerheal.stages import Store


def table(folder: Path) -> pd.DataFrame:
    """One row per kind of stage, see `events.waste`; stages that were only read are costed by the store's record.

    Raises:
        UserError: the folder holds no events.
    """
    found = events.read(folder)
    if not found:
        raise UserError(f"{folder} holds no events; name a folder that `python -m steerheal.search` wrote.")
    store, seconds = Store(folder.parent / ".stages"), {}
    own = {e["digest"] for e in found if e["kind"] == "computed"}
    for digest in {e["digest"] for e in found if e["kind"] == "replayed"} - own:
        with contextlib.suppress(FileNotFoundError):  # cleaned away since
            seconds[digest] = store.head(digest)["seconds"]
    return events.waste(found, seconds)


def text(folder: Path) -> str:
    """The table in words, with totals and the time outside stages."""
    rows = table(folder)
    total = rows.sum(numeric_only=True)
    lines = [f"{'stage':12} {'computed':>8} {'shared':>8} {'replayed':>8} {'spent':>10} {'saved':>10}"]
    for row in [*rows.to_dict("records"), dict(total) | {"stage": "all"}]:
        lines.append(f"{row['stage']:12} {row['computed']:8.0f} {row['shared']:8.0f} {row['replayed']:8.0f} "
                     f"{row['seconds']:8.0f} s {row['saved']:8.0f} s")
    alone = total["seconds"] + total["saved"]
    found = events.read(folder)
    outside = events.overhead(found, events.sessions(folder, found))
    lines.append(f"without sharing {alone:.0f} s, with it {total['seconds']:.0f} s: "
                 f"{100 * total['saved'] / alone:.0f}% saved" if alone else "nothing was computed")
    if outside is not None:
        lines.append(f"outside stages: {100 * outside:.1f}% of the search's time (Ray's start and loading the model "
                     f"included)")
    return "\n".join(lines)


def main() -> None:
    def action() -> int:
        if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
            print(__doc__.strip())
            return 0 if sys.argv[1:] in (["--help"], ["-h"]) else 2
        folder = Path(sys.argv[1])
        print(text(folder))
        table(folder).to_csv(folder / "waste.csv", index=False)
        return 0

    run_main(action)


if __name__ == "__main__":
    main()
