"""python -m steerheal.search SPACE: search over steer-heal loops for the Pareto front of trait against coherence.

The driver of a search. It opens (or reopens) the study, lets Ray Tune run what is missing, and rebuilds ledger, front,
plot and adapters. Facts live in the stage store and in the study; everything else here is a view, so the same command
again goes on after any interruption.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro

from steerheal import spaces
from steerheal.cli import merged_flags, run_main
from steerheal.errors import UserError
from steerheal.plan import Plan, make
from steerheal.settings import parse_assignments, to_flat
from steerheal.stages import atomic_write, disk_error, locked

STOPPED = 75  # EX_TEMPFAIL: give the same command again


@dataclasses.dataclass
class Args:
    """Search over steer-heal loops; the same command again resumes. Results go to OUT/NAME."""

    space: Annotated[str, tyro.conf.Positional] = ""
    """the search space: a file in search_spaces/ (see --list)"""
    trials: int | None = None
    """trials in all, those already done included (default: the space's budget)"""
    rounds: int | None = None
    """rounds per trial"""
    model: str | None = None
    """hub id, local folder or built-in name; auto takes gemma-3-4b-it on a 20 GB CUDA card, else the embedded model"""
    set: tuple[str, ...] = ()
    """settings of every trial, such as heal.lam=1.0 filter.coherence=false"""
    name: str | None = None
    """folder of the results (default: the space's name)"""
    out: Path = Path("results")
    """where searches and their shared stage store live"""
    sampler: str | None = None
    """tpe (default) or random"""
    seed: int | None = None
    """of the proposals; run seeds are --set seed=N"""
    concurrent: int = 1
    """trials at a time, each with its share of the cores and of the GPU"""
    restart: bool = False
    """move the results folder aside and start anew (the stage store stays)"""
    list: bool = False
    """describe the search spaces and end"""


def main() -> None:
    args = tyro.cli(Args, args=merged_flags(sys.argv[1:], "--set"), prog="python -m steerheal.search")
    run_main(lambda: listing() if args.list or not args.space else search(args))


def listing() -> int:
    """Print every space with its hypothesis and budget; a broken file does not hide the others."""
    for name in spaces.names():
        try:
            space = spaces.load(name)
        except UserError as error:
            print(f"{name}\n    BROKEN: {error}\n")
            continue
        print(f"{name}: {space.trials} trials, {space.cost}\n    {space.hypothesis}\n")
    print("python -m steerheal.search NAME starts or resumes one; --help lists the options.")
    return 0


def search(args: Args) -> int:
    """Run a search to its end, or to the next stage after Ctrl-C. Returns the exit code."""
    _check_numbers(args)
    try:
        return _search_locked(args)
    except BlockingIOError:
        raise UserError(f"{args.out / (args.name or args.space)} is in use by another running search. Wait for it, stop "
                        f"it, or take --name OTHER.") from None


def _search_locked(args: Args) -> int:
    plan = make(args.space, name=args.name, out=args.out, model=args.model, overrides=parse_assignments(list(args.set)),
                trials=args.trials, rounds=args.rounds, sampler=args.sampler, seed=args.seed, fresh=args.restart)
    if args.restart:  # only now: a typo must not move anything
        _move_aside(plan.folder)
    for note in plan.notes:
        print(note)
    with locked(plan.folder / ".lock", wait=False):
        return _search(plan, args.concurrent)


def _check_numbers(args: Args) -> None:
    problems = [f"--{field} {getattr(args, field)}: must be at least 1" for field in ("trials", "rounds", "concurrent")
                if getattr(args, field) is not None and getattr(args, field) < 1]
    if args.sampler not in (None, "tpe", "random"):
        problems.append(f"--sampler {args.sampler}: allowed: tpe, random")
    if problems:
        raise UserError("\n".join(problems))


def _move_aside(folder: Path) -> None:
    """Rename the old results folder; nothing is deleted."""
    if folder.exists():
        with locked(folder / ".lock", wait=False):
            pass  # nobody is writing there
        aside = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        os.replace(folder, aside)
        print(f"moved {folder} to {aside}")


def _search(plan: Plan, concurrent: int) -> int:
    from steerheal import doctor, weights

    _prove_writable(plan.folder)
    if not plan.resumed:
        doctor.cheap(plan.settings, plan.trials, plan.folder)
    # fetched and converted before any worker waits for it; a resumed search stays on the commit it began with
    plan.commit = weights.hub_commit(weights.locate(plan.settings.model, plan.commit))
    plan.write()
    from steerheal import ledger, searcher
    from steerheal.display import Display

    study = _study(plan)
    retries = searcher.recover(study)
    todo = searcher.missing(study, plan.trials)
    table = ledger.write(study, plan.folder)
    with contextlib.suppress(FileNotFoundError):
        (plan.folder / ".stop").unlink()
    params = list(plan.space.distributions())
    done = plan.trials - len(todo)
    if plan.resumed and todo:
        print(f"{plan.folder}: {done} of {plan.trials} trials are finished, going on")
    stopped, fatal, summary = False, "", "nothing to compute: every trial is finished"
    if todo:
        with Display(plan.folder, plan.name, len(todo), done, plan.settings.rounds, params) as display:
            display.update(table)

            def refresh() -> None:
                display.update(ledger.write(study, plan.folder))
                _draw(plan.folder)

            tuner = searcher.StudySearcher(study, plan.space.distributions(), todo, retries, plan.sampler, plan.seed,
                                           refresh)
            stopped, fatal = _tune(plan, tuner, concurrent, len(todo))
        summary = display.summary()
    if fatal:
        raise UserError(fatal)
    return _finish(plan, study, params, summary, stopped)


def _finish(plan: Plan, study: Any, params: list[str], summary: str, stopped: bool) -> int:
    """Rebuild every view, show the front, say what went wrong and how to go on."""
    from steerheal import ledger, searcher
    from steerheal.display import front_table, make_console

    table = ledger.write(study, plan.folder)
    drawn = _draw(plan.folder)
    count = _export(plan, table)
    console = make_console()
    left = searcher.missing(study, plan.trials)
    if table["front"].any():
        console.print(front_table(table, params))
    else:
        console.print("No round was deliverable yet (coherence kept >= 0.85 and fluency kept >= 0.80).")
    if "trait" in study.user_attrs:
        console.print(f"trait readout: {study.user_attrs['trait']}", soft_wrap=True)
    console.print(f"hypervolume {ledger.hypervolume(table):.4f} nats x coherence, above 0 nats and coherence kept 0.85")
    console.print(summary)
    console.print(f"{plan.folder}: ledger.csv, front.csv, " + ("pareto.png, " if drawn else "") +
                  f"{count} adapters in adapters/", soft_wrap=True)
    errors = table[table["error"].ne("") & table["trial"].isin(left)].drop_duplicates("trial")
    for _, row in errors.iterrows():
        console.print(f"trial {row['trial']} failed: {row['error']}", soft_wrap=True)
    if left:
        why = "Stopped." if stopped else f"{len(left)} trials failed."
        console.print(f"{why} {plan.trials - len(left)} of {plan.trials} trials are finished; the same command goes on "
                      f"where this left off.")
    return STOPPED if stopped and left else int(bool(left))


# ---------------------------------------------------------------- Ray


def _tune(plan: Plan, tuner_search: Any, concurrent: int, count: int) -> tuple[bool, str]:
    """Run `count` trials. Returns (stopped by the user, an error that every trial would meet)."""
    scratch = _scratch()
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_CHDIR_TO_TRIAL_DIR="0", RAY_AIR_NEW_OUTPUT="0",
                      TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", TUNE_DISABLE_SIGINT_HANDLER="1",
                      RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0", TUNE_GLOBAL_CHECKPOINT_S="10")
    import ray
    from ray import tune

    from steerheal.weights import cuda_memory_gb
    from trainables.heal_loop import HealTrial

    class Halt(tune.Stopper):
        """Ends the whole run at a user's request, or at an error that every trial would meet."""

        fatal = ""

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            Halt.fatal = Halt.fatal or (result["error"] if result.get("fatal") else "")
            return False

        def stop_all(self) -> bool:
            return bool(Halt.fatal) or (plan.folder / ".stop").exists()

    cores = len(os.sched_getaffinity(0))
    gpus = 1 if cuda_memory_gb() else 0
    resources = {"cpu": max(cores // concurrent, 1), "gpu": gpus / concurrent}
    with _quiet():
        ray.init(address="local", num_cpus=max(cores, concurrent), num_gpus=gpus, include_dashboard=False,
                 log_to_driver=False, object_store_memory=10**8, _temp_dir=str(scratch), logging_level=logging.ERROR,
                 runtime_env={"env_vars": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1"}})
        try:
            tuner = tune.Tuner(
                tune.with_resources(HealTrial, resources),
                param_space=dict(flat=to_flat(plan.settings), folder=str(plan.folder), store=str(plan.store),
                                 commit=plan.commit),
                tune_config=tune.TuneConfig(search_alg=tuner_search, num_samples=count, reuse_actors=True,
                                            max_concurrent_trials=concurrent),
                run_config=tune.RunConfig(name="run", storage_path=str(scratch), stop=Halt(), verbose=0))
            with _stop_signals(plan.folder) as stopped:  # after ray.init, which takes SIGTERM for itself
                tuner.fit()
        finally:
            ray.shutdown()
            shutil.rmtree(scratch, ignore_errors=True)
    return bool(stopped), Halt.fatal


def _scratch() -> Path:
    """A folder for Ray's own files, short because its sockets allow 107 bytes; those of dead drivers are removed."""
    root = Path(tempfile.gettempdir())
    for old in root.glob("steerheal-*-*"):
        pid = old.name.split("-")[1]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"steerheal-{os.getpid()}-"))


@contextlib.contextmanager
def _stop_signals(folder: Path) -> Iterator[list[int]]:
    """Ctrl-C or SIGTERM asks the workers to stop at their next stage; a second Ctrl-C ends at once."""
    seen: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        (folder / ".stop").touch()
        print("stopping after the stage that is running (again: at once)", file=sys.stderr, flush=True)

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray's own chatter is not the user's concern; what matters of it arrives as results."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---------------------------------------------------------------- the folder


def _prove_writable(folder: Path) -> None:
    """Fail now, in words, and not in the first worker an hour later."""
    atomic_write(folder / ".writable", b"")
    (folder / ".writable").unlink()


def _study(plan: Plan) -> Any:
    import optuna
    from sqlalchemy.exc import DatabaseError

    from steerheal.ledger import storage_url

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    try:
        study = optuna.create_study(study_name="steerheal", storage=storage_url(plan.folder), load_if_exists=True,
                                    directions=["maximize", "maximize"])
    except DatabaseError as error:
        raise UserError(f"{plan.folder / 'study.db'} cannot be read ({error.orig!s}). --restart moves the folder "
                        f"aside; what the stage store holds is not computed again.") from None
    except OSError as error:
        raise disk_error(plan.folder, error) from error
    study.set_metric_names(["trait_gain", "coherence_kept"])
    return study


def _draw(folder: Path) -> bool:
    """Refresh pareto.png; a failure to draw never ends a search."""
    try:
        from analysis import pareto

        pareto.draw_folder(folder)
        return True
    except Exception as error:
        print(f"warning: pareto.png could not be drawn: {type(error).__name__}: {error}", file=sys.stderr)
        return False


def _export(plan: Plan, table: Any) -> int:
    """Write the front's adapters in PEFT's format to adapters/<trial>/r<round>/, and nothing else there."""
    import json

    from steerheal import history, weights
    from steerheal.stages import Store

    target = plan.folder / "adapters"
    wanted = {target / str(row["trial"]) / f"r{row['round']}": json.loads(row["chain"])
              for _, row in table[table["front"]].iterrows()}
    for old in target.glob("*/r*"):
        if old not in wanted:
            shutil.rmtree(old)
    name = plan.settings.model
    base = str(weights.locate(name)) if name in weights.WHEEL_MODELS else name
    store = Store(plan.store)
    for folder, chain in wanted.items():
        if not (folder / "adapter_config.json").exists():  # written last, so its presence means a whole adapter
            rounds = [store.load(digest) for digest in chain]
            history.export(history.fold([history.from_tensors(r.tensors) for r in rounds if r]), folder, base)
    return len(wanted)


if __name__ == "__main__":
    main()
