"""The chart of a comparison: what is drawn, where, and that names can be read."""

from __future__ import annotations

import re

import pytest

from segvit.engine.scatter import LETTER, LINE, Point, best_for_cost, round_costs, scatter

CLOSE = [Point(f"model_number_{i}", 10 + 0.1 * i, 0.5 + 0.002 * i) for i in range(5)]


def names(figure: str) -> list[tuple[float, float, str]]:
    found = re.findall(r'<text class="name" style="[^"]*" x="([\d.-]+)" y="([\d.-]+)">([^<]+)<', figure)
    return [(float(x), float(y), name) for x, y, name in found]


def test_a_higher_value_stands_higher_and_a_higher_cost_to_the_right() -> None:
    figure = scatter("title", [Point("small", 1, 0.2), Point("large", 100, 0.6)], unit="GFLOPs")
    (x0, y0), (x1, y1) = re.findall(r'<circle[^>]*cx="([\d.]+)" cy="([\d.]+)"', figure)
    assert float(x0) < float(x1)
    assert float(y0) > float(y1)
    assert "large: 60.00 % at 100 GFLOPs" in figure


def test_names_of_close_points_do_not_meet() -> None:
    boxes = [(x, y, x + LETTER * len(name), y + LINE) for x, y, name in names(scatter("t", CLOSE, unit="ms"))]
    assert len(boxes) == 5
    for i, one in enumerate(boxes):
        for other in boxes[:i]:
            apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
            assert apart


def test_points_that_cannot_be_drawn_are_left_out() -> None:
    figure = scatter("t", [Point("a", 1, 0.5), Point("b", 0, 0.5), Point("c", 1, float("nan"))], unit="ms")
    assert [name for *_, name in names(figure)] == ["a"]
    assert scatter("t", [Point("c", 1, float("nan"))], unit="ms") == ""


def test_names_are_escaped() -> None:
    assert "&lt;b&gt;" in scatter("t", [Point("<b>", 1, 0.5)], unit="ms")


def test_the_front() -> None:
    points = [Point("worse", 2, 0.3), Point("best", 5, 0.8), Point("cheap", 1, 0.4), Point("twin", 5, 0.7)]
    assert [one.name for one in best_for_cost(points)] == ["cheap", "best"]


@pytest.mark.parametrize(("low", "high", "expected"), [(0.9, 11, [1, 2, 5, 10]), (0.05, 2000, [0.1, 1, 10, 100, 1000])])
def test_round_costs(low: float, high: float, expected: list[float]) -> None:
    assert round_costs(low, high) == pytest.approx(expected)


def test_large_costs_are_written_out() -> None:
    figure = scatter("t", [Point("a", 903, 0.4), Point("b", 827_399, 0.5)], unit="parameters")
    assert ">10&#8239;000<" in figure
    assert "b: 50.00 % at 827&#8239;399 parameters" in figure
    assert "e+" not in figure
