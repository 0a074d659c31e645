"""Crops of regions: boxes, what is outside, blending, growing, empty masks."""

from __future__ import annotations

import torch

from segvit.nn.regions import grow, region_crops, tight_box

FILL = torch.tensor([9.0, 8.0, 7.0])


def test_a_crop_of_its_own_size_is_the_image_inside_and_the_fill_outside() -> None:
    image, masks = torch.rand(3, 10, 12), torch.zeros(1, 10, 12)
    masks[0, 2:6, 3:7] = 0.9
    masks[0, 2, 3] = 0.2
    crops, valid = region_crops(image, masks, side=4, fill=FILL)
    assert valid.tolist() == [True]
    expected = image[:, 2:6, 3:7].clone()
    expected[:, 0, 0] = FILL
    torch.testing.assert_close(crops[0], expected)


def test_soft_masks_blend() -> None:
    image, masks = torch.rand(3, 4, 4), torch.full((1, 4, 4), 0.75)
    crops, _ = region_crops(image, masks, side=4, fill=FILL, soft=True)
    torch.testing.assert_close(crops[0], 0.75 * image + 0.25 * FILL[:, None, None])


def test_masks_below_the_threshold_have_no_crop() -> None:
    masks = torch.stack([torch.full((5, 6), 0.5), torch.full((5, 6), 0.51)])
    crops, valid = region_crops(torch.rand(3, 5, 6), masks, side=8, fill=FILL)
    assert (crops.shape, valid.tolist()) == ((1, 3, 8, 8), [False, True])
    crops, valid = region_crops(torch.rand(3, 5, 6), masks, side=8, fill=FILL, threshold=0.6)
    assert (crops.shape, valid.tolist()) == ((0, 3, 8, 8), [False, False])


def test_boxes_grow_about_their_centre_and_stay_inside() -> None:
    inside = torch.zeros(20, 30, dtype=torch.bool)
    inside[4, 10] = inside[7, 19] = True
    box = tight_box(inside)
    assert box == (10, 4, 20, 8)
    assert grow(box, 1.0, height=20, width=30) == box
    assert grow(box, 1.5, height=20, width=30) == (7, 3, 22, 9)
    assert grow(box, 9.0, height=20, width=30) == (0, 0, 30, 20)
