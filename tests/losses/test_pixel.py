"""What all pixel losses share: ignored pixels, one value for whole and parts, weights and precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segvit.contracts import UserError
from segvit.losses.cross_entropy import pixel_counts
from segvit.losses.overlap import lovasz_softmax, soft_dice
from segvit.losses.pixel import pixel_losses

K = 4
OFF = {"cross_entropy": 0.0}
LOSSES: dict[str, dict[str, Any]] = {
    "ce": {},
    "focal": OFF | {"focal": 1.0},
    "ohem": OFF | {"ohem": 1.0, "ohem_min_kept": 7},
    "dice": OFF | {"dice": 1.0},
    "lovasz": OFF | {"lovasz": 1.0},
}
EXACT = [name for name in LOSSES if name != "ohem"]
WEIGHTS = torch.tensor([0.25, 0.5, 1.0, 3.0])


def batch(seed: int, *, images: int = 2, ignore: int = 255) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, K, 5, 6, generator=generator, dtype=torch.float64)
    masks = torch.randint(0, K + 1, (images, 5, 6), generator=generator, dtype=torch.int32)
    return logits, torch.where(masks == K, ignore, masks)


def loss(
    name: str, logits: Tensor, masks: Tensor, *, totals: dict[str, Tensor] | None = None, **options: Any
) -> Tensor:
    ignore = options.pop("ignore_index", 255)
    totals = totals or pixel_counts(masks, num_classes=K, ignore_index=ignore)
    terms = pixel_losses(logits, masks, totals, ignore_index=ignore, **LOSSES[name] | options)
    assert terms.keys() == {f"loss_{name}"}
    return terms[f"loss_{name}"]


def value_and_gradient(name: str, logits: Tensor, masks: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(name, leaf, masks, **options)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("ignore", [255, 65535])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 999), weighted=st.booleans())
def test_ignored_pixels_have_no_part(name: str, ignore: int, seed: int, weighted: bool) -> None:
    logits, masks = batch(seed, ignore=ignore)
    options: dict[str, Any] = {"ignore_index": ignore}
    if weighted and name not in ("dice", "lovasz"):
        options["class_weights"] = WEIGHTS
    ignored = (masks == ignore)[:, None].expand_as(logits)
    value, gradient = value_and_gradient(name, logits, masks, **options)
    assert gradient[ignored].abs().max() == 0
    again, same = value_and_gradient(name, torch.where(ignored, 50 * logits.flip(1), logits), masks, **options)
    assert torch.equal(value, again)
    assert torch.equal(gradient[~ignored], same[~ignored])


@pytest.mark.parametrize("name", LOSSES)
def test_ignoring_is_leaving_out(name: str) -> None:
    """Two rows ignored, or not there at all."""
    logits, masks = batch(1)
    masks = masks.clamp(max=K - 1)
    cut = masks[:, :3].clone()
    masks[:, 3:] = 255
    torch.testing.assert_close(loss(name, logits, masks), loss(name, logits[:, :, :3], cut))


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_but_ignored_pixels(name: str) -> None:
    logits, masks = batch(2)
    value, gradient = value_and_gradient(name, logits, torch.full_like(masks, 255))
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 999), cut=st.integers(1, 3), empty=st.booleans())
def test_parts_add_up_to_the_whole(name: str, seed: int, cut: int, empty: bool) -> None:
    logits, masks = batch(seed, images=4)
    if empty:
        masks[cut:] = 255
    totals = pixel_counts(masks, num_classes=K, ignore_index=255)
    whole, gradient = value_and_gradient(name, logits, masks)
    parts = [value_and_gradient(name, logits[part], masks[part], totals=totals) for part in (slice(cut), slice(cut, 4))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), gradient)


def test_ohem_in_parts_counts_each_by_its_pixels() -> None:
    """It chooses within each part, but equal parts weigh like their pixels."""
    logits, masks = batch(5)
    logits, masks = torch.cat([logits, logits]), torch.cat([masks, masks])
    totals = pixel_counts(masks, num_classes=K, ignore_index=255)
    halves = [loss("ohem", logits[part], masks[part], totals=totals) for part in (slice(2), slice(2, 4))]
    torch.testing.assert_close(halves[0] + halves[1], loss("ohem", logits[:2], masks[:2]))


@pytest.mark.parametrize(("name", "formula"), [("dice", soft_dice), ("lovasz", lovasz_softmax)])
def test_overlaps_are_means_over_present_classes_then_images(name: str, formula: Any) -> None:
    logits, masks = batch(4)
    masks[0] = torch.where(masks[0] < 2, 2, masks[0])  # two classes in this image
    expected = []
    for p, mask in zip(logits.softmax(1), masks, strict=True):
        valid = mask != 255
        present = [k for k in range(K) if (mask == k).any()]
        inside = torch.stack([mask[valid] == k for k in present])
        expected.append(formula(p[present][:, valid][:, None], inside[:, None]).mean())
    assert len(set(masks[0].flatten().tolist()) - {255}) == 2
    torch.testing.assert_close(loss(name, logits, masks), torch.stack(expected).mean())


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name: str) -> None:
    logits, masks = batch(3)
    logits, masks = logits[..., :2, :3], masks[..., :2, :3].contiguous()
    masks[0, 0, 0] = 255
    assert torch.autograd.gradcheck(lambda x: loss(name, x, masks), logits.clone().requires_grad_())


def test_a_sum_of_terms() -> None:
    logits, masks = batch(6)
    totals = pixel_counts(masks, num_classes=K, ignore_index=255)
    terms = pixel_losses(
        logits, masks, totals, ignore_index=255, cross_entropy=2.0, dice=0.5, lovasz=0.25, focal=3.0, ohem=1.0,
        gamma=1.5, ohem_min_kept=7,
    )  # fmt: skip
    assert list(terms) == ["loss_ce", "loss_focal", "loss_ohem", "loss_dice", "loss_lovasz"]
    torch.testing.assert_close(terms["loss_ce"], 2 * F.cross_entropy(logits, masks.long(), ignore_index=255))
    for name, factor in (("dice", 0.5), ("lovasz", 0.25), ("ohem", 1.0)):
        torch.testing.assert_close(terms[f"loss_{name}"], factor * loss(name, logits, masks))
    torch.testing.assert_close(terms["loss_focal"], 3 * loss("focal", logits, masks, gamma=1.5))


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_left_at_the_door(name: str) -> None:
    logits, masks = batch(7)
    value = loss(name, logits.bfloat16(), masks)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(name, logits.bfloat16().float(), masks))


@pytest.mark.parametrize("name", ["ce", "focal", "ohem"])
def test_class_weights_of_one_change_nothing(name: str) -> None:
    logits, masks = batch(8)
    plain = loss(name, logits, masks)
    torch.testing.assert_close(loss(name, logits, masks, class_weights=torch.ones(K)), plain)
    assert not torch.isclose(loss(name, logits, masks, class_weights=WEIGHTS), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cross_entropy": 0.0}, "all weights are 0"),
        ({"dice": -1.0}, r"dice is -1\.0"),
        ({"cross_entropy": 0.0, "dice": 1.0, "class_weights": WEIGHTS}, "class_balance acts on cross_entropy, focal"),
        ({"ohem": 1.0, "ohem_threshold": 0.0}, r"ohem_threshold 0\.0 must be"),
        ({"ohem": 1.0, "ohem_min_kept": -1}, "ohem_min_kept -1 a number"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    logits, masks = batch(9)
    totals = pixel_counts(masks, num_classes=K, ignore_index=255)
    with pytest.raises(UserError, match=message):
        pixel_losses(logits, masks, totals, ignore_index=255, **options)
