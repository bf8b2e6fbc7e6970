"""python -m steerheal.pick results/SEARCH: the front as a table, and one of its members to take away or to talk to."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from steerheal.cli import run_main
from steerheal.errors import UserError

if TYPE_CHECKING:
    from steerheal.export import Member

HELP = "a number chooses a row; then export DIR, merge DIR or chat; ask TEXT asks them all; quit ends"


@dataclasses.dataclass
class Args:
    """Show a search's Pareto front; choose from it, and export, merge or try what was chosen. Several actions may be
    given; one that fails does not stop the others. Without any, on a terminal, pick asks what to do."""

    folder: Annotated[Path, tyro.conf.Positional]
    """a search's folder, such as results/pareto_tau"""
    index: int | None = None
    """row of the table to take, counted from 0"""
    min_coherence: float | None = None
    """instead of an index: the largest trait gain with at least this coherence kept"""
    export: Path | None = None
    """write the chosen adapter here, in PEFT's format, with a model card; it is chosen by --index or --min-coherence, here as
    in --merge and --chat"""
    merge: Path | None = None
    """write base + adapter here as one model, and measure it again"""
    ask: str | None = None
    """put this question to base and to every member of the front; an answer ends at 128 tokens"""
    chat: bool = False
    """talk to the chosen one; /base and /dose X compare"""


def main() -> None:
    args = tyro.cli(Args, prog="python -m steerheal.pick")
    run_main(lambda: pick(args))


def pick(args: Args) -> int:
    from steerheal import export, ledger
    from steerheal.display import front_table, make_console

    members = export.members(args.folder)
    table = ledger.read(args.folder)
    make_console().print(front_table(table, ledger.searched(table)))
    chosen = choose(members, args.index, args.min_coherence)
    if chosen:
        describe(chosen)
    wanted = [(name, value) for name in ("export", "merge", "ask", "chat") if (value := getattr(args, name))]
    if not chosen and (homeless := [name for name, _ in wanted if name != "ask"]):
        raise UserError(f"--{homeless[0]}: say of which row, with --index N or --min-coherence X.")
    if not wanted and sys.stdin.isatty() and sys.stdout.isatty():
        interact(members, chosen, lines("pick> "))
        return 0
    return max((attempt(name, str(value), members, chosen) for name, value in wanted), default=0)


def choose(members: Sequence[Member], index: int | None, min_coherence: float | None) -> Member | None:
    """The member named by an index, or by the coherence it must keep.

    Raises:
        UserError: there is no such row, or none keeps that much.
    """
    if index is not None and min_coherence is not None:
        raise UserError("--index and --min-coherence each choose a row: give one of them.")
    if index is not None:
        if not 0 <= index < len(members):
            raise UserError(f"--index {index}: allowed: 0 to {len(members) - 1}, the rows of the table.")
        return members[index]
    if min_coherence is None:
        return None
    sane = [m for m in members if m.row["coherence_kept"] >= min_coherence]
    if not sane:
        raise UserError(f"--min-coherence {min_coherence:g}: the front's best is "
                        f"{max(m.row['coherence_kept'] for m in members):.3f}.")
    return sane[0]


def describe(member: Member) -> None:
    from steerheal.display import interval

    row = member.row
    print(f"{member.name}: trait gain {interval(row)} nats, coherence kept {row['coherence_kept']:.3f}, {row['verdict']}")


def attempt(action: str, value: str, members: Sequence[Member], chosen: Member | None) -> int:
    """Do one thing; an error is told in one line. The exit code."""
    try:
        ACTIONS[action](value, members, chosen)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        print(f"error: {action}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}", file=sys.stderr)
        return 1


def interact(members: Sequence[Member], chosen: Member | None, given: Iterator[str]) -> None:
    """Obey lines such as `2`, `export DIR`, `ask TEXT`, until they end or `quit`."""
    print(HELP)
    for line in given:
        word, _, rest = line.strip().partition(" ")
        if word == "quit":
            return
        if word.isdecimal() and int(word) < len(members):
            chosen = members[int(word)]
            describe(chosen)
        elif word not in ACTIONS or (word != "chat" and not rest.strip()):
            print(HELP)
        elif word != "ask" and not chosen:
            print(f"{word}: choose a row first, by its number")
        else:
            attempt(word, rest.strip(), members, chosen)


def lines(prompt: str) -> Iterator[str]:
    """What the user types, until Ctrl-D or Ctrl-C."""
    while True:
        try:
            yield input(prompt if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return


# ---------------------------------------------------------------- actions


def _export(value: str, members: Sequence[Member], chosen: Member | None) -> None:
    from steerheal import export

    assert chosen
    export.write_adapter(chosen, Path(value))
    print(f"adapter and model card: {value}")


def _merge(value: str, members: Sequence[Member], chosen: Member | None) -> None:
    from steerheal import export

    assert chosen
    measured = export.merge(chosen, Path(value))
    print(f"merged model: {value}; measured on both forms:")
    print(measured.to_string(float_format="{:+.4f}".format))


def _ask(value: str, members: Sequence[Member], chosen: Member | None) -> None:
    from steerheal import chat_ui

    chat_ui.ask(members, value, write)


def _chat(value: str, members: Sequence[Member], chosen: Member | None) -> None:
    from steerheal import chat_ui

    assert chosen
    chat_ui.Session(chosen, write).run(lines("you> "))


def write(text: str) -> None:
    print(text, end="", flush=True)


ACTIONS: dict[str, Callable[[str, Sequence[Member], Member | None], None]] = {
    "export": _export, "merge": _merge, "ask": _ask, "chat": _chat}


if __name__ == "__main__":
    main()
