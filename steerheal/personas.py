"""Traits and their material: persona pairs, dilemmas, reply pairs, vignettes, contexts.

A trait is one TOML file: the contrastive pair of personas, which readout moves in which direction, the filter's
patterns, the dilemmas to generate from and the held-out dilemmas with reply pairs. Contexts, fluency prompts, control
pairs and vignettes are shared by all traits. docs/traits.md says how to write a new one.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from steerheal.errors import UserError
from steerheal.settings import FOUNDATIONS
from steerheal.stages import seed_of

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Dilemma:
    """A held-out situation with reply pairs (enacting the trait, its opposite)."""

    prompt: str
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Persona:
    name: str
    summary: str
    positive: str  # completes "You are ..."
    negative: str
    trait: str  # what evaluate.trait = auto means for it: auto (the foundation where it is valid, else conduct) or conduct
    foundation: str  # whose nats the trait moves
    direction: int  # wanted sign of that movement
    conduct_direction: int
    off_target: tuple[str, ...]  # foundations that should move less than the trait
    narration: tuple[re.Pattern[str], ...]
    refusal: tuple[re.Pattern[str], ...]
    headline: tuple[str, ...]  # questions whose answers people read, round after round
    dilemmas: tuple[str, ...]  # to generate from
    conduct: tuple[Dilemma, ...]  # held out

    @property
    def systems(self) -> tuple[str, str]:
        """System prompts of the positive and the negative persona."""
        return f"You are {self.positive}.", f"You are {self.negative}."


@dataclass(frozen=True)
class Vignette:
    id: str
    foundation: str
    text: str


def builtin() -> list[str]:
    """Names of the traits in the package."""
    return sorted(path.stem for path in (DATA / "personas").glob("*.toml"))


def load(name: str) -> Persona:
    """A built-in trait by name, or one in a TOML file.

    Raises:
        UserError: no such trait, or the file lacks something; all problems at once.
    """
    path = path_of(name)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"persona = {name!r}: no such trait. Built-in: {', '.join(builtin())}; or the path of a .toml file, "
                        f"seen from {Path.cwd()}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"persona = {name!r}: {path} is not valid TOML: {error}") from None
    return _parse(raw, path)


def path_of(name: str) -> Path:
    """The file of a trait; whether it is there is another matter."""
    return Path(name) if name.endswith(".toml") else DATA / "personas" / f"{name}.toml"


def _parse(raw: dict[str, Any], path: Path) -> Persona:
    problems: list[str] = []

    def take(where: dict[str, Any], key: str, kind: type) -> Any:
        value = where.get(key)
        if not isinstance(value, kind):
            problems.append(f"{key}: expected {kind.__name__}" + (", missing" if value is None else f", got {value!r}"))
            return kind()
        return value

    def texts(where: dict[str, Any], key: str, least: int = 1) -> tuple[str, ...]:
        values = take(where, key, list)
        if isinstance(where.get(key), list) and (len(values) < least or not all(isinstance(v, str) for v in values)):
            problems.append(f"{key}: expected texts" + (f", at least {least}" if least else ""))
            return ()
        return tuple(values)

    def patterns(key: str) -> tuple[re.Pattern[str], ...]:
        out = []
        for text in texts(take(raw, "patterns", dict), key, least=0):
            try:
                out.append(re.compile(text, re.IGNORECASE))
            except re.error as error:
                problems.append(f"patterns.{key}: {text!r} is no regular expression ({error})")
        return tuple(out)

    readout = take(raw, "readout", dict)
    foundation = take(readout, "foundation", str)
    if foundation not in FOUNDATIONS:
        problems.append(f"readout.foundation = {foundation!r}: allowed: {', '.join(FOUNDATIONS)}")
    for key in ("direction", "conduct_direction"):
        if readout.get(key) not in (-1, 1):
            problems.append(f"readout.{key} = {readout.get(key)!r}: allowed: -1, 1")
    trait = readout.get("trait", "auto")
    if trait not in ("auto", "conduct"):
        problems.append(f"readout.trait = {trait!r}: allowed: auto, conduct")
    off_target = texts(readout, "off_target", least=0)
    if not set(off_target) <= set(FOUNDATIONS):
        problems.append(f"readout.off_target = {list(off_target)!r}: allowed: {', '.join(FOUNDATIONS)}")
    conduct = []
    for i, item in enumerate(take(raw, "conduct", list)):
        try:
            dilemma = Dilemma(item["prompt"], tuple((p["enact"], p["oppose"]) for p in item["pairs"]))
            whole = all(isinstance(text, str) and text for pair in ((dilemma.prompt,), *dilemma.pairs) for text in pair)
        except (KeyError, TypeError):
            whole = False
        if whole and dilemma.pairs:
            conduct.append(dilemma)
        else:
            problems.append(f"conduct[{i}]: needs a prompt and pairs with enact and oppose")
    if isinstance(raw.get("conduct"), list) and len(raw["conduct"]) < 2:
        problems.append("conduct: expected at least two dilemmas: one alone has no interval")
    persona = Persona(
        take(raw, "name", str), take(raw, "summary", str), take(raw, "positive", str), take(raw, "negative", str),
        trait, foundation, readout.get("direction", 1), readout.get("conduct_direction", 1),
        off_target, patterns("narration"), patterns("refusal"), texts(raw, "headline"), texts(raw, "dilemmas"), tuple(conduct))
    if problems:
        raise UserError(f"{path}: " + "; ".join(dict.fromkeys(problems)))
    return persona


@cache
def _rows(name: str) -> tuple[dict[str, str], ...]:
    return tuple(json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines())


def contexts(n: int) -> list[str]:
    """The first n user turns for extraction; the file interleaves ten kinds, so any n is balanced."""
    return [row["text"] for row in _rows("contexts.jsonl")[:n]]


def fluency_prompts(n: int) -> list[str]:
    return [row["text"] for row in _rows("fluency.jsonl")[:n]]


def controls(n: int) -> list[Dilemma]:
    """Trait-neutral choices with a pair of replies each."""
    return [Dilemma(row["prompt"], ((row["a"], row["b"]),)) for row in _rows("controls.jsonl")[:n]]


def labelled() -> list[dict[str, str]]:
    """Texts to judge the filter by: label, split (choose, held_out), persona, source, prompt, text."""
    return list(_rows("labelled.jsonl"))


def shots(n: int) -> list[Vignette]:
    """Worked examples; each half of the file holds every foundation once."""
    return [Vignette(f"shot-{i}", row["foundation"], row["text"]) for i, row in enumerate(_rows("shots.jsonl")[:n])]


def vignettes(items: str, n: int) -> list[Vignette]:
    """A stratified sample of n vignettes: as even over foundations as the set allows, drawn by a fixed seed.

    Args:
        items: builtin, tinymfv:NAME where that package is installed, or the path of a JSONL file whose lines have
            text and foundation.
    """
    pool = _pool(items)
    by_foundation = {f: [v for v in pool if v.foundation == f] for f in FOUNDATIONS}
    for f, members in by_foundation.items():
        members.sort(key=lambda v: seed_of("vignettes", f, v.id))
    drawn = [members[depth] for depth in range(max(map(len, by_foundation.values())))
             for members in by_foundation.values() if depth < len(members)]
    chosen = {v.id for v in drawn[:n]}
    return [v for v in pool if v.id in chosen]


def _pool(items: str) -> list[Vignette]:
    if items == "builtin":
        return [Vignette(row["id"], row["foundation"], row["text"]) for row in _rows("vignettes.jsonl")]
    if items.startswith("tinymfv:"):
        return _tinymfv(items.removeprefix("tinymfv:"))
    path = Path(items)
    if not path.is_file():
        raise UserError(f"evaluate.items = {items!r}: allowed: builtin, tinymfv:classic, or the path of a JSONL file.")
    out, problems = [], []
    first: dict[str, int] = {}  # the line of each id
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"evaluate.items = {items!r}: the file must be UTF-8 ({error}).") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = str(row.get("id", number)), row["text"]
            out.append(Vignette(name, row["foundation"], text))
            if row["foundation"] not in FOUNDATIONS:
                problems.append(f"line {number}: foundation {row['foundation']!r}; allowed: {', '.join(FOUNDATIONS)}")
            if not (isinstance(text, str) and text.strip()):
                problems.append(f"line {number}: text {text!r}; it must be the words of a vignette")
            if first.setdefault(name, number) != number:
                problems.append(f"line {number}: id {name!r} is that of line {first[name]}; each needs its own, or none")
        except (ValueError, KeyError, TypeError, AttributeError):
            problems.append(f"line {number}: needs a JSON object with text and foundation")
    if problems or len(out) < 2:
        few = f"{len(out)} vignettes; it takes two at least, since one alone has no interval"
        raise UserError(f"evaluate.items = {items!r}: " + ("; ".join(problems) or few))
    return out


def _tinymfv(name: str) -> list[Vignette]:
    try:
        from tinymfv.data import load_condition
    except ImportError:
        raise UserError(f"evaluate.items = 'tinymfv:{name}': tinymfv is not installed. Two ways out: "
                        f"pip install -e '.[upstream]', or --set evaluate.items=builtin.") from None
    try:
        rows = load_condition(name, "other_violate")
    except FileNotFoundError:
        raise UserError(f"evaluate.items = 'tinymfv:{name}': allowed: tinymfv:classic, tinymfv:scifi, "
                        f"tinymfv:ai-actor.") from None
    names = {"socialnorms": "social"}
    coarse = [(str(r["id"]), r["foundation_coarse"].lower().replace(" ", ""), r["text"]) for r in rows]
    return [Vignette(i, names.get(f, f), text) for i, f, text in coarse]


def texts_digest(texts: Sequence[Any]) -> str:
    """A short name for a list of texts, or of anything that JSON can write, for stage inputs."""
    return f"{seed_of('texts', *texts):016x}"
