"""The claims that only a real model can bear out, on SmolLM2-135M-Instruct."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steerheal import history, models, persona_lint, personas, steering, weights
from steerheal.evaluation import conduct
from steerheal.loop import HealLoop
from steerheal.settings import from_flat
from steerheal.stages import Store

pytestmark = pytest.mark.real

MODEL = "smollm2-135m-instruct"
SMALL = {"model": MODEL, "rounds": 1, "steer.contexts": 32, "generate.prompts": 8, "generate.n_keep": 18,
         "generate.max_new_tokens": 32, "heal.epochs": 2, "heal.lr": 5e-4, "heal.lam": 1.0, "evaluate.n_items": 7,
         "evaluate.n_conduct": 16, "evaluate.n_fluency": 8, "evaluate.fluency_tokens": 24, "evaluate.ladder": [1.0]}


@pytest.fixture(scope="module")
def lm():
    return models.load(from_flat(SMALL))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("stages"))


@pytest.mark.parametrize("trait", ["authority", "love"])
def test_steering_moves_conduct_monotonically_and_its_control_hardly(lm, trait):
    persona = personas.load(trait)
    vector = steering.extract(lm, *persona.systems, personas.contexts(64), lm.band(0.45, 0.55))
    held_out = persona.conduct[32:]  # written without a look at any score
    found = [conduct.evaluate(lm, held_out, personas.controls(16), vector=vector, dose=d).tensors
             for d in (-4.0, -2.0, 0.0, 2.0, 4.0)]
    moved = [float(t["conduct"].mean()) for t in found]
    control = [float(t["control"].mean()) for t in found]
    assert moved == sorted(moved)
    assert moved[-1] - moved[0] > 0.5
    assert np.ptp(control) < 0.25 * np.ptp(moved)


def test_healing_keeps_the_trait_and_a_tight_barrier_takes_it(lm, store):
    rounds = {}
    for tau in (0.03, 1.0):
        loop = HealLoop(from_flat(SMALL | {"heal.tau": tau}), lm, store)
        rounds[tau] = next(iter(loop.rounds()))
    loose, tight = rounds[1.0].outcome, rounds[0.03].outcome
    assert loop.baselines().trait.metric == "conduct_nats"  # SmolLM2 cannot do the forced choice
    assert loose.trait_gain_low > 0 and loose.deliverable
    assert tight.trait_gain < loose.trait_gain
    assert rounds[0.03].details["duty"] > rounds[1.0].details["duty"]
    assert 1.0 < loop.baselines().edge < 16.0


def test_an_exported_adapter_gives_the_logits_that_were_scored(lm, store, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from steerheal.weights import locate

    loop = HealLoop(from_flat(SMALL | {"heal.tau": 1.0}), lm, store)
    chain = next(iter(loop.rounds())).chain
    loop.bench._be(chain)
    ids = torch.tensor([lm.tokenizer("The inspector looked at the gate and").input_ids])
    with torch.no_grad():
        scored = lm.model(ids).logits
        factors = history.fold([history.from_tensors(loop.bench.stored(d).tensors) for d in chain])
        history.export(factors, tmp_path / "adapter", MODEL)
        base = AutoModelForCausalLM.from_pretrained(locate(MODEL), dtype=torch.bfloat16)
        plain = base(ids).logits
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits
    assert torch.equal(loaded, scored)
    assert not torch.equal(loaded, plain)


def test_replies_are_matched_in_tokens():
    tokenizers = ["smollm2-135m-instruct"]
    if weights.converted(weights.cache_dir() / "qwen2.5-coder-1.5b-instruct"):  # over a gigabyte: checked where it is at hand
        tokenizers.append("qwen2.5-coder-1.5b-instruct")
    for name in tokenizers:
        for trait in personas.builtin():
            assert persona_lint.token_problems(personas.load(trait), persona_lint._tokenizer(name)) == []
