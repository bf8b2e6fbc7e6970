"""How far a search is, told from its folder alone: `python -m steerheal.search NAME --status`, from any terminal."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path

from steerheal import events, ledger, plan, waste
from steerheal.display import clock, front_table, make_console, say_failures, starved


def show(folder: Path) -> int:
    """Print the state of a search. 0 always: a search that is not running is no error.

    Raises:
        UserError: the folder holds no search.
    """
    search, table = plan.read(folder), ledger.read(folder)
    progress = ledger.read_progress(folder)
    console = make_console()
    done, total, live = len(progress), search["trials"], is_running(folder)
    state = "running" if live else "finished" if done >= total else "not running; the same command without --status goes on"
    console.print(f"{search['name']}: {done} of {total} trials of {search['settings']['rounds']} rounds, {state}",
                  soft_wrap=True)
    found = events.read(folder)
    if live:
        ended = set(table[table["end"].ne("")]["trial"])
        since = max((session.start for session in events.sessions(folder, found)), default=0.0)
        for trial, event in sorted(events.running(found, since).items()):
            if trial in ended:
                continue
            console.print(f"  trial {trial}  {event['where']}  {event.get('stage', '')}  "
                          f"{clock(max(time.time() - event['time'], 0))}", soft_wrap=True)
    if done:
        last = progress.iloc[-1]
        left = f", about {clock(3600 * last['hours'] / done * (total - done))} left at this pace" if done < total else ""
        console.print(f"hypervolume {last['hypervolume']:.4f} after {last['hours']:.2f} hours{left}", soft_wrap=True)
    for sentence in starved(table):
        console.print(sentence, soft_wrap=True)
    say_failures(console, table, list(table["trial"][table["state"].eq("fail")]))
    if table["front"].any():
        console.print(front_table(table, ledger.searched(table)))
    if found:
        console.print(waste.text(folder), soft_wrap=True)
    return 0


def is_running(folder: Path) -> bool:
    """Whether a driver holds the folder's lock. A dead one keeps none."""
    try:
        with (folder / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
