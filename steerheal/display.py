"""What a running search shows: a line for every finished round, above one calm live panel on a terminal, among lines for
each step elsewhere.

It reads the event files that the workers write, and is told when the study changed; it never asks a worker.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from steerheal import ledger


class Display:
    """Context manager around a search. `update` takes the ledger whenever the study changed."""

    def __init__(self, folder: Path, name: str, todo: int, done: int, rounds: int, params: list[str]):
        self.folder, self.name, self.rounds, self.params = folder, name, rounds, params
        self.done_before, self.total = done, done + todo
        self.console = make_console()
        self.started = time.monotonic()
        self.shown: set[tuple[int, int]] = set()  # (trial, round) already told
        self.ended: dict[int, float] = {}  # trial -> when that was seen; a trial that runs again starts stages after it
        self.finished = 0
        self.counts = {"computed": 0, "replayed": 0, "set aside": 0}
        self.where: dict[int, tuple[str, float]] = {}  # trial -> (words, since when)
        self.table: pd.DataFrame | None = None
        self._offsets = {path: path.stat().st_size for path in self._files()}  # earlier runs are not ours to count
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._live: Live | None = None

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._live = Live(self._render(), console=self.console, refresh_per_second=2, transient=True)
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stop.set()
        self._thread.join()
        self._poll()
        if self._live:
            self._live.stop()

    def update(self, table: pd.DataFrame) -> None:
        """The study changed: a round or a trial ended. The first call tells what earlier runs left."""
        rows = table.dropna(subset=["round"])
        keys = list(zip(rows["trial"], rows["round"]))
        if self.table is not None:
            for key, (_, row) in zip(keys, rows.iterrows()):
                if key not in self.shown:
                    self._say(f"trial {row['trial']} {describe(row)}")
        self.shown |= set(keys)
        self.table = table
        self.ended = {t: self.ended.get(t, time.time()) for t in table[table["end"].ne("")]["trial"]}
        self.finished = table[table["state"] == "complete"]["trial"].nunique() - self.done_before

    def summary(self) -> str:
        """Stages computed, replayed and set aside in this run."""
        aside = f", {self.counts['set aside']} damaged and computed again" if self.counts["set aside"] else ""
        return f"stages: {self.counts['computed']} computed, {self.counts['replayed']} replayed from the store{aside}"

    # ------------------------------------------------------------ events

    def _files(self) -> list[Path]:
        return sorted((self.folder / "events").glob("*.jsonl"))

    def _run(self) -> None:
        while not self._stop.wait(0.5):
            self._poll()
            if self._live:
                self._live.update(self._render())

    def _poll(self) -> None:
        for path in self._files():
            with path.open("rb") as file:
                file.seek(self._offsets.get(path, 0))
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]  # a line still being written waits for the next poll
            self._offsets[path] = self._offsets.get(path, 0) + len(whole)
            for line in whole.splitlines():
                self._take(json.loads(line))

    def _take(self, event: dict[str, Any]) -> None:
        kind, trial = event["kind"], event["trial"]
        if kind in self.counts:
            self.counts[kind] += 1
        if kind == "error":
            self.where.pop(trial, None)
        if kind in ("error", "set aside"):
            self._say(f"trial {trial} {event['where']}: {event['note']}" if kind == "set aside"
                      else f"trial {trial} failed: {event['where']}")
        if kind == "start" and self.where.get(trial, ("", 0))[0] != event["where"]:
            self.where[trial] = (event["where"], event["time"])
            if self._live is None:
                self._say(f"trial {trial} {event['where']}")

    def _say(self, text: str) -> None:
        stamp = clock(time.monotonic() - self.started)
        self.console.print(Text(f"[{stamp}] {text}"), soft_wrap=True)

    # ------------------------------------------------------------ the panel

    def _render(self) -> Group:
        elapsed = time.monotonic() - self.started
        left = self.total - self.done_before - self.finished
        remaining = clock(elapsed / self.finished * left) if self.finished else "after the first trial"
        head = Text.assemble((f"{self.name}  ", "bold"), f"{self.done_before + self.finished} of {self.total} trials, "
                             f"{self.rounds} rounds each   elapsed {clock(elapsed)}   remaining: {remaining}")
        lines: list[Any] = [head]
        for trial, (where, since) in sorted((t, w) for t, w in self.where.items() if w[1] > self.ended.get(t, 0)):
            lines.append(Text(f"  trial {trial}  {where}  {clock(max(time.time() - since, 0))}", style="cyan"))
        lines.append(Text(f"  {self.summary()}", style="dim"))
        if self.table is not None and self.table["front"].any():
            lines.append(front_table(self.table, self.params, 5))
        return Group(*lines)


def make_console() -> Console:
    """Lines piped to a file are not broken at 80 columns."""
    console = Console(highlight=False, markup=False)  # "p[authority]" is no style
    return console if console.is_terminal else Console(highlight=False, markup=False, width=140)


def front_table(table: pd.DataFrame, params: list[str], most: int | None = None) -> Table:
    """The Pareto front as a table: index (for `steerheal.pick --index`), trial, round, parameters, trait gain with its 95%
    interval over items, shares of base coherence and fluency kept, verdict and flags."""
    rows = ledger.front(table)
    out = Table(title="Pareto front" + (f" (top {most} of {len(rows)})" if most and len(rows) > most else ""),
                title_justify="left", title_style="bold")
    for column in ("#", "trial", "round", *params, "trait gain, nats", "coherence", "fluency", "verdict"):
        out.add_column(column, justify="left" if column == "verdict" else "right", no_wrap=column == "trait gain, nats")
    for index, (_, row) in enumerate(rows.head(most or len(rows)).iterrows()):
        shown = [f"{row[p]:.3g}" if isinstance(row[p], float) else str(row[p]) for p in params]
        out.add_row(str(index), str(row["trial"]), str(row["round"]), *shown, interval(row), f"{row['coherence_kept']:.3f}",
                    f"{row['fluency_kept']:.2f}", row["verdict"] + (f" ({row['flags']})" if row["flags"] else ""))
    return out


def say_failures(console: Console, table: pd.DataFrame, left: list[int]) -> None:
    """Why each of these trials failed."""
    errors = table[table["error"].ne("") & table["trial"].isin(left)].drop_duplicates("trial")
    for _, row in errors.iterrows():
        console.print(f"trial {row['trial']} failed: {row['error']}", soft_wrap=True)


def starved(table: pd.DataFrame) -> list[str]:
    """A sentence for each trial that ended for want of completions, with what dropped them."""
    rows = table[table["end"].eq("starved")].drop_duplicates("trial")
    return [f"Trial {row['trial']} starved in {row['error']}." for _, row in rows.iterrows()]


def interval(row: pd.Series) -> str:
    return f"{row['trait_gain']:+.3f} [{row['trait_gain_low']:+.3f}, {row['trait_gain_high']:+.3f}]"


def describe(row: pd.Series) -> str:
    """A finished round in a line, and a second one where its barrier did nothing or everything."""
    notes = (f" ({row['flags']})" if row["flags"] else "") + (f"\n    {row['warning']}" if row["warning"] else "")
    return (f"round {row['round']} done: trait gain {interval(row)} nats, coherence kept {row['coherence_kept']:.3f}, "
            f"fluency kept {row['fluency_kept']:.2f}: {row['verdict']}{notes}")


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    s = int(seconds)
    return f"{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}"
