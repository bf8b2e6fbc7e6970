"""python -m analysis.pareto results/SEARCH: every round of every trial, the front, and what it must beat.

Right is more trait, up is more coherence. Grey points are not deliverable. Hollow marks are the baselines: the model as
loaded, the persona as a system prompt, and raw steering at a ladder of doses.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from analysis import style
from steerheal.cli import run_main
from steerheal.errors import UserError
from steerheal.ledger import hypervolume
from steerheal.objectives import COHERENCE_FLOOR


@dataclass
class Data:
    """What the picture shows. points: one row per round; baselines: label, trait_gain with interval, coherence_kept."""

    name: str
    trait: str
    points: pd.DataFrame
    baselines: pd.DataFrame
    hypervolume: float


def data(folder: Path) -> Data:
    """Read a search's ledger.

    Raises:
        UserError: the folder holds no ledger, or no finished round.
    """
    try:
        table = pd.read_parquet(folder / "ledger.parquet")
        text = (folder / "baselines.csv").read_text()
    except FileNotFoundError:
        raise UserError(f"{folder} holds no ledger; name a folder that `python -m steerheal.search` wrote.") from None
    points = table.dropna(subset=["round"])
    if points.empty:
        raise UserError(f"{folder}: no round is finished yet.")
    baselines = pd.read_csv(folder / "baselines.csv") if text.strip() else pd.DataFrame()
    return Data(folder.name, points["trait"].iloc[0], points, baselines, hypervolume(table))


def draw(d: Data) -> plt.Figure:
    """The picture of a search."""
    figure, axes = plt.subplots(figsize=(8, 5.6))
    p, front = d.points, d.points[d.points["front"]].sort_values("trait_gain")
    axes.axhline(COHERENCE_FLOOR, color=style.GREY, linewidth=1, linestyle="--")
    for rows, colour, zorder in ((p[~p["deliverable"]], style.GREY, 2), (p[p["deliverable"] & ~p["front"]], style.BLUE, 3),
                                 (front, style.ORANGE, 4)):
        axes.errorbar(rows["trait_gain"], rows["coherence_kept"],
                      xerr=[rows["trait_gain"] - rows["trait_gain_low"], rows["trait_gain_high"] - rows["trait_gain"]],
                      fmt="o", markersize=6, color=colour, ecolor=colour, elinewidth=0.8, alpha=0.9, zorder=zorder)
    axes.plot(front["trait_gain"], front["coherence_kept"], color=style.ORANGE, linewidth=1.5, zorder=3)
    _draw_baselines(axes, d.baselines)
    labels = [(row["trait_gain"], row["coherence_kept"], f"{row['trial']}.{row['round']}", style.ORANGE)
              for _, row in front.iterrows()]
    labels += [(row["trait_gain"], row["coherence_kept"], _baseline_label(row), style.BLACK)
               for _, row in d.baselines.iterrows()]
    low = min(p["coherence_kept"].min(), d.baselines["coherence_kept"].min() if len(d.baselines) else 1)
    axes.set_ylim(max(low - 0.04, -0.02), 1.02)
    axes.text(axes.get_xlim()[0], COHERENCE_FLOOR, " deliverable above", color="#777777", fontsize=9, va="bottom")
    place_labels(axes, labels)
    axes.set_xlabel(f"trait gain: {d.trait.removesuffix('_nats')} readout, nats from base   (better →)")
    axes.set_ylabel("coherence kept, share of base   (better ↑)")
    axes.set_title(f"{d.name}: {len(p)} rounds of {p['trial'].nunique()} trials, {len(front)} on the front")
    axes.text(0.99, 0.02, f"hypervolume {d.hypervolume:.4f}\n95% intervals over items only", transform=axes.transAxes,
              ha="right", va="bottom", fontsize=9, color="#555555")
    return figure


def _draw_baselines(axes: plt.Axes, baselines: pd.DataFrame) -> None:
    for label, marker in (("base", "s"), ("prompted", "D"), ("steered", "^")):
        rows = baselines[baselines["label"] == label] if len(baselines) else baselines
        if len(rows):
            axes.plot(rows["trait_gain"], rows["coherence_kept"], marker=marker, markersize=7, markerfacecolor="white",
                      markeredgecolor=style.BLACK, color=style.BLACK, linewidth=0.8, linestyle=":", zorder=5)


def _baseline_label(row: pd.Series) -> str:
    return f"raw steering {row['edge_doses']:g}×edge" if row["label"] == "steered" else str(row["label"])


def place_labels(axes: plt.Axes, labels: list[tuple[float, float, str, str]]) -> None:
    """Write labels beside their points, each at the first of eight places that covers no earlier label or point."""
    figure = axes.figure
    figure.canvas.draw()
    points = [axes.transData.transform((x, y)) for x, y, _, _ in labels]
    taken: list = []
    for (x, y, text, colour) in labels:
        for dx, dy, ha, va in ((8, 6, "left", "bottom"), (8, -6, "left", "top"), (-8, 6, "right", "bottom"),
                               (-8, -6, "right", "top"), (0, 12, "center", "bottom"), (0, -12, "center", "top"),
                               (14, 18, "left", "bottom"), (14, -18, "left", "top")):
            note = axes.annotate(text, (x, y), (dx, dy), textcoords="offset points", ha=ha, va=va, fontsize=9, color=colour,
                                 zorder=6)
            box = note.get_window_extent().expanded(1.02, 1.05)
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and axes.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken) and not any(box.contains(*p) for p in points):
                taken.append(box)
                break
            note.remove()
        # where nowhere is free, none is better than one over another: the CSV has every point


def draw_folder(folder: Path) -> None:
    """Write pareto.png, pareto.svg and pareto.csv into a search's folder."""
    d = data(folder)
    columns = [c for c in d.points if not d.points[c].map(lambda v: isinstance(v, str) and len(v) > 200).any()]
    d.points[columns].to_csv(folder / "pareto.csv", index=False)
    style.save(draw(d), folder / "pareto")


def main() -> None:
    def action() -> int:
        if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
            print(__doc__.split("\n\n")[0])
            return 0 if sys.argv[1:] in (["--help"], ["-h"]) else 2
        folder = Path(sys.argv[1])
        draw_folder(folder)
        print(f"{folder / 'pareto.png'}, .svg and .csv")
        return 0

    run_main(action)


if __name__ == "__main__":
    main()
