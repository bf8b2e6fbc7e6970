import numpy as np
import pytest
import torch
from conftest import TINY, make_lm
from conftest import run_loop as run

from steerheal import personas
from steerheal.loop import HealLoop
from steerheal.settings import from_flat, leaves, to_flat
from steerheal.stages import Store
from steerheal.workbench import Steering


def computed(events):
    return [(e.stage, e.digest) for e in events if e.kind == "computed"]


def test_whole_loop_on_qwen2(tmp_path):
    """`first` is Llama's; Gemma's are in test_gemma.py."""
    lm = make_lm("qwen2")
    ids = torch.tensor([[5, 6, 7, 8]])
    before = lm.model(ids).logits.clone()
    loop, rounds, _ = run(tmp_path, lm)
    assert len(rounds) == 2 and loop.end in ("rounds", "broken")
    for r in rounds:
        numbers = [v for v in r.row().values() if isinstance(v, float)]
        assert np.isfinite(numbers).all()
    with loop.bench.student.base():
        assert torch.equal(lm.model(ids).logits, before)  # base is one gate away, to the bit
    assert not torch.equal(lm.model(ids).logits, before)
    touched = {path for path in loop.bench.student.layers}
    assert touched and all(path.startswith(lm.blocks_path) for path in touched)
    assert not any("head" in path for path in touched)


def test_a_second_run_computes_nothing_and_agrees(first):
    store, rounds, _ = first
    _, second, events = run(store)
    assert computed(events) == []
    assert [r.row() for r in second] == [r.row() for r in rounds]


def test_trials_share_what_they_have_in_common(first):
    store, _, _ = first
    _, _, events = run(store, **{"heal.tau": 0.1})
    first_round = [stage for stage, _ in computed(events)]
    # of round 0 only healing and what follows it is new; everything before is read
    assert first_round[0] == "heal"
    _, _, events = run(store, **{"heal.lam_round_pow": -1.0})
    assert computed(events)[0][0] == "heal" and len([s for s, _ in computed(events) if s == "heal"]) == 1


def test_adapters_that_are_equal_to_the_bit_share_everything_that_follows(first):
    """Two taus that never bind train the same adapter: after healing there is nothing new in either round."""
    store, _, _ = first
    _, one, _ = run(store, **{"heal.tau": 50.0})
    _, other, events = run(store, **{"heal.tau": 60.0})
    assert [stage for stage, _ in computed(events)] == ["heal"] * len(other)
    assert [r.details["adapter"] for r in one] == [r.details["adapter"] for r in other]
    assert all(a.chain != b.chain and a.outcome == b.outcome for a, b in zip(one, other))
    _, bound, _ = run(store, rounds=1, **{"heal.tau": 0.0})
    assert bound[0].details["adapter"] != one[0].details["adapter"]


def test_a_round_is_judged_by_the_states_that_it_names(first):
    """Each number of an outcome once more from readings of the students and the steering that it speaks of."""
    store, (one, two), _ = first
    loop, _, _ = run(store)
    bench, found = loop.bench, loop.baselines()
    after = [bench.reading(r.chain, found.gate) for r in (one, two)]
    for r, incoming, chain, healed in ((one, found.base, (), after[0]), (two, after[0], one.chain, after[1])):
        vector, digest = bench.vector(chain)
        dose = TINY["steer.alpha"] * found.edge * r.details["kappa"]
        steered = bench.reading(chain, None, steering=Steering(vector, digest, dose))
        assert r.details["top_dose"] == pytest.approx(dose)
        o = r.outcome
        got = [o.trait_gain, o.step_gain, o.steered_step, o.steered_gain, o.coherence_kept]
        assert got == pytest.approx([
            found.trait.gain(healed, found.base).value, found.trait.gain(healed, incoming).value,
            found.trait.gain(steered, incoming).value, found.trait.gain(steered, found.base).value,
            min(1.0, healed.mass.mean() / found.base.mass.mean())])
    assert two.outcome.step_gain != two.outcome.trait_gain and two.outcome.steered_step != two.outcome.steered_gain


class Unknown(Exception):
    """A stage that is not in the store."""


class Known(Store):
    def stage(self, stage, inputs, compute):
        def refuse():
            raise Unknown(stage)

        return super().stage(stage, inputs, refuse)


# what these decide is which results are taken, or it is in the model's own digest, or TINY does not read it
NO_INPUT = {"model", "dtype", "quantise", "attention", "rounds", "filter.coherence", "filter.narration", "filter.refusal",
            "generate.n_keep", "generate.min_train", "generate.max_batches", "generate.pass_target", "generate.kappa_min",
            "evaluate.trait", "evaluate.items", "steer.target_kl"}


def another(name, value):
    """Another allowed value of a setting."""
    meta = leaves()[name].metadata
    of_their_own = {"persona": "love", "steer.method": "cosine_gated", "generate.doses": [0.7, 1.0]}
    if name in of_their_own:
        return of_their_own[name]
    if "allowed" in meta:
        return next(v for v in meta["allowed"] if v != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return [0.9 * v for v in value] if isinstance(value, (list, tuple)) else 0.9 * value or 0.5


@pytest.fixture(scope="module")
def lm():
    return make_lm()


@pytest.mark.parametrize("name", [n for n, f in leaves().items() if f.metadata["identity"] and n not in NO_INPUT])
def test_every_setting_that_decides_a_number_names_its_results(first, lm, name):
    """One that did not would replay another setting's results as its own."""
    value = TINY.get(name, to_flat(from_flat(TINY))[name])
    loop = HealLoop(from_flat(TINY | {name: another(name, value)}), lm, Known(first[0]))
    with pytest.raises(Unknown):
        list(loop.rounds())


def test_prev_and_base_are_one_in_round_zero(first):
    _, _, events = run(first[0], **{"heal.ref": "base", "rounds": 1})
    assert computed(events) == []


def test_nll_reads_no_barrier_setting(first):
    run(first[0], **{"heal.barrier": "nll", "rounds": 1})
    _, _, events = run(first[0], **{"heal.barrier": "nll", "heal.tau": 2.0, "heal.aggregate": "mean", "rounds": 1})
    assert computed(events) == []


def test_run_seed_changes_draws_but_not_instruments(first):
    _, _, events = run(first[0], rounds=1, seed=1)
    stages = [s for s, _ in computed(events)]
    assert "completions" in stages and "vector" not in stages
    assert "heal" in stages


def test_micro_batch_changes_no_digest_and_hardly_a_number(first, tmp_path):
    _, whole, _ = first  # of the default, 6
    _, split, _ = run(tmp_path, **{"heal.micro_batch": 2, "rounds": 1})
    assert whole[0].chain == split[0].chain
    assert split[0].outcome.trait_gain == pytest.approx(whole[0].outcome.trait_gain, rel=1e-2)


def test_starved_is_a_named_end(first, monkeypatch):
    from steerheal import filtering

    monkeypatch.setattr(filtering, "MIN_TOKENS", 1000)
    monkeypatch.setattr(filtering, "gates", lambda scores, settings: filtering.Gates(100.0, 100.0))
    loop, rounds, _ = run(first[0])
    assert rounds == [] and loop.end == "starved"
    assert loop.starved["round"] == 0 and loop.starved["ppl_gate"] == 100.0
    assert all(loop.bench.stored(d[kind]) for d in loop.starved["draws"] for kind in ("completions", "scores"))
    assert loop.why.startswith("round 0: 0 completions survived the filter (dropped for ") and "generate.min_train" in loop.why


def test_the_order_of_work_in_a_round(first):
    stages = [s for s, _ in computed(first[2])]
    assert stages[:2] == ["foundations", "conduct"]  # of base: gates that are set need no completions
    assert stages[-11:] == ["log_ratio", "heal", "foundations", "conduct", "diary",  # steered
                            "foundations", "conduct", "fluency", "free_answers", "diary",  # healed
                            "states"]


def test_vignettes_are_stratified():
    chosen = personas.vignettes("builtin", 70)
    counts = {f: sum(v.foundation == f for v in chosen) for f in personas.FOUNDATIONS}
    assert set(counts.values()) == {10}
    assert len(personas.vignettes("builtin", 9)) == 9


def test_losses_of_an_early_stop_are_those_of_the_adapter_that_is_kept(first):
    loop, rounds, _ = run(first[0], rounds=1, **{"heal.early_stop": 1, "heal.epochs": 8, "heal.lr": 0.05})
    record = loop.bench.stored(rounds[0].chain[-1]).record
    best = int(np.argmin(record["val_nll"][1:]))
    assert best < len(record["val_nll"]) - 2, "the script of this test: the last epoch must be worse"
    assert rounds[0].details["val_nll_last"] == record["val_nll"][best + 1]
    assert rounds[0].details["train_nll"] == record["train_nll"][best]
