"""python -m benchmarks.ladder [--small] [--out DIR]: both readouts against the dose of raw steering.

SmolLM2-135M: authority nats, conduct nats, control and coherence at doses 0 .. 8; qwen2.5-coder-1.5b-instruct: authority
nats and coherence at 0, 2, 4, 8. Writes ladder.csv, ladder.png and items.csv (every item's numbers) into DIR, by default
benchmarks/results. `python -m benchmarks.ladder --draw` draws again from items.csv.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.command import command
from steerheal import models, personas, steering
from steerheal.evaluation import conduct, foundations
from steerheal.evaluation.readings import Reading, _interval, _weights
from steerheal.personas import FOUNDATIONS
from steerheal.settings import from_flat
from steerheal.stages import Result

MODELS = {"smollm2-135m-instruct": (14, (0, 1, 2, 3, 4, 5, 6, 8)), "qwen2.5-coder-1.5b-instruct": (7, (0, 2, 4, 8))}
UNASKED = Result({}, dict(conduct=torch.zeros(1), control=torch.zeros(1)))  # where only the foundations are read


def ladder(small: bool = False, out: Path = Path(__file__).parent / "results", draw: bool = False) -> int:
    out.mkdir(parents=True, exist_ok=True)
    if not draw:
        measure(out, small)
    picture(pd.read_csv(out / "items.csv"), out / "ladder")
    print(f"{out / 'ladder.png'}")
    return 0


def measure(out: Path, small: bool) -> None:
    items = []
    trait = personas.load("authority")
    for name, (shots, doses) in list(MODELS.items())[: 1 if small else 2]:
        lm = models.load(from_flat({"model": name}))
        vignettes = personas.vignettes("builtin", 14 if small else 70)
        acts = trait.conduct[: 4 if small else 24] if name.startswith("smollm2") else ()
        vector = steering.extract(lm, *trait.systems, personas.contexts(64), lm.band(0.45, 0.55))
        for dose in doses:
            found = foundations.evaluate(lm, vignettes, n_shots=shots, think_tokens=0, vector=vector, dose=dose)
            acted = conduct.evaluate(lm, acts, personas.controls(len(acts)), vector=vector, dose=dose) if acts else UNASKED
            reading = Reading.of(found, acted)
            row = dict(model=name, dose=dose)
            metrics = ["authority_nats", "care_nats", "coherence", "top1"] + ["conduct_nats", "control_nats"] * bool(acts)
            for metric in metrics:
                e = reading.estimate(metric)
                row |= {metric: e.value, f"{metric}_low": e.low, f"{metric}_high": e.high}
            values = {f"p[{f}]": reading.p[:, k] for k, f in enumerate(FOUNDATIONS)} | {"coherence": reading.mass}
            values |= {"conduct": reading.conduct, "control": reading.control} if acts else {}
            items += [dict(model=name, dose=dose, readout=r, item=i, value=round(float(v), 6))
                      for r, column in values.items() for i, v in enumerate(column)]
            print("  ".join(f"{k} {v:+.3f}" if isinstance(v, float) else f"{v}" for k, v in row.items()
                            if not k.endswith(("low", "high"))), flush=True)
        del lm
    pd.DataFrame(items).to_csv(out / "items.csv", index=False)


def shift(items: pd.DataFrame, readout: str) -> pd.DataFrame:
    """Movement of a readout from dose 0, with its interval paired over items: dose, value, low, high."""
    table = items[items["readout"] == readout].pivot(index="dose", columns="item", values="value")
    n = table.shape[1]
    means = table.to_numpy() @ _weights(n).T
    means = np.log(means) if readout.startswith("p[") else means
    return pd.DataFrame([dict(dose=dose, **_interval(row - means[0], n)._asdict()) for dose, row in zip(table.index, means)])


def picture(items: pd.DataFrame, path: Path) -> None:
    import matplotlib.pyplot as plt

    from analysis import style

    drawn = []
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex="col", sharey="row", height_ratios=(2, 1))
    for column, (name, rows) in enumerate(items.groupby("model", sort=False)):
        top, bottom = axes[0][column], axes[1][column]
        top.set_title(name)
        for readout, colour, label, at in (("p[authority]", style.BLUE, "authority nats (wanted ↓)", 0.0),
                                           ("conduct", style.ORANGE, "conduct nats (wanted ↑)", 0.15),
                                           ("control", style.GREY, "control pairs", -0.45)):
            if readout not in set(rows["readout"]):
                continue
            moved = shift(rows, readout)
            drawn.append(moved.assign(model=name, readout=readout))
            top.fill_between(moved["dose"], moved["low"], moved["high"], color=colour, alpha=0.2, linewidth=0)
            top.plot(moved["dose"], moved["value"], color=colour, marker="o", markersize=4)
            y = moved["high"].iloc[-1] + at if at else moved["value"].iloc[-1]
            top.annotate(label, (moved["dose"].iloc[-1], y), (-10, 0), textcoords="offset points", ha="right", color=colour,
                         fontsize=9)
        coherence = rows[rows["readout"] == "coherence"].groupby("dose")["value"].mean()
        bottom.plot(coherence.index, coherence, color=style.BLACK, marker="o", markersize=4)
        bottom.axhline(0.85 * coherence.iloc[0], color=style.GREY, linestyle="--", linewidth=1)
        bottom.annotate("0.85 of dose 0", (0, 0.85 * coherence.iloc[0]), (2, -12), textcoords="offset points", fontsize=9,
                        color="#777777")
        bottom.set_xlabel("raw dose of the authority vector")
    axes[0][0].set_ylabel("shift from dose 0, nats")
    axes[0][0].set_ylim(top=1.4)  # room for a label
    axes[1][0].set_ylabel("coherence (better ↑)")
    axes[1][0].set_ylim(0, 1)
    figure.align_ylabels()
    style.save(figure, pd.concat(drawn), path)


if __name__ == "__main__":
    command(ladder)
