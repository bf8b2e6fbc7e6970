"""python -m steerheal.pick results/SEARCH: the front as a table, and one of its adapters to take away."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Annotated

import tyro

from steerheal.cli import run_main
from steerheal.errors import UserError


@dataclasses.dataclass
class Args:
    """Show a search's Pareto front; choose from it and export an adapter."""

    folder: Annotated[Path, tyro.conf.Positional]
    """a search's folder, such as results/pareto_tau"""
    index: int | None = None
    """row of the table to take, counted from 0"""
    min_coherence: float | None = None
    """instead of an index: the largest trait gain with at least this coherence kept"""
    export: Path | None = None
    """copy the chosen adapter here"""


def main() -> None:
    args = tyro.cli(Args, prog="python -m steerheal.pick")
    run_main(lambda: pick(args))


def pick(args: Args) -> int:
    from steerheal import ledger
    from steerheal.display import front_table, interval, make_console

    table = ledger.read(args.folder)
    front = table[table["front"]].sort_values("trait_gain", ascending=False).reset_index(drop=True)
    if front.empty:
        raise UserError(f"{args.folder}: no round was deliverable, so there is nothing to pick.")
    params = [c for c in table.columns if "." in c]
    make_console().print(front_table(table, params))
    if args.index is None and args.min_coherence is None:
        if args.export:
            raise UserError("--export: name what to export with --index N or --min-coherence X.")
        return 0
    if args.index is not None:
        if not 0 <= args.index < len(front):
            raise UserError(f"--index {args.index}: allowed: 0 to {len(front) - 1}, the rows of the table.")
        row = front.iloc[args.index]
    else:
        sane = front[front["coherence_kept"] >= args.min_coherence]
        if sane.empty:
            raise UserError(f"--min-coherence {args.min_coherence:g}: the front's best is "
                            f"{front['coherence_kept'].max():.3f}.")
        row = sane.iloc[0]
    adapter = args.folder / "adapters" / str(row["trial"]) / f"r{row['round']}"
    print(f"trial {row['trial']} round {row['round']}: trait gain {interval(row)} nats, coherence kept "
          f"{row['coherence_kept']:.3f}, {row['verdict']}\n{adapter}")
    if args.export:
        if args.export.exists():
            raise UserError(f"--export {args.export}: exists already; name a new folder.")
        shutil.copytree(adapter, args.export)
        print(f"copied to {args.export}")
    return 0


if __name__ == "__main__":
    main()
