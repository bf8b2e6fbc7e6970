"""What sharing saved a search: stages computed, shared and replayed, and the time outside stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from steerheal import events
from steerheal.errors import UserError
from steerheal.stages import store_beside


def table(folder: Path) -> pd.DataFrame:
    """One row per kind of stage, see `count`; stages that were only read are costed by the store's record.

    Raises:
        UserError: the folder holds no events.
    """
    found = events.read(folder)
    if not found:
        raise UserError(f"{folder} holds no events; name a folder that `python -m steerheal.search` wrote.")
    store, seconds = store_beside(folder), {}
    own = {e["digest"] for e in found if e["kind"] == "computed"}
    for digest in {e["digest"] for e in found if e["kind"] == "replayed"} - own:
        if head := store.head(digest):  # else cleaned away since
            seconds[digest] = head["seconds"]
    return count(found, seconds)


def text(folder: Path) -> str:
    """The table in words, with totals and the time outside stages."""
    rows = table(folder)
    total = {column: float(rows[column].sum()) for column in rows.columns[1:]}
    lines = [f"{'stage':12} {'computed':>8} {'shared':>8} {'replayed':>8} {'spent':>10} {'saved':>10}"]
    for row in [*rows.to_dict("records"), total | {"stage": "all"}]:
        lines.append(f"{row['stage']:12} {row['computed']:8.0f} {row['shared']:8.0f} {row['replayed']:8.0f} "
                     f"{row['seconds']:8.0f} s {row['saved']:8.0f} s")
    alone = total["seconds"] + total["saved"]
    found = events.read(folder)
    outside = overhead(found, events.sessions(folder, found))
    lines.append(f"without sharing {alone:.0f} s, with it {total['seconds']:.0f} s: "
                 f"{100 * total['saved'] / alone:.0f}% saved" if alone else "nothing was computed")
    if total["unknown"]:
        lines.append(f"what {total['unknown']:.0f} of the shared stages would have cost is not on record: they are no longer "
                     f"in the store")
    if outside is not None:
        lines.append(f"outside stages: {100 * outside:.1f}% of the search's time (Ray's start and loading the model "
                     f"included)")
    return "\n".join(lines)


def count(found: list[dict[str, Any]], store_seconds: dict[str, float] | None = None) -> pd.DataFrame:
    """What was computed and what sharing saved, one row per kind of stage.

    Columns: stage; computed, seconds (spent); shared (wanted by a trial, but computed by another or by another search);
    replayed (read again by the same trial: after an interruption, or because two of its steps want one stage); saved
    (seconds that trials would have spent without sharing, each computing every stage it wants once); unknown (shared stages
    whose seconds are not on record, which `saved` leaves out).

    Args:
        store_seconds: seconds of stages that this search only read, by digest.
    """
    kinds: dict[str, str] = {}
    spent: dict[str, float] = {}
    owner: dict[str, int] = {}
    wanted: dict[tuple[int, str], int] = {}
    for e in found:
        if e["kind"] in ("computed", "replayed"):
            digest = e["digest"]
            kinds[digest] = e["stage"]
            wanted[e["trial"], digest] = wanted.get((e["trial"], digest), 0) + 1
            if e["kind"] == "computed":
                spent[digest] = spent.get(digest, 0.0) + e["seconds"]
                owner.setdefault(digest, e["trial"])
    rows = []
    for kind in sorted(set(kinds.values())):
        mine = [d for d in spent if kinds[d] == kind]
        shared = [d for t, d in wanted if kinds[d] == kind and owner.get(d) != t]
        cost = (store_seconds or {}) | spent
        rows.append(dict(stage=kind, computed=len(mine), seconds=sum(spent[d] for d in mine), shared=len(shared),
                         replayed=sum(n - 1 for (_, d), n in wanted.items() if kinds[d] == kind),
                         saved=sum(cost.get(d, 0.0) for d in shared), unknown=sum(d not in cost for d in shared)))
    return pd.DataFrame(rows, columns=["stage", "computed", "seconds", "shared", "replayed", "saved", "unknown"])


def overhead(found: list[dict[str, Any]], sessions: list[events.Session]) -> float | None:
    """Share of the drivers' time in which no stage was computed: starting Ray, loading models, proposing, drawing."""
    held = sum((s.end - s.start) * s.concurrent for s in sessions)
    inside = sum(e["seconds"] for e in found if e["kind"] == "computed"
                 and any(s.start <= e["time"] <= s.end + 1 for s in sessions))
    return 1 - inside / held if held else None
