"""The reference is complete: every setting, flag, stage, space and ledger column is described, and nothing else is."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import optuna
import pandas as pd
import pytest
from conftest import TINY, make_lm

from steerheal import ledger, spaces
from steerheal.loop import HealLoop
from steerheal.settings import from_flat, leaves, to_flat
from steerheal.stages import VERSIONS, Store

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "reference" / "tables.py")
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)


def cells(markdown):
    """The rows of all tables of a page, without their headings: lists of plain cells."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in markdown.splitlines() if line.startswith("|")]
    rule = [i for i, row in enumerate(rows) if set("".join(row)) <= set("- ")]
    return [[re.sub(r"[`\\]", "", cell).strip() for cell in row] for i, row in enumerate(rows)
            if i not in rule and i + 1 not in rule]


def test_every_setting_is_there_once_with_default_and_meaning():
    rows = cells(tables.settings_table())
    assert [row[0] for row in rows] == list(leaves())
    defaults = {k: tables._json(v) for k, v in to_flat(from_flat({})).items()}
    assert {row[0]: row[1] for row in rows} == defaults
    for name, _, allowed, identity, meaning in rows:
        assert allowed and meaning, name
        assert identity == ("yes" if leaves()[name].metadata["identity"] else "no")


@pytest.mark.parametrize("module", tables.COMMANDS)
def test_flags_are_those_of_help(module):
    done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    offered = set(re.findall(r"^│ (?:-h, )?(--[a-z-]+)", done.stdout, re.M)) - {"--help"}
    listed = {flag for flag, _, _ in tables.flags(ROOT / tables.COMMANDS[module])[1]}
    assert {f.replace("--no-", "--") for f in offered} == {f for f in listed if f.startswith("--")}
    assert all(meaning for _, _, meaning in tables.flags(ROOT / tables.COMMANDS[module])[1])


def test_every_stage_is_described():
    assert {row[0]: int(row[1]) for row in cells(tables.stages_table())} == VERSIONS
    assert set(tables.STAGES) == set(VERSIONS)


@pytest.mark.parametrize("name", spaces.names())
def test_every_space_shows_what_it_searches(name):
    space = spaces.load(name)
    assert [setting for setting, _ in tables.domains(space)] == list(space.distributions())
    assert f"\n## {name}\n" in tables.spaces_table() and space.hypothesis in tables.spaces_table()


def test_pages_ask_for_every_table():
    asked = [name for page in (ROOT / "docs").rglob("*.md") for name in re.findall(r"<!-- table: (\w+) -->", page.read_text())]
    assert sorted(asked) == sorted(tables.TABLES)
    assert tables.on_page_markdown("a\n<!-- table: stages -->\nb") == f"a\n{tables.stages_table()}\nb"


def messages():
    """Every text in the sources, the parts of an f-string in order; the Makefile; the settings' names."""
    out = [(ROOT / "Makefile").read_text(), *leaves()]
    for path in [p for folder in ("steerheal", "analysis", "trainables") for p in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                out.append("\0".join(v.value if isinstance(v, ast.Constant) else "" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                out.append(node.value)
    return "\n".join(out)


def test_troubleshooting_quotes_messages_that_exist():
    texts = messages()
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = [text for row in re.findall(r"^\| (.*?) \|", page, re.M) for text in re.findall(r"`(.*?)`", row)]
    assert len(quoted) > 50
    missing = [text for text in quoted for part in text.split("...") if part.strip(" :;?") not in texts]
    assert not missing


def described():
    """The names that docs/reference/ledger.md describes, by heading."""
    parts = (ROOT / "docs" / "reference" / "ledger.md").read_text().split("\n## ")
    return {part.splitlines()[0]: [row[0] for row in cells(part)] for part in parts[1:]}


def with_intervals(names):
    return [name + end for name in names for end in ("", "_low", "_high")]


def test_every_column_of_a_ledger_is_described_and_nothing_else(first):
    study = optuna.create_study(directions=["maximize"] * 2)
    loop = HealLoop(from_flat(TINY), make_lm(), Store(first[0]))
    trial = study.ask({"heal.tau": optuna.distributions.FloatDistribution(0.0, 1.0)})
    trial.set_user_attr("index", 0)
    trial.set_user_attr("rounds", [round_.row() for round_ in loop.rounds()])
    page = described()
    readouts = page["Readouts"]
    steered = [f"steered_{name}" for name in readouts if name not in ("fluency", "json_is_valid")]
    names = {*page["Columns"], *with_intervals([*page["Columns with an interval"], *readouts, *steered])}
    table = ledger.build(study)
    assert set(table) == names | set(ledger.searched(table))

    baselines = pd.DataFrame(loop.baselines().rows())
    assert set(baselines) - set(with_intervals(["trait_gain", *readouts])) == {
        "label", "edge_doses", "coherence_kept", "fluency_kept", "edge", "diary", "stages"}
