"""python -m analysis.progress results/SEARCH: is the search still finding anything, and where did the time go?

Above, the hypervolume of the front after each finished trial, against trials and against hours in which trials ran (pauses
between runs do not count). Below, by stage: what was computed, and what trials had from each other and from other searches.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from analysis import style
from analysis.folders import command, read
from steerheal import waste
from steerheal.errors import UserError
from steerheal.ledger import read_progress, write_csv

STAGE_NAMES = {"completions": "generate", "scores": "filter", "vector": "extract"}  # the loop's words for stages


@dataclass
class Data:
    """What the picture shows.

    trials: `ledger.progress`.
    stages: `waste.count`, the costliest first.
    """

    name: str
    trials: pd.DataFrame
    stages: pd.DataFrame


def data(folder: Path) -> Data:
    """Read hypervolume.csv and the workers' events.

    Raises:
        UserError: no finished round.
    """
    try:
        stages = waste.table(folder)
    except UserError:  # hypervolume is in a file of its own; events may have been left behind
        stages = waste.count([])
    stages["stage"] = stages["stage"].replace(STAGE_NAMES)
    return Data(read(folder).name, read_progress(folder), stages.sort_values("seconds", ascending=False, ignore_index=True))


def draw(d: Data) -> plt.Figure:
    """Hypervolume twice above, time by stage below."""
    figure = plt.figure(figsize=(style.WIDTH, 3.4 + 0.45 * max(len(d.stages), 2)), layout="constrained")
    figure.suptitle(f"{d.name}: progress, and where the time went", fontweight="bold", fontsize=11.5, ha="left", x=0.02)
    grid = figure.add_gridspec(2, 2, height_ratios=(2.6, 0.45 * max(len(d.stages), 2)))
    left = figure.add_subplot(grid[0, 0])
    right = figure.add_subplot(grid[0, 1], sharey=left)
    _draw_volume(left, range(1, len(d.trials) + 1), d.trials, "trials finished")
    unit, per = ("hours", 1) if d.trials["hours"].max() >= 1 else ("minutes", 60)
    _draw_volume(right, d.trials["hours"] * per, d.trials, f"{unit} in which trials ran")
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
    unit, per = ("hours", 3600) if max(stages["seconds"].max(), stages["saved"].max()) >= 7200 else ("minutes", 60)
    y = np.arange(len(stages))[::-1]
    axes.barh(y + 0.2, stages["seconds"] / per, height=0.36, color=style.BLUE)
    axes.barh(y - 0.2, stages["saved"] / per, height=0.36, color=style.GREEN)
    for at, (_, row) in zip(y, stages.iterrows()):
        unknown = f" (cost of {row['unknown']} not on record)" if row["unknown"] else ""
        for offset, seconds, words, colour in ((0.2, row["seconds"], f"{row['computed']} computed", style.BLUE),
                                               (-0.2, row["saved"], f"{row['shared']} shared{unknown}", style.GREEN)):
            axes.annotate(f"{seconds / per:.1f}   {words}", (seconds / per, at + offset), (4, 0), va="center",
                          textcoords="offset points", fontsize=style.SMALL, color=colour)
    axes.set_yticks(y, stages["stage"])
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, max(stages["seconds"].max(), stages["saved"].max(), 1e-6) / per * 1.45)
    axes.set_xlabel(unit)
    total, saved = stages["seconds"].sum() / per, stages["saved"].sum() / per
    axes.set_title(f"{total:.1f} {unit} computed, {saved:.1f} saved by sharing", fontweight="normal")


def draw_folder(folder: Path) -> Path:
    """Write progress.png, .svg and .csv, and progress_stages.csv, into a search's folder.

    Args:
        folder: a search's folder, such as results/quickstart
    """
    d = data(folder)
    write_csv(folder / "progress_stages.csv", d.stages)
    return style.save(draw(d), d.trials, folder / "progress")


if __name__ == "__main__":
    command(draw_folder, "progress", __doc__)
