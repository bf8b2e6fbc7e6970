import numpy as np
import pytest
import torch

from steerheal import calibration
from steerheal.calibration import NoBracket, last_dose
from steerheal.steering import Vector, steered


@pytest.mark.parametrize("edge", [0.0021, 0.7, 1.0, 5.3, 700.0])
def test_the_last_dose_is_found_from_either_side(edge):
    tried = []

    def holds(dose):
        tried.append(dose)
        return dose <= edge

    found = last_dose(holds, 8)
    assert found <= edge < found * 2 ** (1 / 2**8) * 1.0001 and found in tried
    assert len(tried) == len(set(tried))


def test_an_end_of_the_bracket_is_no_answer():
    with pytest.raises(NoBracket) as above:
        last_dose(lambda dose: True, 4)
    with pytest.raises(NoBracket) as below:
        last_dose(lambda dose: False, 4)
    assert above.value.held and not below.value.held


def test_kl_against_whole_sequences_in_float64(lm):
    prompts, replies = [[1, 2, 3], [4, 5], [1, 2, 9, 9]], [[7, 8, 9, 10], [11, 12, 13], [14]]
    v = Vector({1: torch.randn(32, generator=torch.Generator().manual_seed(0))})
    every = []
    for p, r in zip(prompts, replies):
        ids = torch.tensor([p + r[:-1]])
        with torch.no_grad():
            base = lm.model(ids).logits[0, len(p) - 1 :].double().log_softmax(-1)
            with steered(lm, v, 1.5):
                moved = lm.model(ids).logits[0, len(p) - 1 :].double().log_softmax(-1)
        every += (moved.exp() * (moved - base)).sum(-1).tolist()
    want = np.quantile(every, 0.95)
    assert calibration.kl_percentile(lm, v, 1.5, prompts, replies) == pytest.approx(want, rel=1e-4)
    assert calibration.kl_percentile(lm, v, 0.0, prompts, replies) == pytest.approx(0.0, abs=1e-6)
