"""python -m analysis.progress results/SEARCH: is the search still finding anything, and where did the time go?

Above, the hypervolume of the front after each finished trial, against trials and against hours of computing (pauses between
runs do not count). Below, by stage: seconds computed, and seconds the stage store saved by replaying instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from optuna.trial import TrialState

from analysis import style
from analysis.folders import Search, command, read
from steerheal import events
from steerheal.ledger import latest, open_study, volumes
from steerheal.stages import Store

STAGE_NAMES = {"completions": "generate", "scores": "filter", "vector": "extract"}  # the loop's words for stages


@dataclass
class Data:
    """What the picture shows.

    trials: trial, hours (of computing until it ended), hypervolume (of all trials up to it), in order of completion.
    stages: stage, computed and saved (seconds), n_computed, n_replayed, n_unknown (replays whose cost is not on record).
    """

    name: str
    trials: pd.DataFrame
    stages: pd.DataFrame


def data(folder: Path) -> Data:
    """Read the ledger, the study and the workers' events.

    Raises:
        UserError: no finished round.
    """
    search = read(folder)
    found = pd.DataFrame(events.read(folder), columns=["time", "trial", "kind", "stage", "digest", "seconds"])
    return Data(search.name, _trials(search, found), _stages(search, found))


def _trials(search: Search, found: pd.DataFrame) -> pd.DataFrame:
    ended = {index: trial.datetime_complete for index, trial in latest(open_study(search.folder)).items()
             if trial.datetime_complete and trial.state == TrialState.COMPLETE}
    order = sorted(ended, key=lambda index: ended[index])
    computed = found[found["kind"] == "computed"]
    seconds = events.busy(zip(computed["time"] - computed["seconds"], computed["time"]),
                   [ended[index].timestamp() for index in order])
    return pd.DataFrame(dict(trial=order, hours=np.array(seconds) / 3600, hypervolume=volumes(search.table, order)))


def _stages(search: Search, found: pd.DataFrame) -> pd.DataFrame:
    computed = found[found["kind"] == "computed"]
    cost = dict(zip(computed["digest"], computed["seconds"]))
    store = Store(search.folder.absolute().parent / ".stages")
    replayed = found[found["kind"] == "replayed"]
    for digest in set(replayed["digest"]) - set(cost):  # computed by another search
        if store.path(digest).exists():
            cost[digest] = store.head(digest)["seconds"]
    saved = replayed["digest"].map(cost).astype(float)  # of no replay at all pandas would make text
    rows = [dict(stage=STAGE_NAMES.get(stage, stage), computed=computed.loc[computed["stage"] == stage, "seconds"].sum(),
                 saved=saved[replayed["stage"] == stage].sum(), n_computed=int((computed["stage"] == stage).sum()),
                 n_replayed=int((replayed["stage"] == stage).sum()),
                 n_unknown=int(saved[replayed["stage"] == stage].isna().sum()))
            for stage in sorted(set(found["stage"].dropna()))]
    table = pd.DataFrame(rows, columns=["stage", "computed", "saved", "n_computed", "n_replayed", "n_unknown"])
    return table.sort_values("computed", ascending=False, ignore_index=True)


def draw(d: Data) -> plt.Figure:
    """Hypervolume twice above, time by stage below."""
    figure = plt.figure(figsize=(style.WIDTH, 3.4 + 0.45 * max(len(d.stages), 2)), layout="constrained")
    figure.suptitle(f"{d.name}: progress, and where the time went", fontweight="bold", fontsize=11.5, ha="left", x=0.02)
    grid = figure.add_gridspec(2, 2, height_ratios=(2.6, 0.45 * max(len(d.stages), 2)))
    left = figure.add_subplot(grid[0, 0])
    right = figure.add_subplot(grid[0, 1], sharey=left)
    _draw_volume(left, range(1, len(d.trials) + 1), d.trials, "trials finished")
    unit, per = ("hours", 1) if d.trials["hours"].max() >= 1 else ("minutes", 60)
    if d.stages.empty:
        style.say(right, "hours are not on record:\nthis folder has no events")
    else:
        _draw_volume(right, d.trials["hours"] * per, d.trials, f"{unit} of computing")
    left.set_ylabel("hypervolume (better ↑)\nnats × coherence kept")
    left.xaxis.get_major_locator().set_params(integer=True)
    right.tick_params(labelleft=False)
    _draw_stages(figure.add_subplot(grid[1, :]), d.stages)
    return figure


def _draw_volume(axes: plt.Axes, x: pd.Series | range, trials: pd.DataFrame, label: str) -> None:
    if trials.empty:
        style.say(axes, "no trial has ended yet")
        return
    axes.step([0, *x], [0, *trials["hypervolume"]], where="post", color=style.BLUE, linewidth=1.5)
    axes.scatter(x, trials["hypervolume"], color=style.BLUE, s=18, zorder=3)
    axes.set_ylim(0, max(trials["hypervolume"].max() * 1.15, 0.001))
    axes.set_xlim(0)
    axes.set_xlabel(label)
    if not trials["hypervolume"].max() > 0:
        style.note(axes, "no deliverable gain yet", "left", 0.9)


def _draw_stages(axes: plt.Axes, stages: pd.DataFrame) -> None:
    if stages.empty:
        style.say(axes, "where the time went is not on record")
        return
    unit, per = ("hours", 3600) if stages["computed"].sum() + stages["saved"].sum() >= 7200 else ("minutes", 60)
    y = np.arange(len(stages))[::-1]
    axes.barh(y + 0.2, stages["computed"] / per, height=0.36, color=style.BLUE)
    axes.barh(y - 0.2, stages["saved"] / per, height=0.36, color=style.GREEN)
    for at, (_, row) in zip(y, stages.iterrows()):
        unknown = f" (cost of {row['n_unknown']} not on record)" if row["n_unknown"] else ""
        for offset, seconds, words, colour in ((0.2, row["computed"], f"{row['n_computed']} computed", style.BLUE),
                                               (-0.2, row["saved"], f"{row['n_replayed']} replayed{unknown}", style.GREEN)):
            axes.annotate(f"{seconds / per:.1f}   {words}", (seconds / per, at + offset), (4, 0), va="center",
                          textcoords="offset points", fontsize=style.SMALL, color=colour)
    axes.set_yticks(y, stages["stage"])
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, max(stages["computed"].max(), stages["saved"].max(), 1e-6) / per * 1.45)
    axes.set_xlabel(unit)
    total, saved = stages["computed"].sum() / per, stages["saved"].sum() / per
    axes.set_title(f"{total:.1f} {unit} computed, {saved:.1f} saved by the store", fontweight="normal")


def draw_folder(folder: Path) -> Path:
    """Write progress.png, .svg and .csv, and progress_stages.csv, into a search's folder.

    Args:
        folder: a search's folder, such as results/quickstart
    """
    d = data(folder)
    d.stages.to_csv(folder / "progress_stages.csv", index=False)
    return style.save(draw(d), d.trials, folder / "progress")


if __name__ == "__main__":
    command(draw_folder, "progress", __doc__)
