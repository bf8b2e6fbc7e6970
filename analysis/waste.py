"""python -m analysis.waste results/SEARCH: stages computed, shared and replayed, and what that saved.

`saved` is the time that the same trials would have taken on top without the store, each computing what it wants once.
"""

from __future__ import annotations

import sys
from pathlib import Path

from steerheal.cli import run_main
from steerheal.waste import table, text


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
