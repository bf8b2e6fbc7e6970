"""python -m benchmarks.conduct [MODEL]: does the conduct readout follow what it should?

For every built-in trait, on the held-back third of its dilemmas: conduct and control nats against the dose of the trait's
own vector, and under the positive persona, no persona and the negative persona as a system prompt.
"""

from __future__ import annotations

import tyro

from benchmarks.command import command
from steerheal import chat, models, personas, steering
from steerheal.evaluation import conduct
from steerheal.settings import from_flat

DOSES = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)
HELD_BACK = slice(32, 48)  # written without a look at any score


def measure(model: tyro.conf.Positional[str] = "smollm2-135m-instruct") -> int:
    lm = models.load(from_flat({"model": model}))
    controls = personas.controls(16)
    results = {}
    for name in personas.builtin():
        trait = personas.load(name)
        items = trait.conduct[HELD_BACK]
        vector = steering.extract(lm, *trait.systems, personas.contexts(64), lm.band(0.45, 0.55))
        print(f"{name} on {model}: {len(items)} dilemmas, vector norm {vector.direction().norm():.1f}")
        gains = []
        for dose in DOSES:
            found = conduct.evaluate(lm, items, controls, vector=vector, dose=dose).tensors
            gains.append(found["conduct"].mean().item())
            print(f"  dose {dose:+.0f}   conduct {gains[-1]:+.3f}   control {found['control'].mean().item():+.3f}", flush=True)
        prompted = [conduct.evaluate(lm, items, controls[:2], system=s).tensors["conduct"].mean().item()
                    for s in (trait.systems[0], chat.NEUTRAL, trait.systems[1])]
        print("  prompted: positive {:+.3f}, neutral {:+.3f}, negative {:+.3f}".format(*prompted), flush=True)
        results[f"{name}_span"] = f"{gains[-1] - gains[0]:.3f}"
        results[f"{name}_monotone"] = str(gains == sorted(gains)).lower()
        results[f"{name}_prompt_order"] = str(prompted[0] > prompted[1] > prompted[2]).lower()
    print("RESULT " + " ".join(f"{k}={v}" for k, v in results.items()))
    return 0


if __name__ == "__main__":
    command(measure)
