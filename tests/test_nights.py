"""Real searches on a hub model, with everything a night may bring: no network, a newer commit, a clock that jumps."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_hub
import psutil
import pytest
from fake_hub import COMMITS, NAME
from test_search import command, start, wait_for

from steerheal.errors import UserError
from steerheal.stages import Result, Store

ROOT = Path(__file__).parent.parent
DRIVER_WITHOUT_CUDA = """
import runpy, sys, torch
def refuse(*args, **kw): raise AssertionError("the driver touched CUDA")
torch.cuda._lazy_init = torch._C._cuda_init = refuse
sys.argv = sys.argv[1:]
runpy.run_module("steerheal.search", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def night(tiny_folder, tmp_path_factory):
    """A search of one trial on a hub model, its first start online, its driver kept from CUDA: (out folder, the hub)."""
    home, out = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("out")
    with fake_hub.serve(tiny_folder) as hub, pytest.MonkeyPatch.context() as patch:
        for key, value in hub.environment(home).items():
            patch.setenv(key, value)
        done = subprocess.run([sys.executable, "-c", DRIVER_WITHOUT_CUDA, *command(NAME, out, trials=1)[2:]], cwd=ROOT,
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        yield out, hub


@pytest.mark.search
def test_a_search_stays_on_its_commit_sleeps_and_needs_no_network_to_resume_or_merge(night, monkeypatch):
    """The resumed search is stopped for longer than Ray's heartbeat, every process of it, as a closed lid does it."""
    out, hub = night
    folder = out / "quickstart"
    assert json.loads((folder / "search.json").read_text())["commit"] == COMMITS[0]
    hub.head = COMMITS[1]
    pull = "from huggingface_hub import snapshot_download; print(snapshot_download('someone/tiny'))"
    newer = subprocess.run([sys.executable, "-c", pull], capture_output=True, text=True, check=True).stdout
    assert COMMITS[1] in newer  # some other program moved the cache's `main`
    hub.asked.clear()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    before = set((folder / "events").glob("*.jsonl"))
    process = start(NAME, out, trials=2)
    wait_for(out, lambda seen: set((folder / "events").glob("*.jsonl")) - before, process)
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    [worker] = set((folder / "events").glob("*.jsonl")) - before
    environ = Path(f"/proc/{worker.stem.split('-')[-1]}/environ").read_bytes().decode().split("\0")
    for signal_, seconds in ((signal.SIGSTOP, 15), (signal.SIGCONT, 0)):
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(signal_)
        time.sleep(seconds)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" in environ and "HF_HUB_OFFLINE=1" in environ
    assert models_of(out) == 1
    done = subprocess.run([sys.executable, "-m", "steerheal.pick", str(folder), "--index", "0", "--merge",
                           str(out / "merged")], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"commit {COMMITS[0]}" in (out / "merged" / "README.md").read_text()
    assert models_of(out) == 2  # the merged one beside it
    assert hub.asked == []


def models_of(out):
    """Models that stages of a store were computed on: one digest for each commit of each."""
    store = Store(out / ".stages")
    heads = [store.head(path.name) for path in store.root.glob("*/*") if not path.suffix]
    return len({head["inputs"]["model"] for head in heads if "model" in head["inputs"]})


def test_durations_do_not_follow_a_clock_that_jumps(tmp_path, monkeypatch):
    store = Store(tmp_path)
    seen = []
    store.on_event = seen.append

    def compute():
        monkeypatch.setattr(time, "time", lambda: 0.0)  # someone set the clock back to 1970
        return Result({"x": 1})

    found = store.stage("vector", {"a": 1}, compute)
    assert 0 <= seen[-1].seconds < 60 and 0 <= store.head(found.digest)["seconds"] < 60


def test_a_disk_that_fills_up_costs_one_stage(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.stage("vector", {"a": 1}, lambda: Result({"x": 1}))
    with monkeypatch.context() as full:
        def no_space(fd):
            raise OSError(errno.ENOSPC, "No space left on device")

        full.setattr(os, "fsync", no_space)
        with pytest.raises(UserError, match="the disk is full"):
            store.stage("vector", {"a": 2}, lambda: Result({"x": 2}))
    assert not list(tmp_path.rglob("*.tmp"))
    computed = []
    for a in (1, 2):
        store.stage("vector", {"a": a}, lambda a=a: computed.append(a) or Result({"x": a}))
    assert computed == [2]
