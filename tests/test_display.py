import io
import json

import pandas as pd
import pytest
from rich.console import Console

from steerheal.display import Display


def ledger(*rows):
    base = dict(state="running", end="", trait_gain=0.1, trait_gain_low=0.0, trait_gain_high=0.2, coherence_kept=1.0,
                fluency_kept=1.0, verdict="heal", warning="", flags="", front=False)
    table = pd.DataFrame([base | row for row in rows])
    table["round"] = table["round"].astype("Int64")
    return table


def make(tmp_path, done=0):
    display = Display(tmp_path, "x", todo=3 - done, done=done, rounds=2, params=[])
    display.console = Console(file=io.StringIO(), width=200)
    return display, lambda: display.console.file.getvalue()


@pytest.mark.parametrize("live", [False, True])
def test_only_rounds_of_this_run_are_told_and_each_once(tmp_path, live):
    display, text = make(tmp_path, done=1)
    display._live = object() if live else None  # above the panel, too
    old = dict(trial=0, round=0, state="complete")
    display.update(ledger(old))
    assert text() == "" and display.finished == 0
    display.update(ledger(old, dict(trial=2, round=0), dict(trial=1, round=0)))
    assert text().count("done") == 2 and "trial 1 round 0 done: trait gain +0.100" in text()
    display.update(ledger(old, dict(trial=2, round=0, state="complete"), dict(trial=1, round=0, state="fail")))
    assert text().count("done") == 2 and display.finished == 1


def test_events_are_counted_once_and_half_lines_wait(tmp_path):
    (tmp_path / "events").mkdir()
    path = tmp_path / "events" / "a.jsonl"
    event = dict(time=0.0, trial=0, where="base", kind="computed", stage="vector", digest="d", seconds=1.0)
    path.write_text(json.dumps(event) + "\n")
    display, text = make(tmp_path)
    line = json.dumps(event | dict(kind="replayed")) + "\n"
    with path.open("a") as file:
        file.write(line + line[:20])
        file.flush()
        display._poll()
        file.write(line[20:])
        file.flush()
    display._poll()
    assert display.counts == {"computed": 0, "replayed": 2, "set aside": 0}  # an earlier run's event is not ours
    with path.open("a") as file:
        file.write(json.dumps(dict(time=0.0, trial=4, where="round 0", kind="start")) + "\n")
        file.write(json.dumps(dict(time=0.0, trial=4, where="ValueError: x", kind="error")) + "\n")
    display._poll()
    assert "trial 4 round 0" in text() and "trial 4 failed: ValueError: x" in text() and display.where == {}
