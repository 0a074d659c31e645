"""Curves of braille dots: where they pass, what the axes say, and what is drawn when there is nothing."""

import numpy as np
import pytest

from segvit.engine.terminal import BLANK, MARGIN, chart


def dots(text, *, rows, columns):
    """The plot as booleans, four rows and two columns a character."""
    grid = np.zeros((4 * rows, 2 * columns), bool)
    bits = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (3, 0), (3, 1)]
    for y, line in enumerate(text.plain.split("\n")[1 : 1 + rows]):
        for x, character in enumerate(line[MARGIN:]):
            for bit, (down, right) in enumerate(bits):
                grid[4 * y + down, 2 * x + right] = (ord(character) - BLANK) >> bit & 1
    return grid


def draw(steps, values, *, columns=10, rows=5, **options):
    points = np.array(steps, float), np.array(values, float)
    return chart("t", {"a": points}, size=(columns + MARGIN, rows + 2), **options)


def test_a_rising_line_goes_from_corner_to_corner_without_gaps():
    grid = dots(draw(range(1001), range(1001)), rows=5, columns=10)
    assert grid[-1, 0]
    assert grid[0, -1]
    assert grid.any(axis=0).all()
    assert grid.any(axis=1).all()
    heights = grid.argmax(axis=0)
    assert (np.diff(heights) <= 0).all()


def test_a_constant_is_one_line_of_dots():
    grid = dots(draw([1, 2, 3], [5, 5, 5]), rows=5, columns=10)
    assert grid[0].all()
    assert not grid[1:].any()


def test_a_spike_does_not_flatten_the_rest():
    values = np.ones(1000)
    values[500] = 1e6
    grid = dots(draw(range(1000), values, columns=50), rows=5, columns=50)
    assert grid[:2, :40].any(axis=0).all()  # the constant is near the top
    assert grid.any(axis=0).all()


def test_values_below_zero_and_a_single_point():
    grid = dots(draw([1, 2], [-1, 1]), rows=5, columns=10)
    assert grid[-1, 0]
    assert grid[0, -1]
    assert dots(draw([7], [3]), rows=5, columns=10).sum() == 1


def test_gaps_are_bridged_and_axes_name_the_ends():
    text = draw([10, 20, 30], [0.5, np.nan, 1.0], unit="%")
    lines = text.plain.split("\n")
    assert lines[0] == "t  100.00 %"
    assert lines[1].startswith(" ")
    assert "%" in lines[1][:MARGIN]
    assert lines[5][:MARGIN].strip() == "0 %"
    assert lines[6].split() == ["10", "30"]
    assert dots(text, rows=5, columns=10).any(axis=0).all()


def test_several_curves_are_named_and_coloured():
    steps = np.arange(5.0)
    text = chart("loss", {"total": (steps, steps + 4), "ce": (steps, steps * 0)}, size=(40, 7))
    assert text.plain.split("\n")[0] == "loss  total 8  ce 0"
    assert {span.style for span in text.spans} >= {"cyan", "yellow"}


@pytest.mark.parametrize("values", [[], [np.nan]])
def test_nothing_to_draw(values):
    text = draw(range(len(values)), values)
    assert "nothing yet" in text.plain
    assert len(text.plain.split("\n")) == 7
