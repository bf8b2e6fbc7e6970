"""A folder like a search's around one loop, so that ledger, report, pictures and pick read either alike.

The study holds one trial. It is written anew at every run: the stage store makes the same run again a replay.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from analysis import report
from steerheal import ledger, plan, weights
from steerheal.loop import HealLoop, Round
from steerheal.settings import Settings, identity, to_flat
from steerheal.stages import atomic_write, canonical


def folder_of(out: Path, settings: Settings) -> Path:
    """OUT/run-DIGEST, beside the stage store; of the settings, and of the files that they name."""
    body = identity(settings) | plan.contents(settings)
    return out.absolute() / f"run-{hashlib.sha256(canonical(body)).hexdigest()[:8]}"


class Single:
    """One loop's results in its folder. Whoever makes it holds the folder's lock."""

    def __init__(self, folder: Path, settings: Settings):
        self.folder = folder
        self.commit = weights.hub_commit(weights.locate(settings.model))
        body = dict(name=folder.name, space="one loop", model=settings.model, overrides={}, sampler="none", seed=0, trials=1,
                    identity=plan.versions() | identity(settings) | plan.contents(settings),
                    settings=to_flat(settings), commit=self.commit,
                    created=time.strftime("%Y-%m-%d %H:%M:%S"), **plan.environment())
        atomic_write(self.folder / "search.json", json.dumps(body, indent=2).encode())
        (self.folder / "study.db").unlink(missing_ok=True)
        self.study = ledger.create_study(self.folder)
        self.trial = self.study.ask()
        self.trial.set_user_attr("index", 0)
        self.rounds: list[dict[str, Any]] = []

    def begin(self, loop: HealLoop) -> None:
        """Measure the baselines, and keep them."""
        self.study.set_user_attr("baselines", loop.baselines().rows())
        self.study.set_user_attr("trait", loop.baselines().trait_reason)

    def add(self, round_: Round) -> None:
        """A round ended: rebuild ledger and report."""
        self.rounds.append(round_.row())
        self.trial.set_user_attr("rounds", self.rounds)
        ledger.write(self.study, self.folder)
        report.refresh(self.folder)

    def finish(self, loop: HealLoop) -> Path:
        """The loop ended: close the study, draw every figure. The folder."""
        ledger.conclude(self.study, self.trial, self.rounds, str(loop.end), loop.why, loop.starved)
        ledger.write(self.study, self.folder)
        report.refresh(self.folder, whole=True)
        return self.folder
