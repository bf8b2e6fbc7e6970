"""Backup, ledger, display and report of a running search, rebuilt as its study changes.

A rebuild takes time in proportion to the study, so one at every change would make a search quadratic in its rounds. Hence
rebuilding may take a tenth of the time and no more: a change is followed at once where that is so, else as soon as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from analysis import report
from steerheal import ledger, study_file

SHARE = 0.1


class Follower:
    def __init__(self, folder: Path, study: Any, on_table: Callable[[Any], None]):
        """
        Args:
            on_table: takes the ledger whenever it was rebuilt.
        """
        self.folder, self.study, self.on_table = folder, study, on_table
        self.behind = False
        self.due = 0.0

    def change(self) -> None:
        """The study changed."""
        self.behind = True
        self.catch_up()

    def catch_up(self, now: bool = False) -> None:
        """Rebuild what is behind the study, if it is time to, or `now`."""
        started = time.monotonic()
        if self.behind and (now or started >= self.due):
            self.behind = False
            study_file.back_up(self.folder)
            self.on_table(ledger.write(self.study, self.folder))
            if (self.folder / "search.json").exists():  # not beside the runs that confirm a front
                report.refresh(self.folder)
            self.due = started + (time.monotonic() - started) / SHARE
