"""python -m benchmarks.faults [--small]: kill a search again and again, then ask whether anyone could tell.

Three searches on a tiny model, each with a stage store of its own. One is left alone. One has its driver killed (SIGKILL) at
20 random moments (3 with --small), each time followed by the same command. One runs on a file system that another
program fills in the middle, is given room, and goes on. Compared with the first: front, trials lost or doubled, stages
computed twice, trials left RUNNING in the study, processes left behind.

Moments are drawn in stages done, so that they spread over the whole search on a machine of any speed, with a random
delay behind; every fourth lies within the start, before anything runs.
"""

from __future__ import annotations

import collections
import contextlib
import random
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.command import command
from benchmarks.driving import computed, events, members, run, start, tiny_model, wait_for
from steerheal import ledger

NAME = "quickstart"
COLUMNS = ["trial", "round", "trait_gain", "coherence_kept", "adapter"]


def front(folder: Path) -> list[tuple[Any, ...]]:
    table = pd.read_parquet(folder / "ledger.parquet")
    return list(table[table["front"]][COLUMNS].itertuples(index=False, name=None))


def kill(process: subprocess.Popen[str], folder: Path, stages: int | None, delay: float) -> str:
    """SIGKILL the driver `delay` seconds after its search has so many stages done, or after its start. The moment."""
    if stages is not None:
        wait_for(folder, process, lambda e: e["kind"] == "computed", stages)
    time.sleep(delay)
    process.kill()
    process.wait()
    last = events(folder)[-1:] if stages is not None else []
    return f"after {stages} stages, {last[0]['where']}" if last else f"{delay:.1f} s after its start"


def measure(small: bool = False) -> int:
    kills, trials = (3, 2) if small else (20, 6)
    moments = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="faults-") as tmp:
        root = Path(tmp)
        model, settings = tiny_model(root)
        began = time.monotonic()
        text, code = run(model, root / "alone", settings, trials=trials)
        assert code == 0, text
        alone, killed = root / "alone" / NAME, root / "killed" / NAME
        stages = len(computed(alone))
        print(f"undisturbed: {trials} trials, {stages} stages, {time.monotonic() - began:.0f} s", flush=True)

        early = set(range(1, kills, 4))
        due = iter(sorted(moments.sample(range(1, stages), kills - len(early))))
        sessions = []
        for i in range(kills):
            process = start(model, root / "killed", settings, trials=trials)
            sessions.append(process.pid)
            moment = (None, moments.uniform(0, 4)) if i in early else (next(due), moments.uniform(0, 0.1))
            print(f"kill {i + 1}: {kill(process, killed, *moment)}", flush=True)
        text, code = run(model, root / "killed", settings, trials=trials)
        assert code == 0, text
        result = compare(alone, killed)
        print(f"killed {kills} times: {result}", flush=True)
        result["orphans"] = sum(len(members(session)) for session in sessions)
        print(f"disk full: {disk_full(root, model, settings, trials, alone)}", flush=True)
    print("RESULT", *(f"{k}={str(v).lower()}" for k, v in dict(kills=kills, **result).items()))
    return 0


def compare(alone: Path, other: Path) -> dict[str, Any]:
    """Counts that are 0, and true, where nobody could tell that `other` was disturbed."""
    rows = [pd.read_parquet(folder / "ledger.parquet") for folder in (alone, other)]
    done = [{tuple(key) for key in table[["trial", "round"]].itertuples(index=False)} for table in rows]
    study = ledger.open_study(other)
    finished = [t.user_attrs["index"] for t in study.trials if t.state.name == "COMPLETE"]
    started = collections.Counter(e["digest"] for e in events(other) if e["kind"] == "start" and "digest" in e)
    return dict(
        same_front=front(alone) == front(other), lost=len(done[0] - done[1]),
        doubled=len(rows[1]) - len(done[1]) + len(finished) - len(set(finished)),
        computed_twice=sum(n > 1 for n in computed(other).values()),
        cut_off=sum(n - 1 for n in started.values()),  # the running stage, begun again after a kill
        zombies=sum(t.state.name == "RUNNING" for t in study.trials))


def disk_full(root: Path, model: Path, settings: dict[str, Any], trials: int, alone: Path) -> str:
    """Fill a file system in the middle of a search, give it room, go on. In words."""
    disk = root / "disk"
    disk.mkdir()
    # room enough for the check before the start; another program's file takes it in the middle
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(disk)], capture_output=True, text=True)
    if mounted.returncode:
        return f"skipped, no file system can be mounted here ({mounted.stderr.strip()})"
    try:
        process = start(model, disk, settings, trials=trials)
        wait_for(disk / NAME, process, lambda e: e["kind"] == "computed", len(computed(alone)) // 2)
        with (disk / "other").open("wb", buffering=0) as other, contextlib.suppress(OSError):
            while True:
                other.write(bytes(2**16))
        text, code = process.communicate(timeout=1800)[0], process.returncode
        assert code == 2 and "disk is full" in text and "Traceback" not in text, text
        before = len(computed(disk / NAME))
        (disk / "other").unlink()
        text, code = run(model, disk, settings, trials=trials)
        assert code == 0, text
        counts = compare(alone, disk / NAME)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # this process holds the study open
    assert counts["same_front"] and not any(counts[k] for k in ("lost", "doubled", "computed_twice", "zombies")), counts
    return f"after {before} stages exit code 2 and a sentence; with more room the same command ended with the same front"


if __name__ == "__main__":
    command(measure)
