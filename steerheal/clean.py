"""python -m steerheal.clean: what the stage store holds, by search and age; --yes removes what no search refers to.

A search refers to the stages that its events and its ledger name. To give up a search's stages, remove or move its
folder away, then clean. Stages younger than --days are left alone, for a search or a `steerheal.run` may be about to read
them.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Iterable
from pathlib import Path

import tyro

from steerheal import events
from steerheal.cli import run_main
from steerheal.errors import UserError

DIGEST = re.compile(r"\b[0-9a-f]{64}\b")


@dataclasses.dataclass
class Args:
    """Show what the stage store holds, by search and age, and remove what no search refers to."""

    out: Path = Path("results")
    """where searches and their stage store live"""
    days: float = 1.0
    """leave stages alone that are younger than this"""
    yes: bool = False
    """remove; without it nothing is removed"""


def main() -> None:
    args = tyro.cli(Args, prog="python -m steerheal.clean", config=(tyro.conf.FlagCreatePairsOff,))
    run_main(lambda: clean(args.out, args.days, args.yes))


def clean(out: Path, days: float, yes: bool) -> int:
    """Print the store's table, then what goes, then remove it where `yes`.

    Raises:
        UserError: there is no store.
    """
    store = out / ".stages"
    if not 0 <= days < math.inf:
        raise UserError(f"--days {days:g}: must be at least 0")
    if not store.is_dir():
        raise UserError(f"--out {out}: no stage store there ({store}). Name the folder that holds your searches.")
    files = {p.name: p for p in store.glob("??/*") if len(p.name) == 64}
    searches = {p.parent.name: referred(p.parent) for p in sorted(out.glob("*/search.json"))}
    print(f"{store}: {_size(files.values())}")
    print(f"  {'search':32} {'stages':>7} {'all':>10} {'only its':>10}  last used")
    for name, digests in searches.items():
        mine = [files[d] for d in digests if d in files]
        others = set().union(*(d for n, d in searches.items() if n != name))
        only = [files[d] for d in digests - others if d in files]
        print(f"  {name:32} {len(mine):7} {_gb(mine):>10} {_gb(only):>10}  {_age(_last_used(out / name))} ago")
    orphans = [p for name, p in files.items() if not any(name in digests for digests in searches.values())]
    leftovers = [p for p in store.glob("??/*") if p.suffix == ".damaged" or p.name.endswith(".tmp")]
    limit = time.time() - 86400 * days
    going = [p for p in [*orphans, *leftovers] if p.stat().st_mtime < limit]
    young = len(orphans) + len(leftovers) - len(going)
    print(f"  {'no search':32} {len(orphans):7} {_gb(orphans):>10}")
    for words, low, high in (("a day", 0, 1), ("a week", 1, 7), ("a month", 7, 30), ("more", 30, 1e9)):
        aged = [p for p in orphans if low <= (time.time() - p.stat().st_mtime) / 86400 < high]
        if aged:
            print(f"    {'up to ' + words + ' old' if words != 'more' else 'older':30} {len(aged):7} {_gb(aged):>10}")
    print(f"to remove: {_size(going)}: {sum(p in orphans for p in going)} stages of no search, "
          f"{sum(p in leftovers for p in going)} damaged or half-written files"
          + (f"; {young} younger than {days:g} days stay" if young else ""))
    if going and yes:
        for path in going:
            path.unlink(missing_ok=True)
        print("removed")
    elif going:
        print("nothing is removed without --yes")
    return 0


def referred(folder: Path) -> set[str]:
    """Digests that a search's events and ledger name, those of its --confirm runs included."""
    found = {e["digest"] for part in (folder, folder / "confirm") for e in events.read(part) if e.get("digest")}
    for name in ("ledger.csv", "baselines.csv"):
        if (folder / name).exists():
            found |= set(DIGEST.findall((folder / name).read_text(errors="replace")))
    return found


def _last_used(folder: Path) -> float:
    return max((p.stat().st_mtime for p in folder.rglob("events/*.jsonl")), default=folder.stat().st_mtime)


def _size(paths: Iterable[Path]) -> str:
    paths = list(paths)
    return f"{len(paths)} files, {_gb(paths)}"


def _gb(paths: Iterable[Path]) -> str:
    return f"{sum(p.stat().st_size for p in paths) / 1e9:.3f} GB"


def _age(then: float) -> str:
    hours = (time.time() - then) / 3600
    return f"{hours:.0f} hours" if hours < 48 else f"{hours / 24:.0f} days"


if __name__ == "__main__":
    main()
