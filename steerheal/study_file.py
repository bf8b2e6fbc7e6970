"""study.db, the one file that knows what was tried: checked before it is opened, backed up as the search goes on (`Follower`).

SQLite's journal survives a killed program. The backup is for the rest: a truncating copy, a sync tool, a bad disk. What was
finished after the backup is proposed again with the same parameters and replayed from the stage store.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from steerheal.errors import UserError
from steerheal.stages import atomic_write, disk_error

NAME, BACKUP, DAMAGED = "study.db", "study.backup.db", "study.damaged.db"


def back_up(folder: Path) -> None:
    """Copy the study as it is committed now."""
    with contextlib.closing(sqlite3.connect(folder / NAME)) as db:
        atomic_write(folder / BACKUP, db.serialize())


def mend(folder: Path) -> str:
    """Move a damaged study aside and put its backup in its place; without one, the study starts anew.

    Returns:
        A sentence for the user, empty where nothing was wrong.

    Raises:
        UserError: another program holds the study locked.
    """
    path, backup = folder / NAME, folder / BACKUP
    if not path.exists() and not backup.exists():
        return ""
    why = _damage(path)
    if not why:
        return ""
    try:
        for end in ("", "-journal"):  # a journal belongs to its database: SQLite would roll it back into the copy
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{path}{end}", f"{folder / DAMAGED}{end}")
        if backup.exists() and not _damage(backup):
            atomic_write(path, backup.read_bytes())
            done = f"put back from {BACKUP}"
        else:
            done = "without a good backup, started anew: what was finished is proposed again and read from the stage store"
    except OSError as error:
        raise disk_error(path, error) from error
    return f"{path} could not be read ({why}): {done}. A damaged file is kept as {DAMAGED}."


def _damage(path: Path) -> str:
    """Why SQLite cannot read this study, empty where it can."""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as db:
            found = db.execute("PRAGMA quick_check").fetchone()[0]
            studies = db.execute("SELECT count(*) FROM studies").fetchone()[0]  # an empty file passes the check
        if not studies and path.with_name(BACKUP).exists():
            return "it holds no study"
        return "" if found == "ok" else found
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
            raise UserError(_locked(path)) from None
        return str(error)


@contextlib.contextmanager
def in_words(folder: Path) -> Iterator[None]:
    """Database errors, Optuna's and SQLAlchemy's around them included, as one sentence with the way out."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import DatabaseError

    try:
        yield
    except (sqlite3.DatabaseError, DatabaseError, StorageInternalError) as error:
        cause: BaseException = error
        while not isinstance(cause, sqlite3.DatabaseError) and cause.__cause__:
            cause = cause.__cause__
        if getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
            raise UserError(_locked(folder / NAME)) from error
        raise UserError(f"{folder / NAME}: {cause}. Everything finished so far is kept; give the search's command again, "
                        f"without --dry-run, to go on.") from error


def _locked(path: Path) -> str:
    return (f"{path} is locked by another program. Close it (a database browser, a copy or backup that is running), then "
            f"give the same command again.")
