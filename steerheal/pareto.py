"""Dominance, front and hypervolume for two objectives that are both maximised.

Optuna computes fronts and hypervolumes of whole studies; here the points are all deliverable *rounds* of all trials,
several per trial, so the few lines that two objectives need stand on their own (checked against optuna in the tests).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Point = tuple[float, float]


def dominates(a: Point, b: Point) -> bool:
    """a is at least as good in both and better in one."""
    return a[0] >= b[0] and a[1] >= b[1] and a != b


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the non-dominated points, by descending first objective. Equal points are all kept."""
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1]))
    kept: list[int] = []
    for i in order:
        if not kept or points[i][1] > points[kept[-1]][1] or points[i] == points[kept[-1]]:
            kept.append(i)
    return kept


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Area dominated by the points above the reference point."""
    above = [p for p in points if p[0] > reference[0] and p[1] > reference[1]]
    area, floor = 0.0, reference[1]
    for x, y in (above[i] for i in front(above)):
        area += (x - reference[0]) * (y - floor)
        floor = y
    return area


def growth(groups: Iterable[Sequence[Point]], reference: Point) -> list[float]:
    """Hypervolume after each group of points has joined those before it. Only the front is carried along."""
    kept: set[Point] = set()
    out = []
    for group in groups:
        points = [*kept.union(p for p in group if p[0] > reference[0] and p[1] > reference[1])]
        kept = {points[i] for i in front(points)}
        out.append(hypervolume([*kept], reference))
    return out
