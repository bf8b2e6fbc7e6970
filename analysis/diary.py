"""python -m analysis.diary results/SEARCH: one prompt down the rounds of the front's trials.

Base, then in each round the steered and the healed student, as diary.md, diary.html and diary.csv. Generations are
greedy, so that only the weights and the steering differ. The texts are model output: escaped in both formats.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated

import pandas as pd
import tyro

from analysis import page
from steerheal import ledger
from steerheal.cli import run_main
from steerheal.display import interval
from steerheal.errors import UserError
from steerheal.objectives import VERDICTS
from steerheal.stages import atomic_write


@dataclasses.dataclass
class Args:
    """One prompt down the rounds of the front's trials."""

    folder: Annotated[Path, tyro.conf.Positional]
    """a search's folder, such as results/pareto_tau"""
    prompt: int = 0
    """which of the persona's headline prompts, counted from 0"""


@dataclasses.dataclass
class Entry:
    """One generation: of the steered or the healed student of a round."""

    round: int
    state: str
    text: str
    words: str  # what the ledger says of it

    @property
    def heading(self) -> str:
        return f"Round {self.round}, {self.state}"


@dataclasses.dataclass
class Column:
    """One trial of the front, down its rounds."""

    trial: int
    params: str
    entries: list[Entry]


@dataclasses.dataclass
class Data:
    name: str
    prompt: str
    base: str
    trials: list[Column]
    rows: pd.DataFrame  # what is shown, as `records.diary` gives it


def data(folder: Path, prompt: int = 0) -> Data:
    """The diary of one of the persona's headline prompts.

    Raises:
        UserError: no ledger, no deliverable round, no recorded generations, or no such prompt.
    """
    table = ledger.read(folder)
    from steerheal import records  # which reads the stage store, and so loads torch

    rows = records.diary(folder)
    if rows.empty:
        raise UserError(f"{folder}: no generations on the persona's headline prompts are recorded.")
    prompts = list(dict.fromkeys(rows["prompt"]))
    if not 0 <= prompt < len(prompts):
        raise UserError(f"--prompt {prompt}: allowed: 0 to {len(prompts) - 1}, the persona's headline prompts.")
    rows = rows[rows["prompt"] == prompts[prompt]]
    base = rows[rows["state"] == "base"]
    chosen = list(dict.fromkeys(ledger.front(table)["trial"]))
    rows = pd.concat([base.head(1), rows[rows["trial"].isin(chosen) & (rows["state"] != "base")]])
    return Data(folder.name, prompts[prompt], next(iter(base["text"]), "(not recorded)"),
                [_column(table, rows, t) for t in chosen], rows)


def _column(table: pd.DataFrame, rows: pd.DataFrame, trial: int) -> Column:
    rounds = table[table["trial"] == trial].set_index("round")
    entries = []
    own = rows[(rows["trial"] == trial) & (rows["state"] != "base")]
    for _, row in own.sort_values(["round", "state"], ascending=[True, False]).iterrows():  # steered, then healed
        measured = rounds.loc[row["round"]]
        if row["state"] == "steered":
            words = (f"trait gain {measured['steered_gain']:+.3f} nats, coherence kept "
                     f"{measured['steered_coherence_kept']:.3f}")
        else:
            words = (f"trait gain {interval(measured)} nats, coherence kept {measured['coherence_kept']:.3f}, "
                     f"{measured['verdict']}: {VERDICTS[measured['verdict']]}")
        entries.append(Entry(int(row["round"]), row["state"], row["text"], words))
    return Column(int(trial), parameters(table, rounds.iloc[0]), entries)


def parameters(table: pd.DataFrame, row: pd.Series) -> str:
    """The searched settings of a trial, as `heal.tau = 0.1, heal.lam = 1`."""
    return ", ".join(f"{c} = {row[c]:.3g}" if isinstance(row[c], float) else f"{c} = {row[c]}"
                     for c in ledger.searched(table))


def html(d: Data) -> str:
    return page.render("diary.html", title=f"{d.name}: diary", d=d)


def markdown(d: Data) -> str:
    """The same as Markdown; nothing a model wrote is markup in it."""
    out = [f"# {plain(d.name)}: diary", "", f"**Prompt:** {plain(d.prompt)}", "", "## Base, before any steering", "",
           quoted(d.base)]
    for column in d.trials:
        out += ["", f"## Trial {column.trial}", "", plain(column.params)]
        for e in column.entries:
            out += ["", f"### {e.heading}", "", plain(e.words), "", quoted(e.text)]
    return "\n".join(out) + "\n"


def plain(text: str) -> str:
    """Text whose marks mean nothing to Markdown, HTML tags included."""
    return re.sub(r"([\\`*_\[\]<>&#|~!])", r"\\\1", text)


def quoted(text: str) -> str:
    """A block quotation that keeps the line breaks."""
    lines = [re.sub(r"^(\s*)([-+=])", r"\1\\\2", plain(line)) for line in text.splitlines()]
    return "\n".join(f"> {line}\\" for line in lines).removesuffix("\\") or ">"


def write(folder: Path, prompt: int = 0) -> None:
    """diary.md, diary.html and diary.csv in a search's folder."""
    d = data(folder, prompt)
    for name, text in (("diary.md", markdown(d)), ("diary.html", html(d)), ("diary.csv", d.rows.to_csv(index=False))):
        atomic_write(folder / name, text.encode())


def main() -> None:
    args = tyro.cli(Args, prog="python -m analysis.diary")

    def action() -> int:
        write(args.folder, args.prompt)
        print(f"{args.folder / 'diary.md'}, .html and .csv")
        return 0

    run_main(action)


if __name__ == "__main__":
    main()
