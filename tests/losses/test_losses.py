"""The losses against their formulas, and what they look up in label maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from segvit.contracts import Dense
from segvit.losses.cross_entropy import logits_at, pixel_counts, pixel_cross_entropy
from segvit.losses.masks import binary_targets, present_classes


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 99), st.sampled_from([255, 65535]))
def test_present_classes(images: int, classes: int, seed: int, ignore: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(0, classes + 1, (images, 3, 4), generator=generator, dtype=torch.int32)
    masks[masks == classes] = ignore
    present = present_classes(masks, num_classes=classes, ignore_index=ignore)
    expected = [[bool((mask == k).any()) for k in range(classes)] for mask in masks]
    assert present.tolist() == expected


def test_present_classes_up_to_the_ignore_id() -> None:
    masks = torch.tensor([[[0, 254, 255]]], dtype=torch.uint8)
    present = present_classes(masks, num_classes=255, ignore_index=255)
    assert present.nonzero().tolist() == [[0, 0], [0, 254]]


@pytest.mark.parametrize(("wrong", "ignore"), [(3, 255), (254, 255), (256, 255), (-1, 255), (300, 65535)])
def test_ids_that_are_no_class(wrong: int, ignore: int) -> None:
    masks = torch.zeros(2, 3, 3, dtype=torch.int32)
    masks[1, 1, 1] = wrong
    with pytest.raises(ValueError, match=rf"mask id {wrong} is neither a class \(0\.\.2\) nor {ignore}"):
        present_classes(masks, num_classes=3, ignore_index=ignore)


def test_binary_targets() -> None:
    masks = torch.tensor([[[0, 2, 255]], [[1, 1, 0]]], dtype=torch.uint8)
    pairs = present_classes(masks, num_classes=3, ignore_index=255).nonzero()
    assert pairs.tolist() == [[0, 0], [0, 2], [1, 0], [1, 1]]
    targets = binary_targets(masks, pairs)
    assert targets.dtype == torch.bool
    assert targets[:, 0].tolist() == [
        [True, False, False], [False, True, False], [False, False, True], [True, True, False]
    ]  # fmt: skip


def test_cross_entropy_is_divided_by_the_given_total(seeded: torch.Generator) -> None:
    logits, masks = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    masks[0, 0], masks[1, :, 2:] = 255, 255
    totals = pixel_counts(masks, num_classes=3, ignore_index=255)
    assert (int(totals["valid"]), int(totals["pixels"])) == (15 + 8, 40)
    loss = pixel_cross_entropy(logits, masks.to(torch.uint8), total=totals["valid"], ignore_index=255)
    torch.testing.assert_close(loss, F.cross_entropy(logits, masks, ignore_index=255))
    doubled = pixel_cross_entropy(logits, masks, total=2 * totals["valid"], ignore_index=255)
    torch.testing.assert_close(doubled, loss / 2)


def test_cross_entropy_of_ignored_pixels_is_zero() -> None:
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    masks = torch.full((1, 2, 2), 255)
    loss = pixel_cross_entropy(logits, masks, total=torch.tensor(0), ignore_index=255)
    loss.backward()
    assert loss == 0
    assert logits.grad.abs().max() == 0


def test_logits_at_interpolates_the_covered_area_and_crops(seeded: torch.Generator) -> None:
    out = Dense(torch.randn(1, 3, 3, 4, dtype=torch.bfloat16), {}, (24, 32))
    logits = logits_at(out, torch.zeros(1, 20, 25))
    full = F.interpolate(out.logits.float(), size=(24, 32), mode="bilinear", align_corners=False)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, full[..., :20, :25])
