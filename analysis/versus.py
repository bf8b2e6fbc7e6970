"""python -m analysis.versus results/SEARCH: does the loop beat a prompt, and raw steering, at no less coherence?

Against each deliverable baseline stands the deliverable round with the largest trait gain of those that keep at least the
coherence that the baseline keeps. Their difference is paired over items, with its 95% interval. The round is the best of
many, which flatters it; fresh run seeds (`--confirm`, `python -m analysis.noise`) are the fair test.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.folders import Search, read, reading, words
from steerheal import personas
from steerheal.evaluation.readings import Estimate
from steerheal.ledger import write_csv
from steerheal.objectives import COHERENCE_FLOOR, FLUENCY_FLOOR, choose_trait
from steerheal.stages import store_beside

VECTOR = ("steer.method", "steer.band", "steer.contexts", "steer.normalise")  # trials that differ in these steer otherwise
COLUMNS = ["label", "edge_doses", "coherence_kept", "trait_gain", "rivals", "trial", "round", "round_coherence_kept",
           "round_trait_gain", "difference", "difference_low", "difference_high"]


def table(search: Search) -> pd.DataFrame:
    """One row per deliverable baseline but base: COLUMNS, differences in nats, positive where the round is ahead, and nothing
    from `trial` on where no round keeps as much coherence. rivals: the rounds that do, of which it is the best.

    Those whose stages are no longer in the store are left out.
    """
    store = store_beside(search.folder)
    stages = search.base.get("stages")
    base = reading(store, stages) if isinstance(stages, str) else None
    if base is None:
        return pd.DataFrame(columns=COLUMNS)
    settings = search.settings
    trait, _ = choose_trait(personas.load(settings["persona"]), settings["evaluate.trait"], base)
    able = search.rounds[search.rounds["deliverable"]]
    rungs = search.baselines[(search.baselines["coherence_kept"] >= COHERENCE_FLOOR)
                             & (search.baselines["fluency_kept"] >= FLUENCY_FLOOR) & (search.baselines["label"] != "base")]
    out = []
    for _, rung in rungs.iterrows():
        rivals = able[able["coherence_kept"] >= rung["coherence_kept"]]
        if rivals.empty:
            out.append([*rung[COLUMNS[:4]], 0, *[None] * 7])
            continue
        best = rivals.loc[rivals["trait_gain"].idxmax()]
        ours, theirs = reading(store, best["stages"]), reading(store, rung["stages"])
        if ours and theirs:
            out.append([*rung[COLUMNS[:4]], len(rivals), best["trial"], best["round"], best["coherence_kept"],
                        best["trait_gain"], *trait.gain(ours, theirs)])
    return pd.DataFrame(out, columns=COLUMNS).astype(dict(trial="Int64", round="Int64"))  # None would make them float


def sentences(rows: pd.DataFrame, searched: Sequence[str]) -> list[str]:
    """`table` in words.

    Args:
        searched: the names of the searched settings.
    """
    out = []
    for row in rows.itertuples():
        what = "the persona as a system prompt" if row.label == "prompted" else f"raw steering at {row.edge_doses:g} x edge"
        if pd.isna(row.trial):
            out.append(f"No deliverable round keeps as much coherence as {what} ({row.trait_gain:+.3f} nats at "
                       f"{row.coherence_kept:.3f}).")
            continue
        apart = Estimate(row.difference, row.difference_low, row.difference_high)
        verb = "cannot be told apart from" if not apart.clear_of_zero else "beats" if apart.value > 0 else "falls short of"
        chosen = f", the best of {row.rivals} such rounds," if row.rivals > 1 else ""
        out.append(f"At no less coherence, trial {row.trial} round {row.round} ({row.round_trait_gain:+.3f} nats at "
                   f"{row.round_coherence_kept:.3f}){chosen} {verb} {what} ({row.trait_gain:+.3f} at "
                   f"{row.coherence_kept:.3f}): {apart} nats, paired over items.")
    own = [name for name in searched if name in VECTOR]
    if out and own:
        out.append(f"Raw steering was measured with one vector, that of the trial which reported first, though the trials "
                   f"differ in {' and '.join(own)}.")
    return out


def say(folder: Path) -> str:
    search = read(folder)
    rows = table(search)
    write_csv(folder / "versus.csv", rows)
    nothing = ("There is nothing to compare with: no baseline but base is deliverable, or their stages are no longer in the "
               "store.")
    return "\n".join(sentences(rows, search.params)) or nothing


if __name__ == "__main__":
    words(__doc__, say)
