"""Learning rates against the formulas of mmcv, written out a second time."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segvit.engine.schedule import learning_rate
from segvit.engine.settings import Schedule


def test_poly():
    schedule = Schedule(kind="poly", power=0.9, min_lr=1e-5, warmup=0)
    for step in (0, 1, 37, 99):
        expected = (1e-2 - 1e-5) * (1 - step / 100) ** 0.9 + 1e-5
        assert learning_rate(schedule, step, base=1e-2, steps=100) == pytest.approx(expected, rel=1e-12)


def test_cosine():
    schedule = Schedule(kind="cosine", min_lr=0.1, warmup=0)
    rates = [learning_rate(schedule, step, base=1.1, steps=4) for step in range(5)]
    half = 0.5**0.5
    assert rates == pytest.approx([1.1, 0.6 + half / 2, 0.6, 0.6 - half / 2, 0.1])


def test_constant():
    assert {learning_rate(Schedule(kind="constant", warmup=0), i, base=0.3, steps=9) for i in range(9)} == {0.3}


@pytest.mark.parametrize("kind", ["poly", "cosine", "constant"])
def test_warmup_multiplies_the_decayed_rate(kind):
    plain, warm = Schedule(kind=kind, warmup=0), Schedule(kind=kind, warmup=10, warmup_ratio=0.01)
    for step in range(20):
        factor = 0.01 + 0.99 * step / 10 if step < 10 else 1.0
        expected = factor * learning_rate(plain, step, base=2.0, steps=20)
        assert learning_rate(warm, step, base=2.0, steps=20) == pytest.approx(expected, rel=1e-12)


def test_a_warmup_longer_than_the_run_stays_below_the_decayed_rate():
    rates = [learning_rate(Schedule(warmup=1500), step, base=1.0, steps=10) for step in range(10)]
    assert max(rates) < 0.01


@given(
    kind=st.sampled_from(["poly", "cosine", "constant"]), steps=st.integers(1, 1000), warmup=st.integers(0, 50),
    data=st.data(), base=st.floats(1e-6, 1),
)  # fmt: skip
def test_rates_are_finite_and_between_zero_and_the_base(kind, steps, warmup, data, base):
    step = data.draw(st.integers(0, steps - 1))
    rate = learning_rate(Schedule(kind=kind, warmup=warmup), step, base=base, steps=steps)
    assert math.isfinite(rate)
    assert 0 <= rate <= base * (1 + 1e-12)
