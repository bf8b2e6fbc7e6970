"""python -m steerheal.run: one loop, without a search. Same settings, same store, same numbers."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import tyro

from steerheal.cli import merged_flags, run_main, setting_flags
from steerheal.errors import UserError, card_failed, ran_out
from steerheal.settings import Settings, from_flat, parse_assignments, preset
from steerheal.stages import Event, Store, locked
from steerheal.weights import resolve


@dataclasses.dataclass
class Args:
    """Run one steer-heal loop and print each round. Every setting is a flag: --heal.tau 0.1 is --set heal.tau=0.1."""

    model: str = "auto"
    """hub id, local folder or built-in name; auto takes gemma-3-4b-it on a CUDA card of 20 GiB or more, else the embedded
    model, smollm2-135m-instruct"""
    set: tuple[str, ...] = ()
    """settings, such as heal.tau=1.0 rounds=2 (names and values: steerheal/settings.py, or the page Settings that `make docs`
    writes)"""
    out: Path = Path("results")
    """where the run's folder, with its report, is made, and .stages, which searches there share"""
    export: Path | None = None
    """write the last round's adapter here, in PEFT's format, and the steering vector"""
    diagnose: bool = False
    """instead of a loop: overfit a few replies that enact the trait, and say whether the adapter can express it and the
    readout can see it"""


def main() -> None:
    given = setting_flags(sys.argv[1:], own=("model",))
    args = tyro.cli(Args, args=merged_flags(given, "--set"), prog="python -m steerheal.run")
    run_main(lambda: run(args))


def run(args: Args) -> int:
    overrides = parse_assignments(list(args.set))
    model, note = resolve(overrides.pop("model", args.model))
    settings = from_flat(preset(model) | overrides | {"model": model})  # refused now, before anything heavy loads
    if note:
        print(note)

    from steerheal import personas
    from steerheal.export import must_be_new

    personas.load(settings.persona)  # as early, for the same reason
    if args.export:
        must_be_new(args.export, "--export")
    from steerheal import diagnose, models
    from steerheal.single import folder_of

    folder = folder_of(args.out, settings)
    try:
        if args.diagnose:
            print(diagnose.diagnose(settings, models.load(settings), Store(args.out / ".stages", _say)).words())
            return 0
        with locked(folder / ".lock", wait=False):
            return _loop(args, settings, folder)
    except FloatingPointError as error:
        raise UserError(str(error)) from None
    except RuntimeError as error:
        if card_failed(error) and not ran_out(error):
            raise UserError(f"the card failed ({str(error).splitlines()[0]}). nvidia-smi shows whether it answers; the same "
                            f"command then replays what it has finished.") from None
        if not ran_out(error):
            raise
        raise UserError(f"out of memory ({str(error).splitlines()[0]}). `python -m steerheal.doctor --model {settings.model}` "
                        f"says which stage needs how much, and the ways out.") from None
    except BlockingIOError:
        raise UserError(f"{folder}: another process is at this very run. Wait for it, or stop it; the same command then "
                        f"replays what it has finished.") from None


def _say(event: Event, where: str = "diagnosis") -> None:
    if event.kind == "computed":
        print(f"  {where}: {event.stage}, {event.seconds:.1f} s", flush=True)
    elif event.kind == "set aside":
        print(f"  {event.note}", flush=True)


def _loop(args: Args, settings: Settings, folder: Path) -> int:
    import pandas as pd

    from steerheal import events, gates, history, models, steering
    from steerheal.display import describe
    from steerheal.export import base_name
    from steerheal.loop import HealLoop
    from steerheal.single import Single

    def record(event: Event) -> None:
        _say(event, loop.where)
        events.append(events.own(folder), 0, loop.where, event.kind, event)

    chain: tuple[str, ...] = ()
    single = Single(folder, settings)
    rows = []
    with events.session(folder, concurrent=1):
        loop = HealLoop(settings, models.load(settings), Store(args.out / ".stages", record))
        single.begin(loop)
        print(f"trait readout: {loop.baselines().trait_reason}")
        for round_ in loop.rounds():
            rows.append(round_.row())
            print(describe(pd.Series(rows[-1])))
            for gate, answer in gates.answers(rows).items():
                print(f"    {gate}  {answer}", flush=True)
            single.add(round_)
            chain = round_.chain
    print(f"ended: {loop.end}" + (f" in {loop.why}" if loop.why else ""))
    print(f"report: {single.finish(loop) / 'report.html'}")
    if args.export and chain:
        rounds = [history.from_tensors(loop.bench.stored(digest).tensors) for digest in chain]
        history.export(history.fold(rounds), args.export, base_name(settings.model), single.commit)
        vector, _ = loop.bench.vector(())
        steering.save(vector, args.export / "vector.safetensors", loop.baselines().dose_unit * settings.steer.alpha)
        print(f"adapter and round 0's vector: {args.export}")
    return 0


if __name__ == "__main__":
    main()
