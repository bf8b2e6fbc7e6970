"""Running trials on Ray: on this machine, or on a cluster that is already up.

Everything that outlives a run is in the search's folder and in the stage store; Ray's own files are scratch.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerheal import events, ledger, searcher, weights
from steerheal.display import Display
from steerheal.errors import UserError
from steerheal.follower import Follower
from steerheal.plan import Plan, contents
from steerheal.settings import to_flat
from steerheal.stages import disk_error

STOPPED = 75  # EX_TEMPFAIL: give the same command again
LONGEST_ROOT = 16  # characters of the folder in which Ray's scratch is made: its sockets' names take the rest of their 107
RESTARTS = 2  # of a trial whose worker or node died; its finished stages are replayed


@dataclass(frozen=True)
class Machine:
    """Where and how long trials run; none of it decides a result."""

    concurrent: int = 1
    gpus_per_trial: float | None = None
    address: str | None = None  # of a Ray cluster; None starts Ray here
    hours: float | None = None  # wall budget of this run

    def at_a_time(self) -> int:
        """Trials among which this machine's cards are shared; 1 on a cluster, whose cards are not known yet."""
        if self.address is not None or (self.concurrent == 1 and not self.gpus_per_trial):
            return 1
        cards = len(weights.cards())
        share = self.gpus_per_trial or even_share(cards, self.concurrent)
        return max(math.ceil(cards / share), 1) if share else self.concurrent


def even_share(cards: float, concurrent: int) -> float:
    """What each of so many trials gets of the cards, at most one; so many share a card that all of them are held."""
    return 1 / math.ceil(concurrent / cards) if cards else 0.0


@dataclass(frozen=True)
class Ended:
    stopped: str  # why trials are left that did not fail: "", "signal" or "hours"
    summary: str  # stages computed and replayed

    @property
    def exit_code(self) -> int:
        """Where trials are left: a spent wall budget is an end like any other, a signal is not, a failure is one."""
        return {"signal": STOPPED, "hours": 0}.get(self.stopped, 1)


def run(plan: Plan, study: Any, space: dict[str, Any], todo: list[int], fixed: dict[int, dict[str, Any]], machine: Machine,
        done: int = 0) -> Ended:
    """Run the trials of the logical indices `todo`, telling the study and refreshing the folder's views.

    Raises:
        UserError: an error that every trial would meet.
    """
    from steerheal.tensorboard import Scalars

    (plan.folder / ".stop").unlink(missing_ok=True)
    scalars = Scalars(plan.folder)
    with Display(plan.folder, plan.name, len(todo), done, plan.settings.rounds, list(space)) as display:
        display.update(ledger.build(study))
        views = Follower(plan.folder, study, display.update)

        def on_change(index: int, row: dict[str, Any] | None) -> None:
            if row:
                scalars.add(index, row)
            views.change()

        search = searcher.StudySearcher(study, space, todo, fixed, plan.sampler, plan.seed, on_change, plan.halving,
                                        views.catch_up)
        with events.session(plan.folder, machine.concurrent):
            stopped, fatal = _tune(plan, search, machine, len(todo))
        views.catch_up(now=True)
    if fatal:
        raise UserError(fatal)
    return Ended(stopped, display.summary())


def _tune(plan: Plan, search: searcher.StudySearcher, machine: Machine, count: int) -> tuple[str, str]:
    """Run `count` trials. Returns why it was stopped ("", "signal", "hours"), and an error that every trial would meet."""
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_CHDIR_TO_TRIAL_DIR="0", RAY_AIR_NEW_OUTPUT="0",
                      TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", TUNE_DISABLE_SIGINT_HANDLER="1",
                      RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
                      TUNE_GLOBAL_CHECKPOINT_S="1e9")  # of its own state, which is never read
    import ray
    from ray import tune

    from trainables.heal_loop import HealTrial

    class Halt(tune.Stopper):
        """Ends the whole run at an error that every trial would meet, and trials by halving; at a user's request no trial
        begins any more."""

        fatal = ""

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            Halt.fatal = Halt.fatal or (result["error"] if result.get("fatal") else "")
            return search.stops(trial_id, result)

        def stop_all(self) -> bool:
            search.idle()  # through the searcher, because Ray pickles this class with all that it names
            if (plan.folder / ".stop").exists():
                search.todo.clear()  # workers end at their next stage by themselves; those that Ray stops it kills after 10 s
                return bool(Halt.fatal) or not search.running  # what waits for room that a node took along would wait on
            return bool(Halt.fatal)

    class Watch(tune.Callback):
        """Which trials run; and a worker's death in a sentence, where Ray would print its own traceback."""

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            search.running.add(trial.trial_id)

        def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            search.running.discard(trial.trial_id)
            print(f"a worker died or could not be reached; trial {search.index.get(trial.trial_id)} starts again and replays "
                  f"what it had finished", file=sys.stderr, flush=True)

    scratch = _scratch(plan, machine)
    with _quiet():
        try:
            _connect(machine, scratch)
            resources = _resources(machine, plan.settings.device)
            tuner = tune.Tuner(
                tune.with_resources(HealTrial, resources),
                param_space=dict(flat=to_flat(plan.settings), folder=str(plan.folder), store=str(plan.store),
                                 commit=plan.commit, gpu=resources["gpu"], contents=contents(plan.settings)),
                tune_config=tune.TuneConfig(search_alg=search, num_samples=count, reuse_actors=True,
                                            max_concurrent_trials=machine.concurrent),
                run_config=tune.RunConfig(name="run", storage_path=str(scratch), stop=Halt(), verbose=0,
                                          callbacks=[Watch()],
                                          failure_config=tune.FailureConfig(max_failures=RESTARTS)))
            with _stop_requests(plan.folder, machine.hours) as stopped:  # after ray.init, which takes SIGTERM for itself
                tuner.fit()
        except OSError as error:
            if error.errno is None:  # none of a file's
                raise
            raise disk_error(scratch, error) from error
        finally:
            ray.shutdown()
            shutil.rmtree(scratch, ignore_errors=True)
    return (stopped or [""])[0], Halt.fatal


def _connect(machine: Machine, scratch: Path) -> None:
    import ray

    common: dict[str, Any] = dict(log_to_driver=False, logging_level=logging.ERROR, runtime_env={
        "env_vars": {"PYTORCH_CUDA_ALLOC_CONF": os.environ["PYTORCH_CUDA_ALLOC_CONF"], "HF_HUB_OFFLINE": "1"}})
    if machine.address is None:
        cores = len(os.sched_getaffinity(0))
        where, help_ = "Ray did not start", "The machine may be overloaded: give the same command again."
        common |= dict(num_cpus=max(cores, machine.concurrent), include_dashboard=False, object_store_memory=10**8,
                       _temp_dir=str(scratch))
    else:
        where, help_ = f"--address {machine.address}", "docs/cluster.md says how to start a cluster."
    try:
        with _sigterm_masked():
            ray.init(address=machine.address or "local", **common)
    except Exception as error:  # a timeout of Ray's own start is a bare Exception
        raise UserError(f"{where}: {(str(error).splitlines() or [''])[0]} {help_}") from None


@contextlib.contextmanager
def _sigterm_masked() -> Iterator[None]:
    """What Ray starts meanwhile never sees SIGTERM, as it never sees Ctrl-C: `timeout` and batch systems send it to the whole
    process group, and without its servers the driver could not let the running stage end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _resources(machine: Machine, device: str) -> dict[str, float]:
    """Each trial's share of the cores, and of the cards where there are any: the largest with which as many trials as are
    asked for find room at a time. A trial never spans two nodes."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(n.get("GPU", 0) for n in nodes)
    gpu = even_share(gpus, machine.concurrent) if machine.gpus_per_trial is None else machine.gpus_per_trial
    gpu = gpu if device != "cpu" else 0.0
    if gpu > max(n.get("GPU", 0) for n in nodes):
        raise UserError(f"--gpus-per-trial {gpu:g}: no node has that many cards (Ray sees {gpus:g} in all), so trials "
                        f"would wait for ever. Leave it out to share what there is.")

    def room(cpu: int) -> int:
        cards = [math.floor(n.get("GPU", 0) / gpu + 1e-9) if gpu else machine.concurrent for n in nodes]
        return sum(min(int(n.get("CPU", 0)) // cpu, most) for n, most in zip(nodes, cards))

    largest = max(int(n.get("CPU", 0)) for n in nodes)
    cpu = next((c for c in range(largest, 0, -1) if room(c) >= machine.concurrent), 1)
    if not room(cpu):
        raise UserError("no node has both a processor and a card to give, so trials would wait for ever. Start Ray on the "
                        "nodes with cards with --num-cpus of at least 1.")
    if room(cpu) < machine.concurrent:
        print(f"--concurrent {machine.concurrent}: {room(cpu)} find room at a time on what Ray sees; the others wait.")
    return {"cpu": cpu, "gpu": gpu}


def _scratch(plan: Plan, machine: Machine) -> Path:
    """A folder for Ray's own files. On a cluster: in the search's folder, where every node can write. Here: off the
    results' disk, which may be slow or full, and short, because Ray's sockets allow 107 bytes; those of dead drivers are
    removed. A living one holds a lock on its folder: its process may be one of another container."""
    if machine.address is not None:
        return plan.folder / ".ray"
    root = tempfile.gettempdir()
    if len(root) > LONGEST_ROOT:
        root = "/tmp"
    for old in Path(root).glob("steerheal-*-*"):
        pid = old.name.split("-")[1]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and _hold(old):
            shutil.rmtree(old, ignore_errors=True)
    try:
        made = Path(tempfile.mkdtemp(prefix=f"steerheal-{os.getpid()}-", dir=root))
    except OSError as error:
        raise disk_error(Path(root), error) from error
    _hold(made)
    return made


def _hold(folder: Path) -> bool:
    """Lock a folder for as long as this process lives; False where another has."""
    try:
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _stop_requests(folder: Path, hours: float | None) -> Iterator[list[str]]:
    """Ctrl-C, SIGTERM or a spent wall budget ask the workers to stop at their next stage; a second Ctrl-C ends at once."""
    seen: list[str] = []

    def ask(why: str, words: str) -> None:
        seen.append(why)
        (folder / ".stop").touch()
        print(words, file=sys.stderr, flush=True)

    def on_signal(number: int, frame: Any) -> None:
        if "signal" in seen:
            raise KeyboardInterrupt
        ask("signal", "stopping after the stage that is running (again: at once)")

    timer = threading.Timer((hours or 0) * 3600, ask, ("hours", f"the wall budget of {hours} hours is spent: stopping "
                                                                f"after the stage that is running"))
    timer.daemon = True
    if hours:
        timer.start()
    before = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray's own chatter is not the user's concern; what matters of it arrives as results."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
