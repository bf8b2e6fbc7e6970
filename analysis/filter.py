"""python -m analysis.filter results/SEARCH: what the filter keeps, by dose.

Above, the share of completions that survive against the dose, with Wilson's 95% interval; in the middle their perplexity
under base and the gate; below, the completions nearest the gate on either side. Completions that trials share count once.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.font_manager import FontProperties, findfont, get_font

from analysis import style
from analysis.folders import command, count, read
from steerheal import ledger

MOST_DOSES = 10  # more distinct doses than this are put into as many bins
BORDERLINE = 2  # samples shown on either side of the gate


@dataclass
class Data:
    """What the picture shows.

    samples: one row per distinct completion (columns: steerheal.records.samples), with `borderline`. survival: dose (mean of
    the bin, in edge doses), n, kept (share), low, high. gate: of perplexity; NaN without samples. log_ratio: of each round,
    how much likelier the steered student finds the kept completions than base does, in nats per token.
    """

    name: str
    samples: pd.DataFrame
    survival: pd.DataFrame
    gate: float
    log_ratio: pd.Series


def data(folder: Path) -> Data:
    """Read a search's completions from the stage store.

    Raises:
        UserError: the folder holds no finished round.
    """
    from steerheal import records  # brings torch

    samples, name = records.samples(folder), folder.absolute().name
    if samples.empty:
        read(folder)  # says so where nothing is finished
        return Data(name, samples, _survival(pd.DataFrame(columns=["edge_dose", "kept"])), float("nan"), pd.Series())
    samples = samples.drop_duplicates([c for c in samples if c != "trial"], ignore_index=True).assign(borderline=False)
    for side in (True, False):
        # nearest the gate in proportion; the same text at two doses is shown once
        near = samples[(samples["perplexity"] <= samples["gate"]) == side].drop_duplicates("text")
        distance = (near["perplexity"] / near["gate"]).where(near["perplexity"] > 0).map(np.log).abs()
        samples.loc[distance.nsmallest(BORDERLINE).index, "borderline"] = True
    ratios = ledger.read(folder).get("log_ratio", pd.Series(dtype=float))
    return Data(name, samples, _survival(samples), float(samples["gate"].median()), pd.to_numeric(ratios).dropna())


def _survival(samples: pd.DataFrame) -> pd.DataFrame:
    doses = samples["edge_dose"].round(6)
    bins = doses if doses.nunique() <= MOST_DOSES else pd.cut(doses, MOST_DOSES)
    rows = [dict(dose=group["edge_dose"].mean(), n=len(group), kept=group["kept"].mean(),
                 **dict(zip(("low", "high"), wilson(int(group["kept"].sum()), len(group)))))
            for _, group in samples.groupby(bins, observed=True)]
    return pd.DataFrame(rows, columns=["dose", "n", "kept", "low", "high"])


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval of a share (1927): inside [0, 1] and sensible at 0 and 1."""
    p = successes / n
    middle, spread = (p + z * z / (2 * n)), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    low, high = (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)
    return min(low, p), max(high, p)  # at 0 and 1 rounding may leave the share outside


def draw(d: Data) -> plt.Figure:
    """Survival, perplexity and borderline samples, one above the other."""
    if d.survival.empty:
        figure, axes = plt.subplots(figsize=(style.WIDTH, 2))
        style.say(axes, f"{d.name}: no completion is on record")
        return figure
    border = d.samples[d.samples["borderline"]].sort_values("perplexity")
    figure = plt.figure(figsize=(style.WIDTH, 5.6 + 0.62 * len(border)), layout="constrained")
    above, middle, below = figure.subplots(3, 1, height_ratios=(2.2, 2.8, 0.2 + 0.62 * len(border)))
    s = d.survival
    reasons = d.samples.loc[~d.samples["kept"], "reasons"].str.split().explode().value_counts()
    above.set_title(f"{d.name}: {count(len(d.samples), 'completion')}, {d.samples['kept'].sum()} kept",
                    pad=32 if len(d.log_ratio) else 18)
    words = "dropped for: " + (", ".join(f"{reason} {n}" for reason, n in reasons.items()) or "nothing")
    if len(d.log_ratio):
        words += (f"\nkept ones are {d.log_ratio.min():+.2f} to {d.log_ratio.max():+.2f} nats per token likelier when steered "
                  f"than under base")
    above.annotate(words, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=style.SMALL,
                   color=style.DARK)
    above.errorbar(s["dose"], s["kept"], yerr=[s["kept"] - s["low"], s["high"] - s["kept"]], color=style.BLUE, fmt="o-",
                   markersize=5, linewidth=1.3, elinewidth=0.9)
    for _, row in s.iterrows():
        above.annotate(f"{row['n']:.0f}", (row["dose"], 0), (0, 3), textcoords="offset points", ha="center",
                       fontsize=style.SMALL, color=style.DARK)
    style.note(above, "completions:", "left", 0.08)
    above.set_ylim(0, 1.05)
    above.set_ylabel("survival (better ↑)\nshare kept")
    above.tick_params(labelbottom=False)
    _draw_perplexity(middle, d)
    middle.sharex(above)
    above.margins(x=0.12)
    _write_samples(below, border)
    return figure


def _draw_perplexity(axes: plt.Axes, d: Data) -> None:
    s = d.samples.replace([np.inf, -np.inf], np.nan).dropna(subset=["perplexity"])
    width = 0.012 * max(s["edge_dose"].max() - s["edge_dose"].min(), 0.1)
    jitter = np.random.default_rng(0).normal(0, width, len(s))  # so that points at one dose can be told apart
    for kept, colour, marker in ((False, style.ORANGE, "x"), (True, style.BLUE, "o")):
        rows = (s["kept"] == kept).to_numpy()
        axes.scatter((s["edge_dose"] + jitter)[rows], s.loc[rows, "perplexity"], s=14, color=colour, marker=marker, alpha=0.6,
                     linewidth=0.9)
    style.log_scale(axes, "y")
    axes.axhline(d.gate, color=style.BLACK, linewidth=1, linestyle="--")
    axes.annotate(f"gate {d.gate:.3g}", (0.01, d.gate), (0, 2), xycoords=("axes fraction", "data"),
                  textcoords="offset points", fontsize=style.SMALL, path_effects=style.HALO)
    axes.set_ylabel("perplexity under base\nlast quarter (better ↓)")
    axes.set_xlabel("dose, in edge doses")
    style.key(axes, {"kept": style.BLUE, "dropped": style.ORANGE})


def _write_samples(axes: plt.Axes, border: pd.DataFrame) -> None:
    axes.set_axis_off()
    axes.set_title("nearest the perplexity gate (model output, shortened)", fontsize=style.SMALL)
    for i, (_, row) in enumerate(border.iterrows()):
        head = f"{row['perplexity']:.3g} at {row['edge_dose']:.2f} edge doses, " + (
            "kept" if row["kept"] else f"dropped: {row['reasons']}")
        body = "\n".join(textwrap.wrap(shown(row["text"]), 90, max_lines=2, placeholder=" …"))
        axes.text(0, 1 - i / len(border), f"{head}\n{body}", transform=axes.transAxes, va="top", fontsize=style.SMALL,
                  color=style.BLUE if row["kept"] else style.ORANGE)


def shown(text: str) -> str:
    """A text with what the figures' font cannot show replaced by a box."""
    known = get_font(findfont(FontProperties())).get_charmap()
    return "".join(c if ord(c) in known else " " if c.isspace() else "□" for c in text)


def draw_folder(folder: Path) -> Path:
    """Write filter.png, .svg and .csv into a search's folder.

    Args:
        folder: a search's folder, such as results/quickstart
    """
    d = data(folder)
    return style.save(draw(d), d.samples, folder / "filter")


if __name__ == "__main__":
    command(draw_folder, "filter", __doc__)
