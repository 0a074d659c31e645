import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from scipy import ndimage

from segvit.data.formats.polygons import fill_ellipse, fill_polygon, rectangle, turned
from tests.data.formats.maps import blobs
from tests.data.formats.outlines import keyhole, painted

HALF = Fraction(1, 2)

quarters = st.integers(-20, 80).map(lambda n: n / 4)
quarter_points = st.lists(st.tuples(quarters, quarters), min_size=3, max_size=9)
anywhere = st.floats(-8, 24, allow_nan=False)
any_points = st.lists(st.tuples(anywhere, anywhere), min_size=3, max_size=9)


def filled(points, size=(16, 16)):
    mask = np.zeros(size, np.uint8)
    fill_polygon(mask, np.array(points, float), 1)
    return mask


def by_definition(points, size):
    """The rule, pixel by pixel and in exact fractions."""
    corners = [(Fraction(x), Fraction(y)) for x, y in points]
    mask = np.zeros(size, np.uint8)
    for row, column in np.ndindex(size):
        for (x, y), (x_end, y_end) in zip(corners, corners[1:] + corners[:1], strict=True):
            if min(y, y_end) <= row + HALF < max(y, y_end):
                mask[row, column] ^= x + (row + HALF - y) * (x_end - x) / (y_end - y) <= column + HALF
    return mask


@given(quarter_points)
@settings(max_examples=60, deadline=None)
def test_centres_by_the_even_odd_rule(points):
    np.testing.assert_array_equal(filled(points, (12, 14)), by_definition(points, (12, 14)))


@given(any_points)
@settings(max_examples=150, deadline=None)
def test_a_polygon_is_the_sum_of_its_triangles(points):
    """Neighbours share edges: with a gap or an overlap anywhere the triangles would not add up to the whole."""
    total = np.zeros((16, 16), np.uint8)
    for second, third in itertools.pairwise(points[1:]):
        total ^= filled([points[0], second, third])
    np.testing.assert_array_equal(total, filled(points))


@given(st.lists(anywhere, min_size=5, max_size=5), st.lists(anywhere, min_size=5, max_size=5))
@settings(max_examples=100, deadline=None)
def test_two_sides_of_a_line_tile_the_image(xs, ys):
    line = list(zip(xs, ys, strict=True))
    left = filled([(-99, -99), (8, -99), *line, (8, 99), (-99, 99)])
    right = filled([(8, 99), *line[::-1], (8, -99), (99, -99), (99, 99)])
    np.testing.assert_array_equal(left ^ right, 1)


@pytest.mark.parametrize("seed", range(3))
def test_pixel_edges_give_the_region_back(seed):
    ids = blobs(seed, range(4))
    for index in range(4):
        np.testing.assert_array_equal(filled(keyhole(ids == index), ids.shape), ids == index)
    canvas = np.full(ids.shape, 99, np.uint8)
    for index, outline in painted(ids):
        fill_polygon(canvas, np.array(outline, float), index)
    np.testing.assert_array_equal(canvas, ids)


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_pillow_off_the_outline(seed):
    rng = np.random.default_rng(seed)
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    points = np.stack([np.cos(angles), np.sin(angles)], 1) * rng.uniform(20, 45, (40, 1)) + (50, 48)
    picture = Image.new("1", (104, 96))
    ImageDraw.Draw(picture).polygon([tuple(point) for point in points.tolist()], fill=1)
    theirs, ours = np.array(picture), filled(points, (96, 104)).astype(bool)
    assert ours[ndimage.binary_erosion(theirs, iterations=2)].all()
    assert not ours[~ndimage.binary_dilation(theirs, iterations=2)].any()
    assert 2000 < ours.sum() < 5000


def test_outside_is_cut_off():
    assert filled([(-5, -5), (99, -5), (99, 99), (-5, 99)]).all()
    assert not filled([(20, 2), (30, 2), (30, 9)]).any()
    assert not filled([(2, -9), (30, -9), (30, -1)]).any()
    assert not filled([(3, 3), (9, 3), (5, 3)]).any()


def test_rectangle_covers_whole_pixels():
    mask = filled(rectangle(9, 7, 4, 2))  # from any corner
    assert mask.sum() == 25
    assert mask[2:7, 4:9].all()


def test_turned_is_clockwise_on_the_screen():
    np.testing.assert_allclose(turned(np.array([[2.0, 1.0]]), (1, 1), 90), [[1, 2]], atol=1e-12)


def test_ellipse_holds_the_centres_within():
    y, x = np.mgrid[:30, :40] + 0.5
    mask = np.zeros((30, 40), np.uint8)
    fill_ellipse(mask, (18.3, 14.2), (11, 6.5), 0, 3)
    np.testing.assert_array_equal(mask == 3, ((x - 18.3) / 11) ** 2 + ((y - 14.2) / 6.5) ** 2 <= 1)


def test_a_turned_ellipse():
    upright, across, slanted = np.zeros((3, 30, 30), np.uint8)
    fill_ellipse(upright, (15, 15), (4, 12), 0, 1)
    fill_ellipse(across, (15, 15), (12, 4), 90, 1)
    np.testing.assert_array_equal(upright, across)
    fill_ellipse(slanted, (15, 15), (12, 4), 45, 1)
    assert slanted[22, 22]  # along x, turned clockwise: to the right and down
    assert not slanted[22, 8]


def test_an_ellipse_beyond_the_image_is_cut_off():
    mask = np.zeros((8, 8), np.uint8)
    fill_ellipse(mask, (-2, 9), (5, 5), 30, 1)
    assert mask[-1, 0]
    assert not mask[0].any()
    fill_ellipse(mask, (99, 99), (5, 5), 0, 2)
    assert not (mask == 2).any()
