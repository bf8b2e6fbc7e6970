"""Searches as separate processes, watched through their event files: for the fault tests and benchmarks."""

from __future__ import annotations

import collections
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MODULE = ("-m", "steerheal.search")


def start(model: Path, out: Path, settings: dict[str, Any], *extra: str, trials: int = 3,
          program: Sequence[str] = MODULE) -> subprocess.Popen[str]:
    """A quickstart search on a model's folder, in a process session of its own, which Ray's processes share."""
    overrides = [f"{k}={json.dumps(v) if not isinstance(v, str) else v}" for k, v in settings.items()]
    return subprocess.Popen([sys.executable, *program, "quickstart", "--model", str(model), "--out", str(out), "--trials",
                             str(trials), *extra, "--set", *overrides], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True)


def run(*args: Any, **kw: Any) -> tuple[str, int]:
    """Output and exit code of a search that nobody disturbs."""
    process = start(*args, **kw)
    return process.communicate(timeout=1800)[0], process.returncode


def events(folder: Path) -> list[dict[str, Any]]:
    """Every whole line of a search's event files in order of time, with the worker's pid."""
    lines = [(path, line) for path in (folder / "events").glob("*.jsonl")
             for line in path.read_text().splitlines(keepends=True)]
    return sorted((json.loads(line) | dict(pid=int(path.stem.rsplit("-", 1)[1]))
                   for path, line in lines if line.endswith("\n")), key=lambda e: e["time"])


def computed(folder: Path) -> collections.Counter[str]:
    """How often each digest was computed."""
    return collections.Counter(e["digest"] for e in events(folder) if e["kind"] == "computed")


def wait_for(folder: Path, process: subprocess.Popen[str], wanted: Callable[[dict[str, Any]], bool], count: int = 1) -> int:
    """The pid of the worker that wrote the `count`-th wanted event.

    Raises:
        RuntimeError: the search ended before, or half an hour went by.
    """
    for _ in range(90_000):
        found = [e["pid"] for e in events(folder) if wanted(e)]
        if len(found) >= count:
            return found[-1]
        if process.poll() is not None:
            raise RuntimeError(f"the search ended too early:\n{process.stdout.read() if process.stdout else ''}")
        time.sleep(0.02)
    process.kill()
    raise RuntimeError("waited half an hour for nothing")


def members(session: int) -> list[int]:
    """Processes of a session that still run: a dead driver must not leave any."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, sid = stat.read_text().rpartition(")")[2].split()[:4]
            if int(sid) == session and state != "Z":
                found.append(int(stat.parent.name))
    return found


def tiny_model(root: Path) -> tuple[Path, dict[str, Any]]:
    """A random Llama of four layers in a folder, and settings that run the loop on it in seconds."""
    from tests.conftest import TINY, make_lm

    lm = make_lm()
    lm.model.save_pretrained(root / "tiny-llama")
    lm.tokenizer.save_pretrained(root / "tiny-llama")
    return root / "tiny-llama", TINY
