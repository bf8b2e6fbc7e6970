"""Checks of the machine. The card is asked through nvidia-smi, so that this process never makes a CUDA context."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from pathlib import Path

from steerheal import weights
from steerheal.doctor import model
from steerheal.errors import UserError
from steerheal.memory import DESKTOP, GIB
from steerheal.settings import Settings


def python() -> str:
    return platform.python_version()


def torch_build(settings: Settings) -> str:
    import torch

    cuda = torch.version.cuda
    wanted = settings.device == "cuda" or (settings.device == "auto" and weights.cards())
    if wanted and not cuda:  # a card that only other nodes of a cluster have is no reason to refuse
        why = "device = cuda" if settings.device == "cuda" else "nvidia-smi shows a card"
        raise UserError(f"torch {torch.__version__} is a CPU build, though {why}. Install a CUDA build: "
                        "the command for your driver is at https://pytorch.org/get-started/locally; or leave the card "
                        "alone with --set device=cpu")
    return f"{torch.__version__}, {f'CUDA {cuda}' if cuda else 'CPU build'}, {torch.get_num_threads()} threads"


def budget() -> float:
    """GiB that a search may use on the first card; 0 without one."""
    found = weights.cards()
    return min(found[0][1] - DESKTOP / GIB, found[0][2]) if found else 0.0


def card(settings: Settings) -> str:
    if settings.device == "cpu":
        return "not asked for (device = cpu)"
    found = weights.cards()
    if not found:
        return "none that nvidia-smi shows" if settings.device == "cuda" else "none: everything runs on the CPU"
    name, total, free = found[0]
    return f"{name}, {total:.1f} GiB, {free:.1f} free; budget {budget():.1f}"


def bitsandbytes(settings: Settings) -> str:
    if settings.quantise == "none":
        return "not asked for (--set quantise=nf4)"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("quantise = nf4 needs bitsandbytes, which is not installed: pip install bitsandbytes, or "
                        "--set quantise=none")
    return "bitsandbytes is installed"


def disk(settings: Settings, trials: int, results: Path) -> str:
    """Room for the weights and for the adapters of every round of every trial."""
    wanted = {"weights": (model.cache_folder(settings.model), model.bytes_to_write(settings.model)),
              "results": (results, model.store_bytes(settings, trials))}
    found, problems, needed_on = [], [], dict[int, float]()
    for name, (folder, needed) in wanted.items():
        existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(existing).free
        device = os.stat(existing).st_dev
        needed_on[device] = needed_on.get(device, 0.0) + needed  # both may lie on one disk
        way = {"weights": "set HF_HOME or STEERHEAL_CACHE to a larger disk", "results": "name another with --out"}[name]
        if not os.access(existing, os.W_OK):
            problems.append(f"{name} in {folder}: not writable; {way}")
        elif free < needed_on[device]:
            problems.append(f"{name} in {folder}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free on that disk; "
                            f"free some, or {way}")
        found.append(f"{name} {needed / 1e9:.1f} GB of {free / 1e9:.0f} free ({folder})")
    if problems:
        raise UserError("\n".join(problems))
    return "\n".join(found)


def memory() -> str:
    limit = Path("/sys/fs/cgroup/memory.max")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if limit.exists() and limit.read_text().strip().isdigit():
        total = min(total, int(limit.read_text()))
    if total < 4e9:
        raise UserError(f"{total / 1e9:.1f} GB: a search needs about 4 GB even with the embedded model. In a container, "
                        f"raise its limit (docker: --memory)")
    return f"{total / 1e9:.0f} GB"


def shared_memory() -> str:
    if not Path("/dev/shm").exists():
        return "no /dev/shm; Ray falls back to disk"
    free = shutil.disk_usage("/dev/shm").free
    if free < 1.2e8:
        raise UserError(f"/dev/shm has {free / 1e6:.0f} MB free, Ray needs 100 MB (docker: --shm-size=512m)")
    return f"{free / 1e9:.1f} GB free in /dev/shm"


def extras() -> str:
    names = {"tinymfv": "upstream", "steering_lite": "upstream", "optuna_dashboard": "dashboard"}
    return ", ".join(f"{name}: " + ("installed" if importlib.util.find_spec(name) else f"pip install -e '.[{extra}]'")
                     for name, extra in names.items())
