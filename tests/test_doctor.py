"""What the doctor says of machines that are not at hand: each failure in words, with its way out."""

import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import fake_hub
import pytest
import torch
from conftest import TINY, make_lm

from benchmarks.memory import gemma_4b
from steerheal import doctor, models, weights
from steerheal.doctor import model, probe
from steerheal.errors import UserError
from steerheal.settings import from_flat, preset

ROOT = Path(__file__).parent.parent
GEMMA = from_flat(preset(weights.GEMMA) | {"model": weights.GEMMA, "evaluate.items": "builtin"})
CARDS = {24: ("NVIDIA GeForce RTX 3090", 24.0, 23.1), 8: ("NVIDIA GeForce RTX 3070", 8.0, 7.4), 48: ("RTX A6000", 48.0, 47.0)}


@pytest.fixture
def gemma(monkeypatch):
    """gemma-3-4b-it at a hub that gives it, on a machine with a chosen card and disk."""
    monkeypatch.setattr(model.hub, "bytes_to_fetch", lambda name: 8.6e9)
    monkeypatch.setattr(model, "_config", lambda name: gemma_4b())
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(weights, "cards", lambda: [CARDS[24]])
    model.bytes_to_write.cache_clear()
    yield monkeypatch
    model.bytes_to_write.cache_clear()


def said(settings, results, trials=16):
    return {f.what: (f.ok, f.found) for f in doctor.findings(doctor.checks(settings, trials, results))}


def test_four_bit_gemma_fits_a_24_gb_card(gemma, tmp_path):
    four_bit = from_flat(preset(weights.GEMMA) | {"model": weights.GEMMA, "evaluate.items": "builtin", "quantise": "nf4"})
    found = said(four_bit, tmp_path)
    assert all(ok for ok, _ in found.values()), found
    assert "RTX 3090, 24.0 GiB, 23.1 free; budget 22.0" in found["card"][1]
    assert "8.6 GB to fetch" in found["access"][1]


def test_a_card_with_8_gb_is_told_what_would_fit(gemma, tmp_path):
    gemma.setattr(weights, "cards", lambda: [CARDS[8]])
    ok, text = said(GEMMA, tmp_path)["fits"]
    assert not ok and "the card has 6.0 to give" in text
    assert "quantise=nf4" in text and "--model smollm2-135m-instruct" in text


def test_a_full_disk_is_told_before_the_download(gemma, tmp_path):
    usage = namedtuple("usage", "total used free")
    gemma.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 9 * 10**9, 9 * 10**9))
    ok, text = said(GEMMA, tmp_path)["disk"]
    # the weights alone would fit; weights and adapters on one disk do not
    assert not ok and "results in" in text and "9.0 GB free" in text and "--out" in text
    gemma.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 10**9, 10**9))
    assert "weights in" in said(GEMMA, tmp_path)["disk"][1] and "HF_HOME" in said(GEMMA, tmp_path)["disk"][1]


def test_a_cpu_build_beside_a_card_and_a_card_in_use(gemma, tmp_path):
    gemma.setattr(torch.version, "cuda", None)
    ok, text = said(GEMMA, tmp_path)["torch"]
    assert not ok and "CPU build" in text and "pytorch.org" in text
    gemma.setattr(weights, "cards", lambda: [("RTX 3090", 24.0, 6.0)])
    found = said(GEMMA, tmp_path)  # whether what is free is enough, the model's shape says
    assert found["card"][0] and not found["fits"][0] and "nvidia-smi" in found["fits"][1]
    gemma.setattr(weights, "cards", lambda: [])
    found = said(dataclasses.replace(GEMMA, device="cuda"), tmp_path)
    assert found["card"][0] and not found["torch"][0] and "CPU build, though device = cuda" in found["torch"][1]


def test_the_missing_extra_is_told_before_the_download(gemma, tmp_path):
    found = said(from_flat(preset(weights.GEMMA) | {"model": weights.GEMMA}), tmp_path)
    assert found["items"][0] == bool(importlib.util.find_spec("tinymfv"))
    assert found["items"][0] or "evaluate.items=builtin" in found["items"][1]


def test_the_card_is_not_looked_at_for_a_run_on_the_cpu(gemma, tmp_path):
    gemma.setattr(weights, "cards", lambda: [("RTX 3090", 24.0, 6.0)])
    on_cpu = from_flat(preset(weights.GEMMA) | {"model": weights.GEMMA, "evaluate.items": "builtin", "device": "cpu"})
    assert said(on_cpu, tmp_path)["card"] == (True, "not asked for (device = cpu)")


def test_an_unknown_trait_is_told_before_the_download(gemma, tmp_path):
    found = said(from_flat({"model": weights.GEMMA, "persona": "nobody"}), tmp_path)
    assert not found["persona"][0] and "no such trait. Built-in: authority" in found["persona"][1]


def test_an_architecture_of_another_kind_is_refused_in_words(gemma, tmp_path):
    from transformers import GPT2Config

    gemma.setattr(model, "_config", lambda name: GPT2Config(n_layer=2, n_embd=32, n_head=2))
    ok, text = said(GEMMA, tmp_path)["fits"]
    assert not ok and "this architecture cannot be steered and healed here" in text and weights.KINDS in text


def test_a_search_is_told_everything_at_once(gemma, tmp_path):
    gemma.setattr(weights, "cards", lambda: [CARDS[8]])
    gemma.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError) as error:
        doctor.cheap(GEMMA, 16, tmp_path)
    assert "torch: " in str(error.value) and "fits: " in str(error.value)
    gemma.setattr(weights, "cards", lambda: [])
    doctor.cheap(GEMMA, 16, tmp_path)  # on the CPU it is only slow


def run(*args, **env):
    done = subprocess.run([sys.executable, "-m", *args], cwd=ROOT, capture_output=True, text=True, env=os.environ | env)
    assert "Traceback" not in done.stdout + done.stderr
    return done.returncode, done.stdout + done.stderr


def test_a_gated_model_without_token_ends_at_the_licence(tiny_folder, tmp_path):
    with fake_hub.serve(tiny_folder) as hub:
        hub.access = "gated"
        env = hub.environment(tmp_path / "home")
        for command in (["steerheal.doctor", "--no-probe"], ["steerheal.search", "quickstart"]):
            code, text = run(*command, "--model", fake_hub.NAME, "--out", str(tmp_path / "r"), **env)
            assert code != 0 and "https://huggingface.co/someone/tiny" in text and "hf auth login" in text
        assert not [a for a in hub.asked if a.startswith("GET") and "safetensors" in a]
        hub.access = "open"
        code, text = run("steerheal.doctor", "--no-probe", "--model", fake_hub.NAME, "--out", str(tmp_path / "r"), **env)
        assert code == 0 and "system role of its own" in text and "ends on 256 '<|end|>'" in text
        assert "nothing stands in the way" in text
        assert not [a for a in hub.asked if a.startswith("GET") and "safetensors" in a]  # only the probe needs weights


def test_the_probe_times_every_stage_and_counts_what_a_search_needs(monkeypatch):
    settings = from_flat(TINY | {"rounds": 3})
    monkeypatch.setattr(models, "load", lambda s: make_lm())
    timed = list(probe.stages(settings))
    assert [t.stage for t in timed] == ["load", "vector", "generate", "filter", "heal", "foundations", "conduct", "fluency"]
    assert all(t.whole >= 0 and t.gib > 0 for t in timed)
    # by hand: every stage a second, 2 trials x 3 rounds, 12 survivors from batches of 4 prompts x 3 doses
    second = [probe.Timed(t.stage, 1.0, 1.0, 1.0) for t in timed]
    least, most = probe.hours(second, settings, 2)
    fixed = 1 + 2 + 3 * 3  # load; gate; base, prompted and one rung, each foundations, conduct, fluency
    after = 1 + 2 * 2 + 1  # heal; steered and healed reading; fluency
    assert least * 3600 == pytest.approx(fixed + 5 + 6 * after + 5 * (1 + 2 * 2))
    assert most * 3600 == pytest.approx(fixed + 14 + 6 * (after + 1 + 12 * 2))
