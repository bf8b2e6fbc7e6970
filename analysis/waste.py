"""python -m analysis.waste results/SEARCH: stages computed, shared and replayed, and what that saved.

`saved` is the time that the same trials would have taken on top without the store, each computing what it wants once.
"""

from __future__ import annotations

from pathlib import Path

from analysis.folders import words
from steerheal.ledger import write_csv
from steerheal.waste import table, text


def say(folder: Path) -> str:
    write_csv(folder / "waste.csv", table(folder))
    return text(folder)


if __name__ == "__main__":
    words(__doc__, say)
