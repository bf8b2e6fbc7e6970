"""What stands in the way on this machine, and the way out of each failure.

`machine` looks at Python, torch, the card, disk and memory; `model` at the hub, the tokenizer and the memory a model
needs; `probe` runs every stage once, small, and says what a search would cost. `cheap` is what a search asks first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from steerheal.errors import UserError
from steerheal.settings import Settings


@dataclass
class Finding:
    ok: bool
    what: str
    found: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'}  {self.what:12} " + self.found.replace("\n", "\n" + " " * 19)


Check = tuple[str, Callable[[], str]]  # a check returns what it found, or raises UserError with the way out


def findings(checks: list[Check]) -> Iterator[Finding]:
    for what, check in checks:
        try:
            yield Finding(True, what, check())
        except UserError as error:
            yield Finding(False, what, str(error))
            if what == "access":
                return  # what follows looks into the model


def checks(settings: Settings, trials: int, results: Path, concurrent: int = 1) -> list[Check]:
    """Everything that costs no computing, in the order in which a run would fail on it. The card is never touched."""
    from steerheal.doctor import machine, model

    return [
        ("python", machine.python), ("torch", lambda: machine.torch_build(settings)), ("card", lambda: machine.card(settings)),
        ("4-bit", lambda: machine.bitsandbytes(settings)), ("memory", machine.memory),
        ("shared mem", machine.shared_memory), ("persona", lambda: model.persona(settings)),
        ("items", lambda: model.items(settings)),
        ("access", lambda: model.access(settings)), ("disk", lambda: machine.disk(settings, trials, results)),
        ("fits", lambda: model.fits(settings, concurrent)),
    ]


def cheap(settings: Settings, trials: int, results: Path, concurrent: int = 1) -> None:
    """Raise one UserError with everything that would fail later.

    Raises:
        UserError: one line per failed check.
    """
    failed = [f"{f.what}: {f.found}" for f in findings(checks(settings, trials, results, concurrent)) if not f.ok]
    if failed:
        raise UserError("this search would fail here (python -m steerheal.doctor says more):\n" +
                        "\n".join(f"  - {line}" for line in failed))
