"""python -m steerheal.doctor: what this machine can run, line by line, with the way out for each failure."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tyro

from steerheal.cli import merged_flags, run_main
from steerheal.doctor import Finding, checks, findings
from steerheal.settings import Settings, from_flat, parse_assignments, preset

SPACE = "pareto_tau"  # what the probe tells the cost of


@dataclass
class Args:
    """Check Python, torch, the card, disk, Ray's needs and the model; then time each stage, small, in about two minutes."""

    model: str = "auto"
    """the model to check"""
    set: tuple[str, ...] = ()
    """settings as in a search, such as quantise=nf4"""
    out: Path = Path("results")
    """where results would go"""
    probe: bool = True
    """--no-probe leaves the timing out"""


def main() -> None:
    args = tyro.cli(Args, args=merged_flags(sys.argv[1:], "--set"), prog="python -m steerheal.doctor")
    run_main(lambda: report(args))


def report(args: Args) -> int:
    """Print every finding as it comes; 0 where nothing stands in the way."""
    from steerheal import spaces, weights
    from steerheal.doctor import machine, model

    space = spaces.load(SPACE)
    overrides = parse_assignments(list(args.set))
    name, why = weights.resolve(overrides.pop("model", args.model))
    settings = from_flat(preset(name) | space.base | overrides | {"model": name})
    if why:
        print(why)
    asked = [*checks(settings, space.trials, args.out), ("extras", machine.extras)]
    failed = _print(findings(asked))
    if not failed:  # fetches tokenizer and config where they are not here, the probe also the weights
        failed = _print(findings([("tokenizer", lambda: model.template(settings))]))
    if not failed and args.probe:
        failed = _print(findings([("probe", lambda: _probe(settings, space.trials))]))
    print("nothing stands in the way" if not failed else f"{failed} checks failed" if failed > 1 else "1 check failed")
    return int(failed > 0)


def _print(found: Iterable[Finding]) -> int:
    failed = 0
    for finding in found:
        print(finding, flush=True)
        failed += not finding.ok
    return failed


def _probe(settings: Settings, trials: int) -> str:
    from steerheal.doctor import model, probe

    timed = []
    print(f"      {'probe':12} seconds here, seconds of the whole stage, GiB at its peak", flush=True)
    for row in probe.stages(settings):
        timed.append(row)
        print(f"      {row.stage:12} {row.measured:8.1f} {row.whole:8.1f} {row.gib:6.2f}", flush=True)
    least, most = probe.hours(timed, settings, trials)
    return (f"{SPACE} ({trials} trials x {settings.rounds} rounds) would take {least:.1f} to {most:.1f} hours and "
            f"{model.store_bytes(settings, trials) / 1e9:.1f} GB on disk")


if __name__ == "__main__":
    main()
