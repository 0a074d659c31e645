"""Sliding windows: mmseg's places, the average of overlaps, two resizes, each window once, few held."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from segvit.contracts import InputSpec, UserError
from segvit.inference.windows import WindowedScores, place_windows
from tests.inference.fake import FakeRuntime


def mmseg_boxes(size, window, stride):
    """The loop of mmseg's slide_inference, as (y1, y2, x1, x2)."""
    (high, wide), (h_crop, w_crop), (h_stride, w_stride) = size, window, stride
    h_grids = max(high - h_crop + h_stride - 1, 0) // h_stride + 1
    w_grids = max(wide - w_crop + w_stride - 1, 0) // w_stride + 1
    boxes = []
    for row in range(h_grids):
        for column in range(w_grids):
            y1, x1 = row * h_stride, column * w_stride
            y2, x2 = min(y1 + h_crop, high), min(x1 + w_crop, wide)
            boxes.append((max(y2 - h_crop, 0), y2, max(x2 - w_crop, 0), x2))
    return boxes


side = st.integers(1, 90)


@st.composite
def windows(draw):
    """A window and a stride that leaves no gap."""
    window = draw(st.tuples(side, side))
    return window, tuple(draw(st.integers(1, length)) for length in window)


@settings(deadline=None, max_examples=200)
@given(size=st.tuples(side, side), pair=windows())
def test_windows_lie_where_mmseg_puts_them(size, pair):
    window, stride = pair
    rows = place_windows(size, window, stride)
    assert [tuple(box) for row in rows for box in row] == mmseg_boxes(size, window, stride)


@settings(deadline=None, max_examples=60)
@given(size=st.tuples(side, side), pair=windows())
def test_windows_cover_everything_and_have_one_size(size, pair):
    window, stride = pair
    rows, seen = place_windows(size, window, stride), torch.zeros(size, dtype=torch.bool)
    for row in rows:
        assert len({(box.top, box.bottom) for box in row}) == 1
        for box in row:
            assert 0 <= box.top < box.bottom <= size[0]
            assert 0 <= box.left < box.right <= size[1]
            assert (box.bottom - box.top, box.right - box.left) == (min(window[0], size[0]), min(window[1], size[1]))
            seen[box.top : box.bottom, box.left : box.right] = True
    assert seen.all()


@pytest.mark.parametrize("stride", [(0, 8), (16, 17)])
def test_a_stride_that_leaves_gaps_or_never_moves_is_refused(stride):
    with pytest.raises(UserError, match="must lie between 1 and the window"):
        InputSpec(window=(16, 16), stride=stride)


def in_bands(view, size, height):
    parts = [view.rows_at(size, range(top, min(top + height, size[0]))) for top in range(0, size[0], height)]
    return torch.cat(parts, dim=1)


def by_hand(run, image):
    """Full-size scores of every window, added up and divided by the number of windows at each pixel."""
    size = tuple(image.shape[-2:])
    total, count = torch.zeros(len(run.classes), *size), torch.zeros(size)
    for top, bottom, left, right in mmseg_boxes(size, run.spec.window or size, run.spec.stride or size):
        total[:, top:bottom, left:right] += run.whole(image[None, :, top:bottom, left:right])[0]
        count[top:bottom, left:right] += 1
    return total / count


CASES = {
    "overlap": ((61, 83), (32, 40), (20, 24)),
    "thirds": ((50, 50), (30, 30), (10, 10)),
    "no overlap": ((64, 96), (32, 32), (32, 32)),
    "small": ((17, 29), (32, 40), (20, 24)),
    "low and wide": ((17, 90), (32, 40), (20, 24)),
}


@pytest.mark.parametrize("band", [1, 7, 1000])
@pytest.mark.parametrize("case", CASES)
def test_bands_equal_the_average_of_full_windows(case, band, seeded):
    size, window, stride = CASES[case]
    run, image = FakeRuntime(window=window, stride=stride), torch.randn(3, *size, generator=seeded)
    torch.testing.assert_close(
        in_bands(WindowedScores(run, image), size, band), by_hand(run, image), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("target", [(61, 83), (97, 41), (61, 120), (30, 83), (200, 210), (1, 1)])
@pytest.mark.parametrize("whole", [True, False])
def test_the_result_is_resized_a_second_time(target, whole, seeded):
    window = {} if whole else {"window": (32, 40), "stride": (20, 24)}
    run, image = FakeRuntime(**window), torch.randn(3, 61, 83, generator=seeded)
    expected = by_hand(run, image)[None]
    expected = F.interpolate(expected, size=target, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(in_bands(WindowedScores(run, image), target, 9), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_several_windows_at_once_change_nothing_but_the_number_of_calls(at_once, seeded):
    run, image = FakeRuntime(window=(32, 40), stride=(20, 24)), torch.randn(3, 61, 83, generator=seeded)
    scores = in_bands(WindowedScores(run, image, at_once=at_once), (61, 83), 9)
    rows = place_windows((61, 83), (32, 40), (20, 24))
    assert [shape[0] for shape in run.calls] == [
        min(at_once, len(row) - start) for row in rows for start in range(0, len(row), at_once)
    ]
    torch.testing.assert_close(scores, by_hand(run, image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", [(400, 40), (250, 40), (610, 40)])
def test_each_window_runs_once_and_passed_rows_are_forgotten(target, seeded):
    run = FakeRuntime(window=(32, 32), stride=(12, 20))
    view = WindowedScores(run, torch.randn(3, 400, 40, generator=seeded))
    held, band = [], 8
    for top in range(0, target[0], band):
        view.rows_at(target, range(top, min(top + band, target[0])))
        held.append(len(view.outputs))
    boxes = [box for row in view.boxes for box in row]
    assert len(run.calls) == len(boxes) > 50
    # Rows of windows that a band and the rows beside it can touch.
    assert max(held) <= math.ceil((32 + band * 400 / target[0] + 2) / 12) + 1
    assert held[-1] < len(view.boxes) / 4


def test_only_what_the_readout_needs_is_kept(seeded):
    view = WindowedScores(FakeRuntime(), torch.randn(3, 20, 20, generator=seeded))
    view.rows(range(5))
    assert view.outputs[0][0].extras == {}


def test_an_image_smaller_than_the_window_is_one_window_of_its_size(seeded):
    run = FakeRuntime(window=(64, 64), stride=(40, 40))
    WindowedScores(run, torch.randn(3, 20, 30, generator=seeded)).rows(range(20))
    assert run.calls == [(1, 3, 20, 30)]
