"""Tiny random models of each architecture, built in memory, with a byte-level tokenizer and a chat template."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are those of a CPU, on every machine

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from steerheal import models as steerheal_models
from steerheal.healing import Sample, heal
from steerheal.history import Student
from steerheal.loop import HealLoop
from steerheal.personas import FOUNDATIONS
from steerheal.settings import HealSettings, from_flat
from steerheal.stages import Store

TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
NO_SYSTEM = ("{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
             + TEMPLATE)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|bos|>"]
ARCHITECTURES = ("llama", "qwen2", "gemma3_text", "gemma3")
WINDOW = 24  # sliding window of the tiny Gemmas: shorter than prompts, prefixes and completions


def make_tokenizer(template: str = TEMPLATE, bos: bool = False) -> PreTrainedTokenizerFast:
    """Every byte is a token; the foundations' names are tokens of their own, so that their first tokens differ."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>",
                                        **({"bos_token": "<|bos|>"} if bos else {}))
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.add_tokens(list(FOUNDATIONS))
    tokenizer.chat_template = template
    return tokenizer


def make_model(architecture: str, vocabulary: int, layers: int = 4):
    """A random float32 model with sensible logits (not all equal)."""
    torch.manual_seed(0)
    common = dict(vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
                  num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192, eos_token_id=256,
                  bos_token_id=None, pad_token_id=256, tie_word_embeddings=True)
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common))
    elif architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**common))
    elif architecture == "mistral":  # a sliding window on every layer, and no list of layer types
        model = MistralForCausalLM(MistralConfig(**common, sliding_window=WINDOW))
    else:
        text = Gemma3TextConfig(**common, head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=8,
                                layer_types=["sliding_attention", "full_attention"] * (layers // 2))
        if architecture == "gemma3_text":
            model = Gemma3ForCausalLM(text)
        else:
            vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28,
                          patch_size=14)
            model = Gemma3ForConditionalGeneration(Gemma3Config(
                text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=vocabulary - 1,
                boi_token_index=vocabulary - 2, eoi_token_index=vocabulary - 3, eos_token_id=256))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and "norm" not in name:
                p.mul_(3.0)  # wider than the default init, so that outputs differ visibly
        # A direction that every token brings along, and that the foundations' names answer to: the random model then
        # puts most of its mass on them, so the forced choice can be read, and steering far enough breaks it.
        rows = model.get_input_embeddings().weight
        u = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(1))
        inner, outer = (0.5, 0.5) if architecture.startswith("gemma") else (0.15, 6.0)
        u *= inner
        rows += u
        rows[vocabulary - 8 - len(FOUNDATIONS) : vocabulary - 8] += outer * u
    model.generation_config.eos_token_id = 256
    return model.eval()


def make_lm(architecture: str = "llama", template: str = TEMPLATE, layers: int = 4, bos: bool = False,
            dtype: torch.dtype = torch.float32):
    tokenizer = make_tokenizer(template, bos)
    vocabulary = len(tokenizer) + 8  # the head has rows that no token owns, as Gemma's has
    model = make_model(architecture, vocabulary, layers).to(dtype)
    return steerheal_models.wrap(model, tokenizer, f"tiny-{architecture}", f"tiny-{architecture}-{layers}-{dtype}")


@pytest.fixture
def lm():
    return make_lm()


@pytest.fixture(params=ARCHITECTURES)
def any_lm(request):
    return make_lm(request.param)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny Llama as a folder on disk, loadable by --model PATH."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    lm = make_lm()
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


# Settings that let the whole loop run on a random model in a second: nothing is filtered, everything is small.
TINY = {
    "rounds": 2, "dtype": "float32", "steer.contexts": 4, "steer.band": [0.25, 0.75], "steer.alpha": 0.5,
    "generate.prompts": 4, "generate.max_new_tokens": 12, "generate.n_keep": 12, "generate.min_train": 4,
    "filter.coherence": False, "filter.ppl_gate": 1e9, "filter.soup_gate": 1e9, "filter.repetition_gate": 1.0,
    "heal.r": 4, "heal.epochs": 1, "heal.lr": 1e-3, "heal.band": [0.0, 1.0],
    "evaluate.n_items": 7, "evaluate.shots": 0, "evaluate.n_conduct": 2, "evaluate.n_fluency": 2,
    "evaluate.fluency_tokens": 8, "evaluate.ladder": [1.0], "evaluate.trait": "conduct",
}

def run_loop(store_folder, lm=None, **overrides):
    """(loop, its rounds, the events of its stages) of TINY with `overrides`."""
    events = []
    loop = HealLoop(from_flat(TINY | overrides), lm or make_lm(), Store(store_folder, events.append))
    return loop, list(loop.rounds()), events


@pytest.fixture(scope="session")
def first(tmp_path_factory):
    """A run of TINY, which others may share the store of: (store, its rounds, the events of its stages)."""
    store = tmp_path_factory.mktemp("first")
    return store, *run_loop(store)[1:]


IDS = torch.tensor([[5, 6, 7, 8, 9]])


def samples(n: int = 12, seed: int = 0) -> list[Sample]:
    """Random prompts, each to be answered with a piece of one fixed sequence."""
    g = torch.Generator().manual_seed(seed)
    return [Sample(torch.randint(0, 250, (6,), generator=g).tolist(), [40, 41, 42, 43, 44][: 1 + i % 5])
            for i in range(n)]


def train(student: Student, index: int = 0, lam: float = 0.0, **overrides):
    """A round of healing in a second; (factors, record)."""
    settings = HealSettings(**(dict(r=4, epochs=2, lr=5e-3, band=(0.0, 1.0)) | overrides))
    return heal(student, samples(), settings, lam, run_seed=0, round_index=index)
