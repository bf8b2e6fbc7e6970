"""python -m benchmarks.cluster: a search over two Ray nodes on this machine, one of them killed in the middle of a trial.

The nodes are two raylets of one processor each, started as docs/cluster.md says. The search runs one trial on each. When
the second node heals, everything on it gets SIGKILL. The search must finish on the first one.
"""

from __future__ import annotations

import collections
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from benchmarks.command import command
from benchmarks.driving import computed, events, members, start, tiny_model, wait_for
from steerheal import ledger

TRIALS = 4
RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--num-gpus=0",
       "--object-store-memory=100000000", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]


def node(log: Path, *options: str) -> subprocess.Popen[bytes]:
    """A Ray node in a process session of its own."""
    with log.open("wb") as file:
        return subprocess.Popen([*RAY, *options], stdout=file, stderr=file, start_new_session=True)


def kill_all(session: int) -> None:
    for pid in members(session):
        os.kill(pid, signal.SIGKILL)


def measure() -> int:
    root = Path(tempfile.mkdtemp(prefix="cl-"))  # short: Ray's sockets allow 107 bytes
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))  # for nodes and driver alike
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        model, settings = tiny_model(root)
        nodes.append(node(root / "head.log", "--head", f"--port={address.split(':')[1]}", "--include-dashboard=false",
                          f"--temp-dir={root / 'ray'}"))
        while "Ray runtime started" not in (root / "head.log").read_text():
            assert nodes[0].poll() is None, (root / "head.log").read_text()
            time.sleep(0.2)
        nodes.append(node(root / "second.log", f"--address={address}"))
        while "Ray runtime started" not in (root / "second.log").read_text():
            assert nodes[1].poll() is None, (root / "second.log").read_text()
            time.sleep(0.2)
        print(f"two nodes at {address}", flush=True)

        search = start(model, root / "out", settings, "--address", address, "--concurrent", "2", trials=TRIALS)
        folder, second = root / "out" / "quickstart", nodes[1].pid
        wait_for(folder, search, lambda e: e.get("stage") == "heal" and e["pid"] in members(second))
        hosts = [{e["pid"] in members(n.pid) for e in events(folder)} for n in nodes]
        assert all(True in seen for seen in hosts), "both nodes were to work"
        kill_all(second)
        print("second node killed while its trial was healing", flush=True)
        text = search.communicate(timeout=1800)[0]
        print(text)
        assert search.returncode == 0, search.returncode
        report(folder)
    finally:
        for each in nodes:
            kill_all(each.pid)
            each.wait()
        shutil.rmtree(root, ignore_errors=True)


def report(folder: Path) -> None:
    table = pd.read_parquet(folder / "ledger.parquet")
    study = ledger.open_study(folder)
    moved = collections.defaultdict(set)
    for e in events(folder):
        moved[e["trial"]].add(e["pid"])
    print("RESULT nodes=2 killed=1", *(f"{k}={v}" for k, v in dict(
        finished=table.loc[table["state"] == "complete", "trial"].nunique(), of=TRIALS,
        moved=sum(len(pids) > 1 for pids in moved.values()),  # trials that went on with another worker
        doubled=int(table.duplicated(["trial", "round"]).sum()),
        computed_twice=sum(n > 1 for n in computed(folder).values()),
        zombies=sum(t.state.name == "RUNNING" for t in study.trials)).items()))
    return 0


if __name__ == "__main__":
    command(measure)
