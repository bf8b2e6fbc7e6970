"""One look for every picture: a palette safe for colour blindness (Okabe & Ito 2008), direct labels, no chart junk.

Pictures are WIDTH inches wide, so that their smallest text is still readable at 600 pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator

from steerheal.ledger import write_csv
from steerheal.stages import atomic_write

BLUE, ORANGE, GREEN, GREY, BLACK = "#0072B2", "#D55E00", "#009E73", "#9A9A9A", "#1A1A1A"
PALETTE = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9")  # categories, and searches beside each other
DARK = "#555555"  # text that should stay in the background
WIDTH = 7.0
SMALL = 9.0  # points
HALO = [withStroke(linewidth=2.5, foreground="white")]  # of words written over lines

plt.rcParams.update({
    "figure.dpi": 160, "font.size": 10.5, "axes.titlesize": 11.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": DARK,
    "axes.grid": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.8, "axes.axisbelow": True, "svg.hashsalt": "steerheal",
    "axes.formatter.useoffset": False, "text.parse_math": False,  # names and generated text may hold dollars
})


def save(figure: plt.Figure, drawn: pd.DataFrame, path: Path) -> Path:
    """Write PATH.png, PATH.svg, and PATH.csv with what they show, each appearing whole; PATH."""
    write_csv(path.with_name(f"{path.name}.csv"), drawn)
    if figure.get_layout_engine():
        settle(figure)
    # one layout and one box for both kinds: with "tight" each would draw the figure once more to find its own
    box = figure.get_tightbbox().padded(plt.rcParams["savefig.pad_inches"])
    for kind, metadata in (("png", None), ("svg", {"Date": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, bbox_inches=box, facecolor="white", metadata=metadata)
        atomic_write(path.with_name(f"{path.name}.{kind}"), buffer.getvalue())
    plt.close(figure)
    return path


def log_scale(axes: plt.Axes, which: str) -> None:
    """Make the axis "x" or "y" logarithmic, with plain numbers: 0.01, not a power of ten."""
    axes.set(**{f"{which}scale": "log"})
    plain_numbers(getattr(axes, f"{which}axis"), (1, 3) if which == "x" else (1, 2, 5))


def plain_numbers(axis: matplotlib.axis.Axis, per_decade: Sequence[int] = (1, 2, 5)) -> None:
    axis.set_major_locator(LogLocator(subs=per_decade))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def say(axes: plt.Axes, text: str) -> None:
    """Words in place of a picture that cannot be drawn."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=DARK, wrap=True)


def note(axes: plt.Axes, text: str, side: str = "right", y: float = 0.02) -> None:
    """Small words at the right or left end of the axes; `y` is a share of their height."""
    axes.text(0.99 if side == "right" else 0.01, y, text, transform=axes.transAxes, ha=side, va="bottom",
              fontsize=SMALL, color=DARK, zorder=6, path_effects=HALO)


def key(axes: plt.Axes, colours: dict[str, str]) -> int:
    """The names of colours, written in them above the right end of the axes; in how many lines."""
    left, lines = 0.0, 1
    for label, colour in reversed(colours.items()):
        text = axes.annotate(label, (1, 1), (left, 14 * lines - 11), xycoords="axes fraction", textcoords="offset points",
                             ha="right", fontsize=SMALL, color=colour, fontweight="bold")
        wide = text.get_window_extent().width / axes.figure.dpi * 72
        if left and wide - left > 0.85 * 72 * WIDTH:
            left, lines = 0.0, lines + 1
            text.set_position((left, 14 * lines - 11))
        left -= wide + 10
    return lines


def is_wide(values: Sequence[float]) -> bool:
    """Positive numbers that span far: read best on a logarithmic axis."""
    finite = np.asarray(values, float)
    finite = finite[np.isfinite(finite)]
    return len(finite) > 0 and bool(finite.min() > 0) and bool(finite.max() > 5 * finite.min())


def scatter(axes: plt.Axes, x: Sequence[float], y: Sequence[float], **look: object) -> int:
    """Points inside the axes' limits, and small triangles at the edge for those outside; how many those were."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    (x0, x1), (y0, y1) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
    sides = {"<": x < x0, ">": x > x1, "v": (y < y0) & (x >= x0) & (x <= x1), "^": (y > y1) & (x >= x0) & (x <= x1)}
    outside = np.any(list(sides.values()), axis=0)
    axes.scatter(x[~outside], y[~outside], **look)
    for marker, off in sides.items():
        axes.scatter(x[off].clip(x0, x1), y[off].clip(y0, y1), s=30, marker=marker, clip_on=False, color=look["color"])
    return int(outside.sum())


def settle(figure: plt.Figure) -> None:
    """Lay the figure out once and for all, so that places on the page are known."""
    figure.draw_without_rendering()
    figure.set_layout_engine(None)


def place_labels(axes: plt.Axes, labels: Sequence[tuple[float, float, str, str]],
                 points: Sequence[tuple[float, float]] = ()) -> None:
    """Write labels (x, y, text, colour) beside their points, each where it covers no earlier label and no point. The
    figure must be settled.

    Places near the point come first; farther ones get a thin line to it. Where nowhere is free the label is left out: the
    CSV has every point.
    """
    frame = axes.get_window_extent()
    taken: list = [text.get_window_extent() for text in axes.texts]
    spots = axes.transData.transform([(x, y) for x, y, *_ in labels] + list(points))
    for x, y, text, colour in labels:
        for radius, angle in ((r, a) for r in (8, 18, 32, 48) for a in (45, -45, 135, -135, 90, -90, 0, 180)):
            dx, dy = radius * np.cos(np.radians(angle)), radius * np.sin(np.radians(angle))
            ha = "center" if abs(dx) < 1 else "left" if dx > 0 else "right"
            va = "center" if abs(dy) < 1 else "bottom" if dy > 0 else "top"
            written = axes.annotate(text, (x, y), (dx, dy), textcoords="offset points", ha=ha, va=va, fontsize=SMALL,
                                    color=colour, zorder=6, path_effects=HALO)
            box = written.get_window_extent().padded(9, 3)  # pixels, so that two labels do not read as one
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken) and not any(box.contains(*s) for s in spots):
                taken.append(box)
                if radius > 12:
                    axes.annotate("", (x, y), (dx, dy), textcoords="offset points", zorder=3,
                                  arrowprops=dict(arrowstyle="-", color=colour, linewidth=0.6, shrinkA=0, shrinkB=4))
                break
            written.remove()
