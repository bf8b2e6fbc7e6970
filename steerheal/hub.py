"""Models on the Hugging Face hub: asked about before anything is fetched, fetched once, named by their commit.

A whole snapshot in the local cache is used without asking the network, whatever the hub holds by now.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path

from huggingface_hub import get_token, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from steerheal.errors import UserError

WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def cached(name: str, commit: str = "") -> Path | None:
    """The whole snapshot in the local cache, of `commit` or of the newest one fetched; None where there is none."""
    try:
        folder = Path(snapshot_download(name, revision=commit or None, allow_patterns=WANTED, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise _told(name, error) from None
    return folder if _whole(folder) else None


def _whole(folder: Path) -> bool:
    """Whether weights, config and tokenizer are all there. The client only knows of downloads that it began as a whole:
    where some program fetched a config alone, it calls the folder complete."""
    index = folder / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    return (all((folder / name).exists() for name in (*shards, "config.json"))
            and any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")))


def fetch(name: str, commit: str = "") -> Path:
    """The snapshot's folder, downloaded where it is not in the cache; an interrupted download goes on.

    Raises:
        UserError: no such model, no access, no network or no disk, each with the way out.
    """
    if found := cached(name, commit):
        return found
    try:
        return Path(snapshot_download(name, revision=commit or None, allow_patterns=WANTED))
    except Exception as error:  # of the hub's own, of its HTTP client's and of Xet's, which share no base
        raise _told(name, error) from None


def bytes_to_fetch(name: str, commit: str = "") -> int:
    """What a download would bring, 0 where the cache holds all of it. Each file's headers are asked for, so licence and
    token are checked on the way.

    Raises:
        UserError: as `fetch`, without fetching.
    """
    if cached(name, commit):
        return 0
    disable_progress_bars()  # of asking; fetching shows its own
    try:
        files = snapshot_download(name, revision=commit or None, allow_patterns=WANTED, dry_run=True)
    except Exception as error:  # of the hub's own, of its HTTP client's and of Xet's, which share no base
        raise _told(name, error) from None
    finally:
        enable_progress_bars()
    return sum(f.file_size or 0 for f in files if f.will_download)


def _told(name: str, error: Exception) -> UserError:
    """The hub's error in words, with the way out."""
    error = error.__cause__ if isinstance(error, DryRunError) and isinstance(error.__cause__, Exception) else error
    from steerheal.weights import GEMMA, WHEEL_MODELS

    known = f"built-in: {', '.join(WHEEL_MODELS)}; or a Hugging Face id such as {GEMMA}; or a local folder"
    page, tokens = f"https://huggingface.co/{name}", "https://huggingface.co/settings/tokens"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if isinstance(error, HFValidationError):
        why = f"neither a model id nor an existing folder. Allowed: {known}"
    elif isinstance(error, GatedRepoError) and get_token():
        why = (f"gated, and the account of your token has no access: accept the licence at {page} (a fine-grained token "
               f"also needs the right to read gated repositories, {tokens}), and start again")
    elif isinstance(error, GatedRepoError):
        why = (f"gated, and there is no token on this machine: accept the licence at {page}, make a read token at "
               f"{tokens}, run `hf auth login`, and start again")
    elif isinstance(error, RepositoryNotFoundError):
        why = f"the hub knows no such model (or your token may not see it). Allowed: {known}"
    elif status == 401:
        why = f"the hub refuses your token: make a new one at {tokens} and run `hf auth login`"
    elif getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        why = "the disk is full. Free some space, or set HF_HOME to a larger disk; the download goes on where it was"
    else:
        said = f"answered {status}" if status else f"cannot be reached ({type(error).__name__})"
        why = f"not whole in the local cache, and the hub {said}. Connect and start again, or use what is here: {known}"
    return UserError(f"model = {name!r}: {why}.")
