"""The stage store: what was computed once is never computed again.

A stage is a pure function of its inputs: effective settings, digests of the stages it reads, the model's digest. Its
result, a JSON record and named tensors, lies in one file named by the SHA-256 of those inputs:

    steerheal-stage/1 {digest} {sha256 of the rest} {bytes of JSON}\\n  JSON  safetensors

written to a temporary name, fsynced, renamed. A file that does not match its checksum is set aside and recomputed.
Two processes that want one stage are serialised by a kernel file lock, which a dead process does not keep.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerheal.errors import UserError

MAGIC = "steerheal-stage/1"

# A stage's version is part of its digest. Raise it when the stage's code changes what it computes;
# tests/test_stage_versions.py reminds you.
VERSIONS = {
    "vector": 4, "states": 3, "kl_dose": 3, "completions": 6, "scores": 4, "log_ratio": 3, "diary": 5, "heal": 8,
    "foundations": 7, "conduct": 3, "fluency": 7, "free_answers": 5,
    "round": 1,  # no stage: what a round makes of its stages
}


@dataclass
class Result:
    """What a stage computed. Tensors are numpy arrays or torch tensors, whichever the reader asked for."""

    record: dict[str, Any]
    tensors: dict[str, Any] = field(default_factory=dict)
    digest: str = ""


@dataclass
class Event:
    """One thing that happened to a stage: start, computed, replayed, or set aside."""

    kind: str
    stage: str
    digest: str
    seconds: float = 0.0
    note: str = ""


def digest_of(stage: str, inputs: dict[str, Any]) -> str:
    """SHA-256 of a stage's name, version and inputs in canonical JSON. NaN and infinities are refused."""
    body = dict(stage=stage, version=VERSIONS[stage], inputs=inputs)
    return hashlib.sha256(canonical(body)).hexdigest()


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def seed_of(*parts: Any) -> int:
    """A 63-bit seed from (run seed, stage, round, purpose, item): never from tuned settings, so that trials that
    differ only in settings share their draws and their differences are paired."""
    return int.from_bytes(hashlib.sha256(canonical(list(parts))).digest()[:8], "big") >> 1


class Store:
    """Stage results under one folder, shared by all searches and workers that point at it."""

    def __init__(self, root: Path | str, on_event: Callable[[Event], None] | None = None):
        self.root = Path(root)
        self.on_event = on_event or (lambda event: None)

    def path(self, digest: str) -> Path:
        return self.root / digest[:2] / digest

    def stage(self, stage: str, inputs: dict[str, Any], compute: Callable[[], Result]) -> Result:
        """The stored result for these inputs; computed, stored and returned where there is none."""
        digest = digest_of(stage, inputs)
        found = self.load(digest)
        if found is None:
            with locked(self.path(digest).with_suffix(".lock")):
                found = self.load(digest)  # another worker may have finished it while we waited
                if found is None:
                    self._clear(stage, digest)
                    return self._compute(stage, digest, inputs, compute)
        self.on_event(Event("replayed", stage, digest))
        return found

    def _clear(self, stage: str, digest: str) -> None:
        """Set a damaged file aside, and remove what killed writers left. Only the holder of the lock may: without it,
        two readers of a damaged file would each move one aside, the second the file that the first had just mended."""
        path = self.path(digest)
        for left in path.parent.glob(f".{digest}.*.tmp"):
            left.unlink()
        if path.exists():
            aside = path.with_suffix(".damaged")
            os.replace(path, aside)
            self.on_event(Event("set aside", stage, digest, note=f"{path} fails its checksum; moved to {aside.name}"))

    def _compute(self, stage: str, digest: str, inputs: dict[str, Any], compute: Callable[[], Result]) -> Result:
        self.on_event(Event("start", stage, digest))
        started = time.monotonic()
        result = compute()
        seconds = time.monotonic() - started
        result.digest = digest
        self._write(digest, dict(stage=stage, version=VERSIONS[stage], inputs=inputs, seconds=round(seconds, 3),
                                 record=result.record), result.tensors)
        self.on_event(Event("computed", stage, digest, seconds))
        return result

    def _write(self, digest: str, head: dict[str, Any], tensors: dict[str, Any]) -> None:
        from safetensors.torch import save

        body = canonical(head)
        rest = body + save({k: v.contiguous().cpu() for k, v in tensors.items()})
        line = f"{MAGIC} {digest} {hashlib.sha256(rest).hexdigest()} {len(body)}\n".encode()
        atomic_write(self.path(digest), line + rest)

    def load(self, digest: str) -> Result | None:
        """The result under a digest, None where there is none or the file is damaged."""
        from safetensors import SafetensorError

        try:
            head, _, rest = self.path(digest).read_bytes().partition(b"\n")
            magic, named, checksum, size = head.decode().split(" ")
            if (magic, named, checksum) != (MAGIC, digest, hashlib.sha256(rest).hexdigest()):
                return None
            return Result(json.loads(rest[: int(size)])["record"], _tensors(rest[int(size) :]), digest)
        except (FileNotFoundError, ValueError, SafetensorError):  # the last two: text that is no head, a flipped size
            return None
        except OSError as error:
            raise UserError(f"the stage store cannot be read: {self.path(digest)}: {error.strerror}. Make it readable for "
                            f"this user, or delete that file, and give the same command again.") from None

    def head(self, digest: str) -> dict[str, Any] | None:
        """Name, version, inputs and seconds of a stored stage, without its tensors; None where `load` would find none."""
        try:
            with self.path(digest).open("rb") as file:
                size = int(file.readline().split(b" ")[3])
                return json.loads(file.read(size))
        except (FileNotFoundError, ValueError, IndexError):
            return None


def store_beside(folder: Path) -> Store:
    """The store that a search's folder shares with those beside it."""
    return Store(folder.absolute().parent / ".stages")


def _tensors(data: bytes) -> dict[str, Any]:
    from safetensors.torch import load

    return load(data)


# ---------------------------------------------------------------- files


def atomic_write(path: Path, data: bytes) -> None:
    """Write beside `path`, fsync, rename: a reader sees the old file or the whole new one, never a part.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise disk_error(path, error) from error


def make_folder(path: Path) -> None:
    """Raises as `atomic_write` does."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(path, error) from error


def disk_error(path: Path, error: OSError) -> UserError:
    """The words for a folder that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"the disk is full: {path} could not be written. Everything finished so far is kept; free "
                         f"some space and give the same command again to go on.")
    return UserError(f"cannot write {path}: {error.strerror}. Choose a folder that you can write: --out DIR, where "
                     f"the command takes it.")


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive kernel lock on `path`; the file is removed afterwards.

    Raises:
        BlockingIOError: another process holds it and `wait` is false.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = path.open("w")
        except OSError as error:
            raise disk_error(path, error) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            handle.close()
            raise
        with contextlib.suppress(FileNotFoundError):  # the last holder unlinks: was it this very file?
            if os.stat(path).st_ino == os.fstat(handle.fileno()).st_ino:
                break
        handle.close()
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        handle.close()
