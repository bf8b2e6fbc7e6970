"""What a search is: everything that decides its results, written down as search.json in its folder.

Resuming is the same command again. Overrides need not be repeated; an override that differs from what is written down
is refused, field by field, because a search whose settings changed half-way would compare unlike trials.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerheal import __version__, personas, spaces, weights
from steerheal.errors import UserError
from steerheal.settings import Settings, from_flat, identity, preset, to_flat
from steerheal.stages import VERSIONS, atomic_write

PACKAGES = ("torch", "transformers", "peft", "ray", "optuna", "numpy", "bitsandbytes")


@dataclass
class Plan:
    """One search, ready to start or to go on."""

    name: str
    folder: Path
    space: spaces.Space
    settings: Settings  # of every trial, but for the searched parameters
    overrides: dict[str, Any]
    sampler: str
    halving: bool
    seed: int
    trials: int
    store: Path  # of the stages, shared by all searches in one place
    notes: list[str]  # sentences the user should see
    resumed: bool
    commit: str = ""  # of a hub model: known once it is fetched, and kept from then on

    def identity(self) -> dict[str, Any]:
        """Every field that decides a result, flat."""
        domains = {f"domain of {k}": repr(v) for k, v in self.space.distributions().items()}
        # "--seed", because `seed` is the run seed
        head: dict[str, Any] = {"space": self.space.name, "sampler": self.sampler, "--seed": self.seed}
        if self.halving:
            head["--halving"] = True
        if self.sampler == "grid":
            head["points"] = self.space.points()
        return head | domains | versions() | identity(self.settings) | contents(self.settings)

    def write(self) -> None:
        path = self.folder / "search.json"
        old = read(self.folder) if path.exists() else {}
        body = dict(
            name=self.name, space=self.space.name, hypothesis=self.space.hypothesis, model=self.settings.model,
            overrides=self.overrides,
            sampler=self.sampler, halving=self.halving, seed=self.seed, trials=self.trials, identity=self.identity(),
            settings=to_flat(self.settings), commit=self.commit,
            created=old.get("created", time.strftime("%Y-%m-%d %H:%M:%S")),
            **environment())
        atomic_write(path, json.dumps(body, indent=2).encode())


def versions() -> dict[str, int]:
    """Of the code that results come from, as fields of an identity."""
    return {f"version of stage {k}": v for k, v in VERSIONS.items()}


def contents(settings: Settings) -> dict[str, str]:
    """Hashes of the files that settings name: an edited one is another instrument, other weights are another base.

    Raises:
        UserError: one of them is not there.
    """
    persona, items = settings.persona, settings.evaluate.items
    named = {"persona": personas.path_of(persona)}
    if not items.startswith("tinymfv:"):
        named["evaluate.items"] = personas.DATA / "vignettes.jsonl" if items == "builtin" else Path(items)
    if not named["persona"].is_file():
        personas.load(persona)  # says what is allowed
    if missing := [field for field, path in named.items() if not path.is_file()]:
        raise UserError(f"{missing[0]} = {str(named[missing[0]])!r}: no such file, seen from {Path.cwd()}.")
    local = weights.is_local(settings.model)
    model = {"content of model": weights.weights_digest(weights.locate(settings.model))[:16]} if local else {}
    return model | {f"content of {field}": hashlib.sha256(path.read_bytes()).hexdigest()[:16]
                    for field, path in named.items()}


def environment() -> dict[str, dict[str, str]]:
    """Versions, and the machine: what the speed of a search and the last bits of its numbers depend on."""
    memory, card = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, weights.cuda_memory_gb()
    return dict(
        versions=dict(steerheal=__version__, python=platform.python_version(), **_versions()),
        machine=dict(system=platform.platform(), cores=str(os.cpu_count()), memory=f"{memory:.0f} GB",
                     device=f"CUDA card, {card:.0f} GB" if card else "CPU"))


def _versions() -> dict[str, str]:
    installed = {d.metadata["Name"].lower() for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return {p: importlib.metadata.version(p) for p in PACKAGES if p in installed}


def make(space_name: str, *, name: str | None, out: Path, model: str | None, overrides: dict[str, Any],
         trials: int | None, rounds: int | None, sampler: str | None, seed: int | None, halving: bool = False,
         fresh: bool = False) -> Plan:
    """The plan of a command line: a new search, or the one its folder already holds.

    Args:
        fresh: plan as if the folder held nothing.

    Raises:
        UserError: unknown space or settings, or a resume that differs from what the folder holds.
    """
    space = spaces.load(space_name)
    name = name or space.name
    folder = (out / name).absolute()
    stored = None if fresh or not (folder / "search.json").exists() else read(folder)
    if stored is not None and not {"identity", "model", "overrides"} <= stored.keys():
        raise UserError(f"{folder / 'search.json'} is not whole. --restart moves the folder aside and starts anew; the stage "
                        f"store makes that cheap.")
    if model is not None:
        overrides = overrides | {"model": model}
    if rounds is not None:
        overrides = overrides | {"rounds": rounds}
    chosen_model, note = weights.resolve(
        overrides.get("model") or (stored or {}).get("model") or space.base.get("model", "auto"))
    asked = (stored or {}).get("overrides", {}) | overrides | {"model": chosen_model}
    space = dataclasses.replace(space, base=preset(chosen_model) | space.base | asked)  # what its domains must agree with
    settings = from_flat(space.base)
    searched = set(space.distributions())
    fixed = sorted(searched & set(asked))
    if fixed:
        raise UserError(f"--set {', '.join(fixed)}: the space {space.name} searches this setting, so it cannot be fixed. "
                        f"Leave it out, or write a space of your own in search_spaces/.")
    plan = Plan(name, folder, space, settings, {k: v for k, v in asked.items() if k != "model"},
                sampler or (stored or {}).get("sampler", space.sampler), halving or (stored or {}).get("halving", False),
                seed if seed is not None else (stored or {}).get("seed", 0),
                trials or (stored or {}).get("trials", space.trials), out.absolute() / ".stages",
                [note] if note else [], stored is not None, (stored or {}).get("commit", ""))
    if plan.sampler == "grid" and plan.trials > (points := len(space.points())):
        raise UserError(f"--trials {plan.trials}: the grid of {space.name} has {points} points. --sampler "
                        f"random draws as many as you like.")
    if stored is not None:
        _refuse_changes(plan, stored)
        plan.notes = [] if overrides.get("model") != "auto" else plan.notes
    return plan


def read(folder: Path) -> dict[str, Any]:
    """search.json, as `Plan.write` or `single.Single` wrote it.

    Raises:
        UserError: the folder holds none, or it is damaged.
    """
    path = folder / "search.json"
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        there = ", ".join(sorted(p.parent.name for p in folder.parent.glob("*/search.json"))) or "none"
        raise UserError(f"{folder} holds no search (search.json is missing). Searches beside it: {there}.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). The command that made the search, with --restart, moves the folder "
                        f"aside and starts anew; the stage store makes that cheap.") from None


def _refuse_changes(plan: Plan, stored: dict[str, Any]) -> None:
    old, new = stored["identity"], json.loads(json.dumps(plan.identity()))
    changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    if changed:
        lines = "\n".join(f"  - {k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in changed)
        raise UserError(f"{plan.folder} holds a search with other settings:\n{lines}\n"
                        f"Ways out: --name OTHER starts a new search (what both have in common is not computed again); "
                        f"--restart moves the old folder aside.")
