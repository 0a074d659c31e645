import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from segvit.contracts import UserError
from segvit.data.formats.rle import decode_brush, decode_counts, parse_coco_text
from tests.data.formats.maps import blobs
from tests.data.formats.outlines import brush_code, coco_text, runs

masks = nps.arrays(np.bool_, nps.array_shapes(min_dims=2, max_dims=2, max_side=12))


@given(masks)
@settings(deadline=None)
def test_counts_round_trip(mask):
    columns = decode_counts(runs(mask.T.ravel()), mask.shape, "a.json", by_columns=True)
    rows = decode_counts(runs(mask.ravel()), mask.shape, "a.json", by_columns=False)
    np.testing.assert_array_equal(columns, mask)
    np.testing.assert_array_equal(rows, mask)


def test_counts_go_down_the_columns():
    mask = decode_counts([2, 3, 1], (3, 2), "a.json", by_columns=True)
    np.testing.assert_array_equal(mask, [[0, 1], [0, 1], [1, 0]])


def test_text_worked_by_hand():
    assert parse_coco_text("231N", "a.json") == [2, 3, 1, 1]  # N = 30 = -2 in five bits, to be added to 3
    assert parse_coco_text("P1", "a.json") == [32]  # P = 0 with more to come, then 1 * 32


@given(st.lists(st.integers(0, 1 << 24), max_size=40))
def test_text_round_trips(counts):
    assert parse_coco_text(coco_text(counts), "a.json") == counts


def test_as_pycocotools_does_it():
    tools = pytest.importorskip("pycocotools.mask")
    mask = blobs(3, range(2)) == 1
    code = tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    counts = parse_coco_text(code["counts"].decode(), "a.json")
    np.testing.assert_array_equal(decode_counts(counts, mask.shape, "a.json", by_columns=True), mask)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([3, 4], r"a\.json: the RLE covers 7 pixels but 2x3 are 6"),
        ([], "covers 0 pixels"),
        ([9, -3], "no list of whole numbers from 0 up"),
        ([2.5, 3.5], "no list of whole numbers"),
        (None, "no list of whole numbers"),
        ([[3, 3]], "no list of whole numbers"),
    ],
)
def test_wrong_counts(counts, message):
    with pytest.raises(UserError, match=message):
        decode_counts(counts, (3, 2), "a.json", by_columns=True)


@pytest.mark.parametrize(
    ("text", "message"), [("2\u00e9", "cannot stand"), ("2 ", "cannot stand"), ("2P", "breaks off")]
)
def test_wrong_text(text, message):
    with pytest.raises(UserError, match=message):
        parse_coco_text(text, "a.json")


def rgba(mask, high=255):
    return np.repeat(mask.astype(np.uint8).ravel() * high, 4)


@given(masks)
@settings(deadline=None)
def test_brush_round_trips(mask):
    np.testing.assert_array_equal(decode_brush(brush_code(rgba(mask)), mask.shape, "a.json"), mask)


@given(nps.arrays(np.uint8, (3, 5, 4)), st.sampled_from([(3, 4, 8, 16), (1, 2, 3, 7), (16, 16, 16, 16)]))
@settings(deadline=None)
def test_brush_of_any_bytes_is_its_alpha(pixels, widths):
    found = decode_brush(brush_code(pixels.ravel(), widths), (3, 5), "a.json")
    np.testing.assert_array_equal(found, pixels[..., 3] >= 128)


def test_brush_longer_than_the_longest_run():
    mask = np.zeros((300, 300), bool)
    mask[100:, 50:] = True
    np.testing.assert_array_equal(decode_brush(brush_code(rgba(mask)), mask.shape, "a.json"), mask)


def test_brush_worked_by_hand():
    """Two pixels: the first transparent, the second with alpha 200 and red 7, green 8, blue 9."""
    head = f"{8:032b}" + "00111" + "0010" + "0011" + "0111" + "1111"  # 8 values of 8 bits; lengths of 3, 4, 8, 16 bits
    zeros = "1" + "00" + "011" + "00000000"  # repeated, width 3, 4 times, the byte 0
    given_ = "0" + "01" + "0011" + "".join(f"{value:08b}" for value in (7, 8, 9, 200))  # width 4, 4 bytes follow
    bits = head + zeros + given_
    bits += "0" * (-len(bits) % 8)
    code = [int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)]
    np.testing.assert_array_equal(decode_brush(code, (1, 2), "a.json"), [[False, True]])


CODE = brush_code(rgba(np.eye(6, dtype=bool)))


@pytest.mark.parametrize(
    ("code", "size", "message"),
    [
        (CODE, (6, 7), "144 values of 8 bits but the RGBA image of 7x6 has 168"),
        (CODE[:-3], (6, 6), "breaks off"),
        (CODE[:3], (6, 6), "breaks off"),
        ([300, 1], (6, 6), "no list of bytes"),
        (["a"], (6, 6), "no list of bytes"),
        ([0, 0, 0, 4, 57, 27, 252 | 1, 254, 0, 0], (1, 1), "runs past its 4 values"),
    ],
)
def test_wrong_brushes(code, size, message):
    with pytest.raises(UserError, match=message):
        decode_brush(code, size, "a.json")
