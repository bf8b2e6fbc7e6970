"""What a search's workers and drivers wrote down: one line per stage (`events/*.jsonl`), one per run (`sessions.jsonl`).

A stage's event says when, which trial, where in the loop, which digest, and whether it was computed (with seconds) or
replayed from the store. From these come what sharing saved (`waste`) and estimates of what a search will cost.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerheal.errors import UserError
from steerheal.stages import Event, disk_error, make_folder


def own(folder: Path) -> Path:
    """The file that this process writes its events into."""
    return folder / "events" / f"{platform.node()}-{os.getpid()}.jsonl"


def append(path: Path, trial: int, where: str, kind: str, event: Event | None = None) -> None:
    """Write down what happened to a stage, or to a trial as a whole.

    Args:
        where: in the loop, in words; of an error, its message.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    line = dict(time=round(time.time(), 2), trial=trial, where=where, kind=kind)
    if event:
        line |= dict(stage=event.stage, digest=event.digest, seconds=round(event.seconds, 3))
        if event.note:
            line["note"] = event.note
    _append(path, line)


def _append(path: Path, line: dict[str, Any]) -> None:
    make_folder(path.parent)
    try:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise disk_error(path, error) from error


def read(folder: Path) -> list[dict[str, Any]]:
    """All events of a search, oldest first. A line torn by a crash is left out."""
    found = [event for path in (folder / "events").glob("*.jsonl") for event in _lines(path)]
    return sorted(found, key=lambda e: e["time"])


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


@contextlib.contextmanager
def session(folder: Path, concurrent: int) -> Iterator[None]:
    """Write down when a driver started and ended; one that is killed leaves a start without an end."""
    def note(kind: str) -> None:
        _append(folder / "sessions.jsonl", dict(kind=kind, time=round(time.time(), 2), concurrent=concurrent))

    note("start")
    try:
        yield
    finally:
        with contextlib.suppress(UserError):  # how the driver ended is said already
            note("end")


@dataclass
class Session:
    start: float  # seconds since the epoch
    end: float
    concurrent: int


def sessions(folder: Path, events: list[dict[str, Any]]) -> list[Session]:
    """When drivers ran. A start without an end (killed, or running still) lasts to the last event before the next."""
    path = folder / "sessions.jsonl"
    notes = list(_lines(path)) if path.exists() else []
    out = []
    for note, following in zip(notes, [*notes[1:], {}]):
        if note["kind"] == "start":
            end = following.get("time", float("inf"))
            if following.get("kind") != "end":
                end = max((e["time"] for e in events if note["time"] <= e["time"] < end), default=note["time"])
            out.append(Session(note["time"], end, note["concurrent"]))
    return out


def busy(spans: Iterable[tuple[float, float]], moments: Iterable[float]) -> list[float]:
    """Seconds before each moment in which at least one of the spans (start, end) ran; moments in rising order."""
    apart: list[tuple[float, float]] = []  # the spans, those that touch made one
    for start, end in sorted(spans):
        if apart and start <= apart[-1][1]:
            start, end = apart[-1][0], max(end, apart.pop()[1])
        apart.append((start, end))
    out, over = [], 0.0
    rest = deque(apart)
    for moment in moments:
        while rest and rest[0][1] <= moment:
            start, end = rest.popleft()
            over += end - start
        out.append(over + (max(moment - rest[0][0], 0.0) if rest else 0.0))
    return out


def running(events: list[dict[str, Any]], since: float = 0.0) -> dict[int, dict[str, Any]]:
    """The last stage that each trial started and has not finished, by trial.

    Args:
        since: seconds since the epoch; what started earlier died with its driver.
    """
    open_: dict[int, dict[str, Any]] = {}
    for e in events:
        if e["time"] < since:
            continue
        if e["kind"] == "start":
            open_[e["trial"]] = e
        elif open_.get(e["trial"], {}).get("digest") in (None, e.get("digest")) or e["kind"] == "error":
            open_.pop(e["trial"], None)
    return open_
