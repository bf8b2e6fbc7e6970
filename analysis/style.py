"""One look for every picture: a palette safe for colour blindness (Okabe & Ito 2008), direct labels, no chart junk."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BLUE, ORANGE, GREEN, GREY, BLACK = "#0072B2", "#D55E00", "#009E73", "#9A9A9A", "#1A1A1A"

plt.rcParams.update({
    "figure.dpi": 100, "savefig.dpi": 160, "font.size": 11, "axes.titlesize": 12, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#555555",
    "axes.grid": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.8, "axes.axisbelow": True, "svg.hashsalt": "steerheal",
})


def save(figure: plt.Figure, path: Path) -> None:
    """Write PATH.png and PATH.svg, each appearing whole."""
    for kind in ("png", "svg"):
        temporary = path.with_name(f".{path.name}.{kind}.tmp")
        figure.savefig(temporary, format=kind, bbox_inches="tight", facecolor="white")
        temporary.replace(path.with_name(f"{path.name}.{kind}"))
    plt.close(figure)
