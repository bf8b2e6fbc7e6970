"""The questions a round must answer, from its ledger row: each a plain sentence with its number.

    G1  does steering move the readout while the model is coherent?
    Q0  does the filter separate? survival by dose
    G3  are the kept completions different from what base would write?
    Q1  healed, or undone?
    Q2  does coherence hold over the rounds?
    Q3  does the trait go on in one direction?
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from steerheal.objectives import COHERENCE_FLOOR, VERDICTS

SAME_DIRECTION = 0.5  # cosine with round 0's vector above which a later vector still points the same way


def answers(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The gates of a trial's last round.

    Args:
        rows: the trial's ledger rows so far, in order.
    """
    r = rows[-1]
    survival = r["survival_by_share"]
    shares = json.loads(survival) if isinstance(survival, str) else survival
    moved, sane = r["steered_step_low"] > 0, r["steered_coherence_kept"] >= COHERENCE_FLOOR
    kept = [row["coherence_kept"] for row in rows]
    return {
        "G1": f"Steering moved {r['trait']} by {_interval(r, 'steered_step')} in the wanted direction at coherence "
              f"{r['steered_coherence_kept']:.2f} of base: " + ("yes." if moved and sane else
              "it moved, but broke the model." if moved else
              "it moved the other way." if r["steered_step_high"] < 0 else "no, not past its interval."),
        "Q0": f"{r['survival']:.0%} of the completions survived the filter"
              + (": " + ", ".join(f"{share:.0%} at {dose} of the top dose" for dose, share in sorted(
                  shares.items(), key=lambda kv: float(kv[0]))) if shares else "") + ".",
        "G3": f"Per token, the steered model finds the kept completions {_interval(r, 'log_ratio')} nats likelier than "
              f"base does: " + ("they differ." if r["log_ratio_low"] > 0 else "they could be base's own."),
        "Q1": f"{r['verdict']}: {VERDICTS[r['verdict']]}."
              + (f" {r['retain']:.0%} of the steered step was kept." if _number(r["retain"]) else ""),
        "Q2": "Coherence over the rounds: " + ", ".join(f"{k:.2f}" for k in kept)
              + (", none under the floor." if min(kept) >= COHERENCE_FLOOR else
                 f"; round {kept.index(min(kept))} fell through the floor of {COHERENCE_FLOOR}."),
        "Q3": "The vector has no common space with round 0's." if not _number(r["cos_v0"]) else
              f"The vector's cosine with round 0's is {r['cos_v0']:.2f}: "
              + ("one direction." if r["cos_v0"] >= SAME_DIRECTION else "the direction has turned."),
    }


def _interval(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:+.3f} [{row[f'{name}_low']:+.3f}, {row[f'{name}_high']:+.3f}]"


def _number(value: Any) -> bool:
    return value is not None and value == value
