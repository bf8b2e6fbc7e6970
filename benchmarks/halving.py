"""python -m benchmarks.halving LEDGER: what successive halving would have saved of a finished search, and lost.

Replays the trials of a ledger (results/SEARCH/ledger.csv) in their own order and in 200 random ones. The proposals stay
as they were; trials that ended early by themselves count as they are.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pandas as pd
import tyro

from benchmarks.command import command
from steerheal.errors import UserError
from steerheal.halving import GRACE, replay

ORDERS = 200


def trials(path: Path) -> list[list[dict[str, Any]]]:
    """The rounds of each finished trial, in the order of the ledger."""
    try:
        table = pd.read_csv(path).dropna(subset=["round"])
    except (FileNotFoundError, KeyError):
        raise UserError(f"{path}: no ledger; name the ledger.csv of a search.") from None
    done = table[table["state"] == "complete"].sort_values(["trial", "round"])
    return [group[["trait_gain", "coherence_kept", "violation"]].to_dict("records") for _, group in done.groupby("trial")]


def report(path: tyro.conf.Positional[Path]) -> int:
    found = trials(path)
    if not any(len(rows) > GRACE for rows in found):
        raise UserError(f"{path}: no finished trial has more than {GRACE} rounds, so halving could save nothing.")
    own = replay(found)
    shuffled = [replay(found, seed) for seed in range(ORDERS)]
    saved = [100 * r.saved / r.rounds for r in shuffled]
    regret = [100 * r.regret for r in shuffled]
    print(f"{path}: {len(found)} trials, {own.rounds} rounds")
    print(f"in their order: {own.stopped} trials stopped early, {own.saved} rounds saved "
          f"({100 * own.saved / own.rounds:.0f}%), hypervolume lost {100 * own.regret:.1f}%")
    print(f"in {ORDERS} random orders: {statistics.mean(saved):.0f}% of the rounds saved (from {min(saved):.0f}% to "
          f"{max(saved):.0f}%), hypervolume lost {statistics.mean(regret):.1f}% (at worst {max(regret):.1f}%)")
    print(f"RESULT trials={len(found)} rounds={own.rounds} saved={own.saved / own.rounds:.3f} regret={own.regret:.4f} "
          f"saved_mean={statistics.mean(saved) / 100:.3f} regret_mean={statistics.mean(regret) / 100:.4f} "
          f"regret_max={max(regret) / 100:.4f}")
    return 0


if __name__ == "__main__":
    command(report)
