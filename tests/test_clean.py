import json
import os
import time

import pytest

from steerheal.clean import clean
from steerheal.errors import UserError

DAY = 86400


def stage(out, digit, age_days, name=None):
    path = out / ".stages" / (digit * 2) / (name or digit * 64)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * 1000)
    then = time.time() - DAY * age_days
    os.utime(path, (then, then))
    return path


def search(folder, *digits):
    (folder / "events").mkdir(parents=True)
    lines = [json.dumps(dict(time=0, trial=0, kind="replayed", where="", stage="heal", digest=d * 64)) for d in digits]
    (folder / "events" / "w.jsonl").write_text("\n".join(lines))
    (folder / "search.json").write_text("{}")


def test_only_what_no_search_refers_to_goes_and_only_with_yes(tmp_path, capsys):
    search(tmp_path / "one", "a", "b")
    search(tmp_path / "two", "b")
    (tmp_path / "one" / "confirm" / "events").mkdir(parents=True)
    (tmp_path / "one" / "confirm" / "events" / "w.jsonl").write_text(
        json.dumps(dict(time=0, trial=0, kind="computed", where="", stage="heal", digest="c" * 64)))
    kept = [stage(tmp_path, d, 90) for d in "abc"] + [stage(tmp_path, "f", 0.5)]
    going = [stage(tmp_path, "d", 3), stage(tmp_path, "e", 40), stage(tmp_path, "a", 5, "a" * 64 + ".damaged"),
             stage(tmp_path, "b", 5, ".bb.123.tmp")]
    assert clean(tmp_path, 1, yes=False) == 0
    out = capsys.readouterr().out
    assert "4 files" in out and "2 stages of no search, 2 damaged or half-written" in out and "1 younger" in out
    assert "nothing is removed without --yes" in out and all(p.exists() for p in kept + going)
    line = next(line for line in out.splitlines() if line.split()[:1] == ["one"])
    assert line.split()[1] == "3"  # a, b, c
    assert clean(tmp_path, 1, yes=True) == 0
    assert [p.exists() for p in kept] == [True] * 4 and not any(p.exists() for p in going)
    assert "removed" in capsys.readouterr().out
    clean(tmp_path, 1, yes=True)
    assert "to remove: 0 files" in capsys.readouterr().out


def test_a_folder_without_a_store_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="no stage store there"):
        clean(tmp_path, 1, yes=True)


def test_what_a_run_without_events_delivered_stays(tmp_path):
    kept, gone = stage(tmp_path, "a", 5), stage(tmp_path, "b", 5)
    folder = tmp_path / "run-1"
    folder.mkdir()
    (folder / "search.json").write_text("{}")
    (folder / "ledger.csv").write_text(f'trial,chain\n0,"[""{"a" * 64}""]"\n')
    clean(tmp_path, 1, yes=True)
    assert kept.exists() and not gone.exists()
