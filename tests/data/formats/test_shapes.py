import numpy as np
import pytest

from segvit.data.formats.polygons import rectangle
from segvit.data.formats.shapes import IGNORED, Bitmap, Ellipse, Polygons, Shape, draw


def test_labels_become_ids_in_painting_order():
    shapes = [
        Shape(0, Polygons((rectangle(0, 0, 6, 4),))),
        Shape(1, Ellipse((6.5, 4.5), (1, 1))),
        Shape(IGNORED, Bitmap(1, 0, np.ones((2, 1), bool))),
    ]
    mask = draw(shapes, (6, 8), ids=np.array([300, 4, 65535], np.uint16), fill=9)
    assert mask.dtype == np.uint16
    expected = np.full((6, 8), 9)
    expected[:4, :6] = 300
    expected[[3, 4, 4, 4, 5], [6, 5, 6, 7, 6]] = 4
    expected[:2, 1] = 65535
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(("left", "top"), [(-2, -1), (6, 4), (0, -9), (9, 0), (-9, 2), (2, 9)])
def test_bitmaps_are_cut_at_every_side(left, top):
    pixels = np.random.default_rng(0).random((4, 5)) < 0.6
    large = np.zeros((30, 30), np.uint8)
    large[10 + top : 14 + top, 10 + left : 15 + left] = pixels
    mask = draw([Shape(0, Bitmap(left, top, pixels))], (6, 8), ids=np.array([1, 255], np.uint8), fill=0)
    np.testing.assert_array_equal(mask, large[10:16, 10:18])
