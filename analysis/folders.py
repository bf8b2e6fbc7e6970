"""What the modules of analysis/ share: reading a search's folder, and running as a command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from steerheal import ledger, plan
from steerheal.cli import run_main
from steerheal.errors import UserError
from steerheal.evaluation.readings import Reading
from steerheal.stages import Store

# read from ledger and baselines as numbers; where a ledger lacks one it is NaN, and the figure says what is missing
NUMBERS = ("trait_gain", "trait_gain_low", "trait_gain_high", "coherence", "coherence_low", "coherence_high",
           "coherence_kept", "coherence_kept_low", "coherence_kept_high",
           "steered_gain", "steered_gain_low", "steered_gain_high", "steered_coherence",
           "steered_coherence_low", "steered_coherence_high", "authority_nats", "care_nats", "steered_authority_nats",
           "steered_care_nats", "log_ratio", "duty", "edge_doses")


@dataclass
class Search:
    """A search's folder, read.

    table: one row per finished round (columns: steerheal/ledger.py), or one without a round for a trial that has none.
    baselines: label (base, prompted, steered), edge_doses, and the readouts.
    """

    folder: Path
    table: pd.DataFrame
    baselines: pd.DataFrame

    @property
    def name(self) -> str:
        return self.folder.absolute().name

    @property
    def rounds(self) -> pd.DataFrame:
        return self.table.dropna(subset=["round"])

    @property
    def trait(self) -> str:
        """The trait's readout, such as conduct_nats."""
        return str(self.rounds["trait"].iloc[0])

    @property
    def params(self) -> list[str]:
        """The searched settings, by dotted name."""
        return ledger.searched(self.table)

    @property
    def base(self) -> pd.Series:
        """The model as loaded; NaN where it was not stored."""
        rows = self.baselines[self.baselines["label"] == "base"]
        return rows.iloc[0] if len(rows) else pd.Series(float("nan"), index=self.baselines.columns)

    @property
    def settings(self) -> dict[str, Any]:
        """Of every trial but for the searched ones, flat."""
        return plan.read(self.folder)["settings"]


def read(folder: Path) -> Search:
    """Read a search's folder.

    Raises:
        UserError: the folder holds no ledger, or no finished round.
    """
    table = ledger.read(folder)
    if table["round"].isna().all():
        raise UserError(f"{folder}: no round is finished yet.")
    baselines = ledger.read_baselines(folder)
    for frame in (table, baselines):
        for column in NUMBERS:
            frame[column] = pd.to_numeric(frame.get(column, float("nan")))
    search = Search(folder, table, baselines)
    for end in ("low", "high"):  # a ledger from before these were paired with base has wider ones
        unpaired = (table[f"coherence_{end}"] / search.base["coherence"]).clip(upper=1)
        table[f"coherence_kept_{end}"] = table[f"coherence_kept_{end}"].fillna(unpaired)
    return search


def reading(store: Store, stages: str) -> Reading | None:
    """The readout behind a ledger's or baseline's row, item by item, from its column `stages`; None where it is gone."""
    found = {name: store.load(digest) for name, digest in json.loads(stages).items()}
    foundations, conduct = found.get("foundations"), found.get("conduct")
    return Reading.of(foundations, conduct) if foundations and conduct else None


def count(n: int, noun: str) -> str:
    return f"{n} {noun}" + "s" * (n != 1)


def words(doc: str | None, say: Callable[[Path], str]) -> None:
    """Run a module that prints text about one folder, its only argument, as a command."""
    def action() -> int:
        if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
            print((doc or "").strip())
            return 0 if sys.argv[1:] in (["--help"], ["-h"]) else 2
        print(say(Path(sys.argv[1])))
        return 0

    run_main(action)


def command(draw: Callable[..., Path], name: str, doc: str) -> None:
    """Run analysis.`name` as a command: the parameters of `draw` are its arguments; it returns what it wrote, less .png."""
    import tyro

    def action() -> int:
        path = tyro.cli(draw, prog=f"python -m analysis.{name}", description=doc,
                        config=(tyro.conf.PositionalRequiredArgs,))
        print(f"{path}.png, .svg and .csv")
        return 0

    run_main(action)
