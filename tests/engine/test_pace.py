"""How long a run will take, from its first steps."""

import pytest

from segvit.engine.pace import Pace, duration


def test_the_first_step_does_not_count_and_it_is_said_once():
    rows, said = [], []
    pace = Pace(rows.append, said.append, steps=1000)
    for step, seconds in enumerate([60.0, 2.0, 1.0, 2.0, 9.0, 2.0, 2.0, 2.0], start=11):
        pace({"step": step, "seconds": seconds})
    assert [row["step"] for row in rows] == list(range(11, 19))
    assert said == ["2 s a step: about 33 min for the 984 steps left; validations come on top"]


@pytest.mark.parametrize("steps", [5, 6])
def test_nothing_is_said_of_a_run_that_is_over(steps):
    said = []
    pace = Pace(lambda row: None, said.append, steps=steps)
    for step in range(1, steps + 1):
        pace({"step": step, "seconds": 1.0})
    assert said == []


def test_times_are_in_words():
    texts = ["40 s", "12 min", "3 h 5 min", "2 d 4 h"]
    assert [duration(seconds) for seconds in (40.2, 720, 11100, 188000)] == texts
