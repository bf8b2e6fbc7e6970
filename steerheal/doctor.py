"""python -m steerheal.doctor: what this machine can run, line by line, with the way out for each failure."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from steerheal import weights
from steerheal.cli import run_main
from steerheal.errors import UserError


@dataclass
class Args:
    """Check Python, torch, the card, disk, Ray's needs and the model."""

    model: str = "auto"
    """the model to check"""


@dataclass
class Finding:
    ok: bool
    what: str
    found: str


def main() -> None:
    args = tyro.cli(Args, prog="python -m steerheal.doctor")
    run_main(lambda: report(args.model))


def report(model: str) -> int:
    """Print every finding; 0 where nothing stands in the way."""
    failed = 0
    for finding in findings(model):
        print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.what:12} {finding.found}", flush=True)
        failed += not finding.ok
    return int(failed > 0)


def findings(model: str) -> Iterator[Finding]:
    """Checks in the order in which a run would fail on them."""
    for what, check in (("python", _python), ("torch", _torch), ("bitsandbytes", _bitsandbytes), ("disk", _disk),
                        ("memory", _memory), ("shared mem", _shared_memory)):
        yield _guarded(what, check)
    yield _guarded("model", lambda: _model(model))


def _guarded(what: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(True, what, check())
    except UserError as error:
        return Finding(False, what, str(error))


def _python() -> str:
    return platform.python_version()


def _torch() -> str:
    import torch

    card = f"{torch.cuda.get_device_name(0)}, {weights.cuda_memory_gb():.0f} GB" if torch.cuda.is_available() else "no card"
    if weights.cuda_memory_gb() and not torch.cuda.is_available():
        raise UserError(f"{torch.__version__} sees no CUDA, though nvidia-smi shows a card: install a CUDA build of torch")
    return f"{torch.__version__}, {card}, {torch.get_num_threads()} threads"


def _bitsandbytes() -> str:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("not installed: quantise=nf4 is not available. pip install bitsandbytes")
    return "installed (for --set quantise=nf4)"


def _disk() -> str:
    out = []
    for name, path, needed in (("model cache", weights.cache_dir(), 1.0), ("results", Path("results"), 2.0)):
        existing = next(p for p in (path, *path.absolute().parents) if p.exists())
        free = shutil.disk_usage(existing).free / 1e9
        if not os.access(existing, os.W_OK):
            raise UserError(f"{name} {path}: not writable. " + ("Set STEERHEAL_CACHE" if name != "results" else
                            "Use --out") + " to name another folder")
        if free < needed:
            raise UserError(f"{name} {path}: {free:.1f} GB free, {needed:g} GB needed. Free some")
        out.append(f"{free:.0f} GB free for {name} ({path})")
    return "; ".join(out)


def _memory() -> str:
    limit = Path("/sys/fs/cgroup/memory.max")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if limit.exists() and limit.read_text().strip().isdigit():
        total = min(total, int(limit.read_text()))
    if total < 4e9:
        raise UserError(f"{total / 1e9:.1f} GB: a search needs about 4 GB even with the embedded model")
    return f"{total / 1e9:.0f} GB"


def _shared_memory() -> str:
    if not Path("/dev/shm").exists():
        return "no /dev/shm; Ray falls back to disk"
    free = shutil.disk_usage("/dev/shm").free
    if free < 1.2e8:
        raise UserError(f"/dev/shm has {free / 1e6:.0f} MB free, Ray needs 100 MB (docker: --shm-size=512m)")
    return f"{free / 1e9:.1f} GB free in /dev/shm"


def _model(name: str) -> str:
    from transformers import AutoTokenizer

    from steerheal import chat

    chosen, why = weights.resolve(name)
    folder = weights.locate(chosen)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.chat_template is None:
        raise UserError(f"{chosen} has no chat template: name an instruct model")
    role = "own system role" if chat.has_system_role(tokenizer) else "system text heads the first user turn"
    return f"{chosen} at {folder}; {role}; ends on {tokenizer.eos_token!r}" + (f"\n      {why}" if why else "")


if __name__ == "__main__":
    main()
