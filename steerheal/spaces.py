"""Finding and checking search spaces: files in `search_spaces/` or anywhere else, read without importing Ray."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import itertools
import json
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from steerheal.errors import SettingsError, UserError
from steerheal.settings import from_flat, leaves

FIELDS = {"HYPOTHESIS": str, "BASE": dict, "TRIALS": int, "COST": str}
# What measures: trials of one front must have it in common.
INSTRUMENT = ("model", "dtype", "quantise", "attention", "device", "persona", "evaluate.", "filter.ppl_gate",
              "filter.repetition_gate", "filter.soup_gate",
              # base's own completions are drawn so, and they set the gates by which fluency is judged
              "generate.max_new_tokens", "generate.temperature", "generate.top_p", "generate.top_k")
SAMPLERS = ("tpe", "nsgaii", "gp", "random", "grid")


@dataclass(frozen=True)
class Space:
    name: str
    path: Path
    hypothesis: str
    base: dict[str, Any]
    trials: int
    cost: str
    sampler: str
    module: ModuleType

    def distributions(self) -> dict[str, Any]:
        """The searched settings as Optuna distributions. Choices that are lists become JSON text (see `decoded`).

        Raises:
            UserError: an unknown setting, a domain that Optuna cannot search, or one that reaches a forbidden value.
        """
        from optuna.distributions import CategoricalDistribution

        if hasattr(self.module, "points"):
            points = self.points()
            out: dict[str, Any] = {name: CategoricalDistribution(list(dict.fromkeys(p[name] for p in points)))
                                   for name in points[0]}
        else:
            out = self._converted(self._call("domains", dict))
        unknown = [name for name in out if name not in leaves()]
        problems = [f"{self._at(name)}{name}: no such setting" for name in unknown]
        problems += [f"{self._at(name)}{name} belongs to how trials are measured, so those that differ in it cannot stand "
                     f"on one front: one search for each value (--set {name}=VALUE --name OTHER)"
                     for name in out if name not in unknown and name.startswith(INSTRUMENT)]
        for name, dist in out.items():
            if name in unknown:
                continue
            for value in dist.choices if isinstance(dist, CategoricalDistribution) else (dist.low, dist.high):
                try:
                    from_flat(self.base | {name: decoded(value)})
                except SettingsError as error:  # what lies between two searched settings only a proposal can tell
                    problems += [f"{self._at(name)}" + (p if p.startswith(name) else f"{name} = {value!r}: {p}")
                                 for p in error.problems if not any(f"{other} =" in p for other in out if other != name)]
        if problems:
            raise UserError(f"search space {self.name}: {self.path}: " + "; ".join(problems))
        return out

    def points(self) -> list[dict[str, Any]]:
        """The proposals of sampler grid, in order: the file's own `points()`, else the product of its choices.

        Raises:
            UserError: a domain is not a choice, or points() gives dicts of different settings.
        """
        from optuna.distributions import CategoricalDistribution

        if hasattr(self.module, "points"):
            points = [{k: _encoded(v) for k, v in p.items()} for p in self._call("points", list)]
            if not points or any(p.keys() != points[0].keys() for p in points):
                raise UserError(f"search space {self.name}: {self.path}: {self._at('points')}points() must give at least "
                                f"one dict, and all dicts the same settings")
            return points
        domains = self.distributions()
        open_ = [name for name, dist in domains.items() if not isinstance(dist, CategoricalDistribution)]
        if open_:
            raise UserError(f"--sampler grid: {', '.join(open_)} of space {self.name} is a range; a grid needs "
                            f"tune.choice. Allowed here: {', '.join(s for s in SAMPLERS if s != 'grid')}.")
        return [dict(zip(domains, values)) for values in itertools.product(*(d.choices for d in domains.values()))]

    def _converted(self, domains: dict[str, Any]) -> dict[str, Any]:
        from ray.tune.search.optuna import OptunaSearch
        from ray.tune.search.sample import Categorical, Domain

        bare = [f"{self._at(name)}{name} = {value!r} is no domain: tune.choice([...]) searches values, BASE fixes one"
                for name, value in domains.items() if not isinstance(value, (Domain, dict))]
        if bare:
            raise UserError(f"search space {self.name}: {self.path}: " + "; ".join(bare))
        for domain in domains.values():
            if isinstance(domain, Categorical):
                domain.categories = [_encoded(value) for value in domain.categories]
        try:
            return OptunaSearch.convert_search_space(domains)
        except ValueError as error:
            raise UserError(f"search space {self.name}: {self.path}: {self._at('domains')}domains(): {error} Use "
                            f"tune.choice, uniform, loguniform, randint and their like; SAMPLER = \"grid\" for a "
                            f"grid.") from None

    def _call(self, function: str, kind: type) -> Any:
        try:
            out: Any = getattr(self.module, function)()
        except Exception as error:
            raise _unreadable(self.name, self.path, error) from error
        dicts = out if isinstance(out, list) else [out]
        if not isinstance(out, kind) or not all(isinstance(d, dict) and all(isinstance(k, str) for k in d) for d in dicts):
            raise UserError(f"search space {self.name}: {self.path}: {self._at(function)}{function}() must return "
                            + ("a dict of domains" if kind is dict else "a list of dicts") + ", by the names of settings")
        odd = [f"{self._at(k)}{k} = {v!r}" for d in dicts for k, v in d.items() if kind is list and isinstance(v, (dict, set))]
        if odd:
            raise UserError(f"search space {self.name}: {self.path}: {'; '.join(odd)}: must be a value of the setting")
        return out

    def _at(self, word: str) -> str:
        return _line_of(self.path, word)


def decoded(value: Any) -> Any:
    """A proposal's value as the setting's: lists travel as JSON text, because a study holds only plain values."""
    return json.loads(value) if isinstance(value, str) and value.startswith("[") else value


def _encoded(value: Any) -> Any:
    return json.dumps(list(value)) if isinstance(value, (list, tuple)) else value


def names() -> list[str]:
    return sorted(p.stem for p in _folder().glob("*.py") if not p.stem.startswith("_"))


def _folder() -> Path:
    import search_spaces

    return Path(search_spaces.__path__[0])


def load(name: str) -> Space:
    """One space, by the name of a file in search_spaces/ or by a path that ends in .py.

    Raises:
        UserError: no such space, or a broken file, with the lines at fault and what is wrong there.
    """
    path = Path(name).absolute() if name.endswith(".py") else _folder() / f"{name}.py"
    if not path.is_file():
        if name.endswith(".py"):
            raise UserError(f"search space {name}: no such file")
        near = difflib.get_close_matches(name, names(), n=1)
        raise UserError(f"search space {name!r}: no such space" + (f"; did you mean {near[0]}?" if near else ".") +
                        f" Allowed: {', '.join(names())}. `--list` describes them; --space PATH.py takes a file.")
    spec = importlib.util.spec_from_file_location(f"search_spaces.{path.stem}", path)
    assert spec is not None and spec.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _unreadable(path.stem, path, error) from error
    problems = [f"{_line_of(path, field)}{field} " + ("is missing" if not hasattr(module, field) else
                f"= {getattr(module, field)!r}: must be {kind.__name__}")
                for field, kind in FIELDS.items() if type(getattr(module, field, None)) is not kind]
    if type(getattr(module, "TRIALS", None)) is int and module.TRIALS < 1:
        problems.append(f"{_line_of(path, 'TRIALS')}TRIALS = {module.TRIALS}: must be at least 1")
    if not any(callable(getattr(module, f, None)) for f in ("domains", "points")):
        problems.append("domains() is missing")
    base = getattr(module, "BASE", None)
    try:
        from_flat(base if isinstance(base, dict) else {})
    except SettingsError as error:
        problems += [f"{_line_of(path, p.split(':')[0].split(' ')[0])}BASE: {p}" for p in error.problems]
    sampler = getattr(module, "SAMPLER", "grid" if hasattr(module, "points") else "tpe")
    if sampler not in SAMPLERS:
        problems.append(f"{_line_of(path, 'SAMPLER')}SAMPLER = {sampler!r}: allowed: {', '.join(SAMPLERS)}")
    if problems:
        raise UserError(f"search space {path.stem}: {path}: " + "; ".join(problems))
    return Space(path.stem, path, module.HYPOTHESIS, dict(module.BASE), module.TRIALS, module.COST, sampler, module)


def _unreadable(name: str, path: Path, error: BaseException) -> UserError:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
    return UserError(f"search space {name}: {path} cannot be read" + (f", line {line}" if line else "") +
                     f": {type(error).__name__}: {getattr(error, 'msg', error)}")


def _line_of(path: Path, word: str) -> str:
    """ "line N: " of the assignment, function or quoted name `word` in a file; nothing where it is not there."""
    for node in ast.walk(ast.parse(path.read_text())):
        found = ((isinstance(node, ast.Name) and node.id == word and isinstance(node.ctx, ast.Store))
                 or (isinstance(node, ast.FunctionDef) and node.name == word)
                 or (isinstance(node, ast.Constant) and node.value == word))
        if found:
            return f"line {node.lineno}: "  # type: ignore[attr-defined]
    return ""
