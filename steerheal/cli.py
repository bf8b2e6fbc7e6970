"""What all command lines share: one way to fail, one way to repeat a flag."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence

from steerheal.errors import UserError
from steerheal.settings import leaves


def run_main(action: Callable[[], int]) -> None:
    """Run a command; a UserError is printed without a traceback and exits with 2, Ctrl-C with 130, SIGTERM with 143."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional kernel at every import
    try:
        code = action()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except SystemExit as error:  # Ray, while it starts or ends, answers SIGTERM so
        if error.code != signal.SIGTERM:
            raise
        code = 128 + signal.SIGTERM
    except BrokenPipeError:  # `... --list | head`: the reader has what it wanted
        os._exit(0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code) if code > 128 else sys.exit(code)


def merged_flags(argv: Sequence[str], flag: str) -> list[str]:
    """`--set a=1 --set b=2` as `--set a=1 b=2`: a repeated flag must add, never replace."""
    values: list[str] = []
    rest: list[str] = []
    collecting = False
    for word in argv:
        if word == flag or word.startswith(flag + "="):
            collecting = True
            if word != flag:
                values.append(word[len(flag) + 1 :])
        elif collecting and not word.startswith("--") and "=" in word:
            values.append(word)
        else:
            collecting = False
            rest.append(word)
    return [*rest, flag, *values] if values else rest


def setting_flags(argv: Sequence[str], own: Sequence[str]) -> list[str]:
    """`--heal.tau 0.1` as `--set heal.tau=0.1`, for every setting but those that are flags of the command's `own`."""
    out: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name in leaves() and name not in own:
            out += ["--set", f"{name}={value if equals else next(words, '')}"]
        else:
            out.append(word)
    return out
