"""A benchmark's command line: what it says of itself, and the parameters of its function as flags."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import tyro

from steerheal.cli import run_main


def command(measure: Callable[..., int]) -> None:
    """Run `measure` with the arguments of the command line; its module's docstring is the help."""
    module = inspect.getmodule(measure)
    text = (module and module.__doc__) or ""
    run_main(lambda: tyro.cli(measure, prog=" ".join(text.split()[:3]).rstrip(":"), description=text,
                              config=(tyro.conf.FlagCreatePairsOff,)))
