"""Errors a user can act on. Every message names the setting or file, the value, what is allowed and the way out."""

from typing import Any


class UserError(Exception):
    """A mistake in settings, files or environment. Command lines print it without a traceback and exit with 2."""


class SettingsError(UserError):
    """All problems found in one set of settings, one per line."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        head = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{head} in the settings:\n" + "\n".join(f"  - {p}" for p in problems))


def ran_out(error: BaseException) -> bool:
    """Whether a device's memory ran out: torch's own OutOfMemoryError, or what CUDA and cuBLAS say of memory that torch does
    not manage."""
    text = str(error)
    return type(error).__name__ == "OutOfMemoryError" or (isinstance(error, RuntimeError) and
                                                          ("out of memory" in text or "ALLOC_FAILED" in text))


def card_failed(error: BaseException) -> bool:
    """Whether a CUDA card failed; this process can mostly not use it again."""
    return isinstance(error, RuntimeError) and (type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error))


class Starved(Exception):
    """A round ended with too few completions that survived the filter. `record` is what there is of it, see `HealLoop`."""

    def __init__(self, why: str, record: dict[str, Any]):
        super().__init__(why)
        self.record = record


class Stop(BaseException):
    """Raised between two stages when the user asked to stop; nothing finished is lost."""
