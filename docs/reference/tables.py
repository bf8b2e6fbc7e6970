"""The tables of the reference, made from the source whenever the site is built (a MkDocs hook).

A page asks for one with `<!-- table: NAME -->`. Command lines and domains are read from their syntax trees, and only modules
that import nothing heavy are imported: building the site needs neither torch nor Ray.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # MkDocs runs without the package installed

from steerheal import settings, spaces, stages  # noqa: E402

COMMANDS = {
    "steerheal.search": "steerheal/search.py", "steerheal.run": "steerheal/run.py", "steerheal.pick": "steerheal/pick.py",
    "steerheal.doctor": "steerheal/doctor/__main__.py", "steerheal.clean": "steerheal/clean.py",
    "analysis.diary": "analysis/diary.py",
}

STAGES = {
    "round": "no stage, but the code that makes a round of them: walk-C, verdicts, intervals, columns",
    "vector": "per layer, the mean difference of last-token states under the persona pair, from the current student",
    "states": "the student's mean states under the neutral system prompt, behind `cos_student`",
    "kl_dose": "the raw dose that `steer.target_kl` asks for (`steer.unit=kl` alone)",
    "completions": "token ids and texts of one probe or batch, with the dose of each row",
    "scores": "what the filter measured on each of them",
    "log_ratio": "nats per token by which the steered student finds the kept completions likelier than base does",
    "heal": "one round's LoRA factors; losses, D, gradient norms, duty, validation NLL",
    "diary": "greedy answers to the persona's headline prompts",
    "foundations": "log-probabilities of the seven answers, for each vignette and frame",
    "conduct": "nats of enacting over opposing replies, and of the control pairs",
    "fluency": "which free generations pass the gates",
    "free_answers": "which free answers hold JSON that names a foundation",
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this for each page. A table of an unknown name fails the build."""
    return re.sub(r"<!-- table: (\w+) -->", lambda found: TABLES[found[1]](), markdown)


# ---------------------------------------------------------------- settings


def settings_table() -> str:
    """Every setting in groups: name, default, allowed values, whether it is identity, meaning."""
    out, group = [], None
    for name, f in settings.leaves().items():
        if (here := name.rpartition(".")[0]) != group:
            group = here
            out.append(f"\n## {group or 'The run'}\n\n" + _row("setting", "default", "allowed", "identity", "meaning")
                       + _row(*["---"] * 5))
        out.append(_row(f"`{name}`", f"`{_json(f.default)}`", _allowed(f), "yes" if f.metadata["identity"] else "no",
                        _plain(f.metadata["help"])))
    return "".join(out)


def presets_table() -> str:
    """Defaults that differ from the general ones, by model."""
    general = {name: f.default for name, f in settings.leaves().items()}
    out = [_row("model", "setting", "general default", "default of this model"), _row(*["---"] * 4)]
    out += [_row(model, f"`{name}`", f"`{_json(general[name])}`", f"`{_json(value)}`")
            for model, preset in settings.PRESETS.items() for name, value in preset.items()]
    return "".join(out)


def _allowed(f: dataclasses.Field) -> str:
    meta = f.metadata
    if "allowed" in meta:
        return ", ".join(f"`{_json(value)}`" for value in meta["allowed"])
    if "low" in meta:
        low, high = (f"{bound:g}" if isinstance(bound, float) else str(bound) for bound in (meta["low"], meta["high"]))
        up_to = "" if math.isinf(meta["high"]) else f" and at most {high}"
        return ("whole, " if f.type == "int" else "") + ("above " if meta["open_low"] else "at least ") + low + up_to
    return {"bool": "`true`, `false`", "str": "text"}.get(str(f.type), "list of numbers")


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# ---------------------------------------------------------------- commands


def commands_table() -> str:
    """Every command line that is a dataclass `Args`: its purpose, and its flags in order."""
    out = []
    for module, path in COMMANDS.items():
        purpose, rows = flags(ROOT / path)
        out += [f"\n## python -m {module}\n\n{purpose}\n\n", _row("flag", "default", "meaning"), _row(*["---"] * 3)]
        out += [_row(f"`{flag}`", f"`{default}`" if default else "", text) for flag, default, text in rows]
    return "".join(out)


def flags(path: Path) -> tuple[str, list[tuple[str, str, str]]]:
    """(purpose, [(flag or positional, default, meaning)]) of a file's `Args`, from its docstrings."""
    args = next(n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == "Args")
    rows = []
    for node, text in zip(args.body, args.body[1:]):
        if isinstance(node, ast.AnnAssign) and isinstance(text, ast.Expr):
            kind, field = ast.unparse(node.annotation), ast.unparse(node.target)
            named = re.search(r"name='(\w+)'", kind)
            name = (named[1] if named else field).replace("_", "-")
            value = ast.unparse(node.value).strip("'") if node.value else ""
            default = re.sub(r"^(?:None|False|\(\)|Path\('(.*)'\))$", r"\1", value)
            shown = name.upper() if "Positional" in kind else f"--{name}"
            rows.append((shown, default, _sentence(ast.literal_eval(text.value))))
    return _sentence(ast.get_docstring(args) or ""), rows


def _sentence(text: str) -> str:
    return _plain(" ".join(text.split()))


# ---------------------------------------------------------------- stages and spaces


def stages_table() -> str:
    """Every stage: name, version, what it holds."""
    rows = [_row(f"`{name}`", version, STAGES[name]) for name, version in stages.VERSIONS.items()]
    return _row("stage", "version", "holds") + _row(*["---"] * 3) + "".join(rows)


def spaces_table() -> str:
    """Every search space that comes along: hypothesis, budget, searched settings, base settings."""
    out = []
    for name in spaces.names():
        space = spaces.load(name)
        out += [f"\n## {name}\n\n{(space.module.__doc__ or '').strip()}\n\n> {space.hypothesis}\n\n"
                f"Trials: {space.trials}. Sampler: `{space.sampler}`. Cost: {space.cost}.\n\n",
                _row("setting", "searched", "base"), _row(*["---"] * 3)]
        out += [_row(f"`{setting}`", f"`{domain}`", "") for setting, domain in domains(space)]
        out += [_row(f"`{setting}`", "", f"`{_json(value)}`") for setting, value in space.base.items()]
    return "".join(out)


def domains(space: spaces.Space) -> Iterable[tuple[str, str]]:
    """(setting, domain as the file writes it) of what a space searches; the values of a list of points."""
    if hasattr(space.module, "points"):
        points = space.module.points()
        for name in points[0]:
            yield name, ", ".join(dict.fromkeys(_json(p[name]) for p in points))
        return
    found = next(node for node in ast.walk(ast.parse(space.path.read_text())) if isinstance(node, ast.Return))
    assert isinstance(found.value, ast.Dict)
    for key, value in zip(found.value.keys, found.value.values):
        yield ast.literal_eval(key), ast.unparse(value)


def _plain(text: str) -> str:
    """Text that is no Markdown, for Markdown."""
    return re.sub(r"([*<])", r"\\\1", text)


def _row(*cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |\n"


TABLES = {"settings": settings_table, "presets": presets_table, "commands": commands_table, "stages": stages_table,
          "spaces": spaces_table}
