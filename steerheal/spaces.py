"""Finding and checking search spaces: files in `search_spaces/`, read without importing Ray."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from steerheal.errors import UserError
from steerheal.settings import leaves


@dataclass(frozen=True)
class Space:
    name: str
    hypothesis: str
    base: dict[str, Any]
    trials: int
    cost: str
    module: ModuleType

    def distributions(self) -> dict[str, Any]:
        """The searched settings as Optuna distributions.

        Raises:
            UserError: domains() names an unknown setting or a domain Optuna cannot search.
        """
        from ray.tune.search.optuna import OptunaSearch

        domains = self.module.domains()
        unknown = [name for name in domains if name not in leaves()]
        if unknown:
            raise UserError(f"search space {self.name}: no such setting: {', '.join(unknown)}")
        try:
            return OptunaSearch.convert_search_space(domains)
        except ValueError as error:
            raise UserError(f"search space {self.name}: {error}") from None


def names() -> list[str]:
    import search_spaces

    return sorted(m.name for m in pkgutil.iter_modules(search_spaces.__path__))


def load(name: str) -> Space:
    """One space by name.

    Raises:
        UserError: no such space, or a broken file, with what it lacks.
    """
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise UserError(f"search space {name!r}: no such space" + (f"; did you mean {near[0]}?" if near else "") +
                        f" Allowed: {', '.join(known)}. `--list` describes them.")
    try:
        module = importlib.import_module(f"search_spaces.{name}")
    except Exception as error:
        line = getattr(error, "lineno", None)
        raise UserError(f"search space {name}: search_spaces/{name}.py cannot be read"
                        + (f", line {line}" if line else "") + f": {type(error).__name__}: {error}") from error
    wanted = dict(HYPOTHESIS=str, BASE=dict, TRIALS=int, COST=str)
    problems = [f"{field} must be a {kind.__name__}" for field, kind in wanted.items()
                if not isinstance(getattr(module, field, None), kind)]
    if not callable(getattr(module, "domains", None)):
        problems.append("domains() is missing")
    problems += [f"BASE: no such setting {key!r}" for key in getattr(module, "BASE", {}) if key not in leaves()]
    if problems:
        raise UserError(f"search space {name}: search_spaces/{name}.py: " + "; ".join(problems))
    return Space(name, module.HYPOTHESIS, dict(module.BASE), module.TRIALS, module.COST, module)
