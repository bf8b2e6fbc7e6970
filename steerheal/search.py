"""python -m steerheal.search SPACE: search over steer-heal loops for the Pareto front of trait against coherence.

It opens (or reopens) the study, runs what is missing, and rebuilds ledger, front, plot and adapters. Facts live in the
stage store and in the study; everything else is a view, so the same command again goes on after any interruption.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import tyro

from steerheal import spaces, study_file
from steerheal.cli import merged_flags, run_main
from steerheal.errors import UserError
from steerheal.plan import Plan, make
from steerheal.settings import parse_assignments
from steerheal.stages import atomic_write, disk_error, locked

LONGEST = 1e6  # hours; a timer takes no more than about 2.5e6


@dataclasses.dataclass
class Args:
    """Search over steer-heal loops; the same command again resumes. Results go to OUT/NAME."""

    space: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SPACE")] = ""
    """the search space: a file in search_spaces/ (see --list)"""
    file: Annotated[Path | None, tyro.conf.arg(name="space")] = None
    """a search space of your own, instead of a name: a .py file anywhere"""
    trials: int | None = None
    """trials in all, those already done included (default: what the search was begun with, else the space's budget)"""
    rounds: int | None = None
    """rounds per trial (default: what the search was begun with, else the space's, else the model's)"""
    hours: float | None = None
    """wall budget of this run, in hours; it then stops at the next stage, and the same command goes on"""
    model: str | None = None
    """hub id, local folder or built-in name; auto takes gemma-3-4b-it on a CUDA card of 20 GiB or more, else the
    embedded model, smollm2-135m-instruct (default: what the search was begun with, else the space's, else auto)"""
    set: tuple[str, ...] = ()
    """settings of every trial, such as heal.lam=1.0 filter.coherence=false (names and values: steerheal/settings.py, or the
    page Settings that `make docs` writes)"""
    name: str | None = None
    """folder of the results (default: the space's name)"""
    out: Path = Path("results")
    """where searches and their shared stage store live"""
    sampler: str | None = None
    """tpe, nsgaii, gp, random or grid (default: what the search was begun with, else the space's, mostly tpe)"""
    seed: int | None = None
    """of the proposals (default: what the search was begun with, else 0); run seeds are --set seed=N"""
    halving: bool = False
    """end a trial after 2, 4, 8, ... rounds when at least half of those that got as far are on better fronts"""
    concurrent: int = 1
    """trials at a time, each with its share of the cores and of the GPU"""
    gpus_per_trial: float | None = None
    """cards of each trial, 0.5 for two trials on one (default: an even share, at most one)"""
    address: str | None = None
    """of a running Ray cluster (auto: this machine's); --concurrent then counts trials over all its nodes"""
    confirm: int | None = None
    """run the front's members again on this many fresh run seeds, and say which stay on the front"""
    restart: bool = False
    """move the results folder aside and start anew (the stage store stays)"""
    dry_run: bool = False
    """say what would run, what the store has already, and what it will cost; runs nothing, but reads the model, and fetches
    one that is not here"""
    status: bool = False
    """how far the search is, running or not; from any terminal"""
    list: bool = False
    """describe the search spaces and end"""


def main() -> None:
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # libraries ask for cards: no CUDA context for that
    args = tyro.cli(Args, args=merged_flags(sys.argv[1:], "--set"), prog="python -m steerheal.search",
                    config=(tyro.conf.FlagCreatePairsOff,))
    run_main(lambda: dispatch(args))


def dispatch(args: Args) -> int:
    """Do what the command line asks for. Returns the exit code."""
    if args.list or not (args.space or args.file):
        return listing()
    _check(args)
    name = str(args.file) if args.file else args.space
    if args.status:
        from steerheal.status import show

        return show(args.out / (args.name or Path(name).stem))
    return search(args, name)


def listing() -> int:
    """Print every space with its hypothesis and budget; a broken file does not hide the others."""
    for name in spaces.names():
        try:
            space = spaces.load(name)
        except UserError as error:
            print(f"{name}\n    BROKEN: {error}\n")
            continue
        print(f"{name}: {space.trials} trial{'s' * (space.trials != 1)}, {space.cost}\n    {space.hypothesis}\n")
    print("python -m steerheal.search NAME starts or resumes one; --help lists the options.")
    return 0


def search(args: Args, space: str) -> int:
    """Run a search to its end, or to the next stage after Ctrl-C. Returns the exit code."""
    plan = make(space, name=args.name, out=args.out, model=args.model, overrides=parse_assignments(list(args.set)),
                trials=args.trials, rounds=args.rounds, sampler=args.sampler, seed=args.seed, halving=args.halving,
                fresh=args.restart)
    for note in plan.notes:
        print(note)
    if args.confirm and not plan.resumed:
        raise UserError(f"{plan.folder} holds no search whose front could be confirmed. Run it first, without --confirm.")
    if args.dry_run:
        from steerheal.dryrun import report

        return report(plan)
    try:
        if args.restart:  # only now: a typo must not move anything
            _move_aside(plan.folder)
        with locked(plan.folder / ".lock", wait=False), study_file.in_words(plan.folder):
            return _search(plan, args)
    except BlockingIOError:
        raise UserError(f"{plan.folder} is in use by another running search. Wait for it, stop it, or take "
                        f"--name OTHER.") from None


def _check(args: Args) -> None:
    problems = [f"--{field} {getattr(args, field)}: must be at least 1"
                for field in ("trials", "rounds", "concurrent", "confirm")
                if getattr(args, field) is not None and getattr(args, field) < 1]
    if args.hours is not None and not 0 < args.hours <= LONGEST:
        problems.append(f"--hours {args.hours:g}: must be above 0, and at most {LONGEST:g}")
    share = args.gpus_per_trial
    if share is not None and not (0 <= share <= 1 or (share > 1 and share.is_integer())):
        problems.append(f"--gpus-per-trial {share:g}: must be at least 0, and above 1 a whole number")
    problems += [f"--{field}: names nothing; leave it out for the default" for field in ("model", "name", "sampler")
                 if getattr(args, field) == ""]
    if args.sampler not in (None, *spaces.SAMPLERS):
        problems.append(f"--sampler {args.sampler}: allowed: {', '.join(spaces.SAMPLERS)}")
    if args.confirm and (args.dry_run or args.restart or args.trials):
        problems.append("--confirm goes with neither --dry-run, --restart nor --trials: it runs the front of a search that is "
                        "there")
    if args.name and (Path(args.name).name != args.name or args.name.startswith(".")):
        problems.append(f"--name {args.name}: must be a name that begins with no dot; --out is the folder in which it lies")
    if args.space and args.file:
        problems.append(f"{args.space} and --space {args.file}: name one search space")
    if problems:
        raise UserError("\n".join(problems))


def _move_aside(folder: Path) -> None:
    """Rename the old results folder; nothing is deleted."""
    if folder.exists():
        with locked(folder / ".lock", wait=False):
            pass  # nobody is writing there
        aside = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        try:
            os.replace(folder, aside)
        except OSError as error:
            raise disk_error(folder, error) from error
        print(f"moved {folder} to {aside}")


def _search(plan: Plan, args: Args) -> int:
    from steerheal import doctor, driver, ledger, searcher, weights

    _prove_writable(plan.folder)
    machine = driver.Machine(args.concurrent, args.gpus_per_trial, args.address, args.hours)
    if not plan.resumed:
        doctor.cheap(plan.settings, plan.trials, plan.folder, machine.at_a_time())
    # fetched and converted before any worker waits for it; a resumed search stays on the commit it began with
    plan.commit = weights.hub_commit(weights.locate(plan.settings.model, plan.commit))
    plan.write()
    study = ledger.create_study(plan.folder)
    searcher.make_sampler(plan.sampler, 0)  # a sampler that is not installed is told now
    if args.confirm:
        from steerheal.confirm import confirm

        return confirm(plan, study, args.confirm, machine)
    space = plan.space.distributions()
    fixed = searcher.recover(study)
    if plan.sampler == "grid":
        fixed |= dict(enumerate(plan.space.points()))
    todo = searcher.missing(study, plan.trials)
    ledger.write(study, plan.folder)
    done = plan.trials - len(todo)
    if plan.resumed and todo:
        print(f"{plan.folder}: {done} of {plan.trials} trials are finished, going on")
    ended = driver.Ended("", "nothing to compute: every trial is finished")
    if todo:
        ended = driver.run(plan, study, space, todo, fixed, machine, done)
    return _finish(plan, study, list(space), ended)


def _finish(plan: Plan, study: Any, params: list[str], ended: Any) -> int:
    """Rebuild every view, show the front, say what went wrong and how to go on."""
    from analysis import report
    from steerheal import ledger, searcher, views
    from steerheal.display import front_table, make_console, say_failures, starved

    table = ledger.write(study, plan.folder)
    drawn = report.refresh(plan.folder, whole=True)
    count = views.export(plan, table)
    console = make_console()
    left = searcher.missing(study, plan.trials)
    if table["front"].any():
        console.print(front_table(table, params))
    else:
        console.print("No round was deliverable yet (coherence kept >= 0.85 and fluency kept >= 0.80).")
    for sentence in starved(table):
        console.print(sentence, soft_wrap=True)
    if "trait" in study.user_attrs:
        console.print(f"trait readout: {study.user_attrs['trait']}", soft_wrap=True)
    console.print(f"hypervolume {ledger.hypervolume(table):.4f} nats x coherence, above 0 nats and coherence kept 0.85")
    console.print(ended.summary)
    console.print(f"{plan.folder}: ledger.csv, front.csv, " + ("report.html, " if drawn else "") +
                  f"{count} adapters in adapters/", soft_wrap=True)
    if not left:
        return 0
    say_failures(console, table, left)
    why = {"signal": "Stopped.", "hours": "The wall budget is spent."}.get(ended.stopped, f"{len(left)} trials failed.")
    console.print(f"{why} {plan.trials - len(left)} of {plan.trials} trials are finished; the same command goes on "
                  f"where this left off.")
    return ended.exit_code


# ---------------------------------------------------------------- the folder


def _prove_writable(folder: Path) -> None:
    """Fail now, in words, and not in the first worker an hour later."""
    atomic_write(folder / ".writable", b"")
    (folder / ".writable").unlink()


if __name__ == "__main__":
    main()
