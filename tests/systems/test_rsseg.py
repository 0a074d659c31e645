"""RSSeg by its behaviour, since there is nothing official to compare with: separation, supervision, sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segvit.contracts import Classes, Dense, UserError
from segvit.model_folder import match_classes
from segvit.nn.flops import count_parameters
from segvit.systems import rsseg
from segvit.systems.rsseg import (
    AdaptiveSeparation,
    LocalPathway,
    RSSeg,
    convert,
    criterion,
    discrepancy,
    normalisers,
    region_losses,
)
from segvit.zoo import build_network, create_model

K = 4
TINY: dict[str, Any] = {
    "num_classes": K, "backbone": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "depth": 4,
    "embed_dim": 64, "out_indices": (0, 1, 2, 3), "dim": 32, "heads": 4, "layers": 2, "dropout": 0.0, "drop_path": 0.0,
}  # fmt: skip


def build(**options: Any) -> RSSeg:
    torch.manual_seed(0)
    return rsseg.rsseg(**(TINY | options)).eval()


def test_discrepancy_is_what_neighbours_do_not_share(seeded: torch.Generator) -> None:
    assert discrepancy(torch.full((1, 2, 4, 5), 3.0)).abs().max() < 1e-6  # at the border too
    x = torch.randn(1, 1, 5, 6)
    found = discrepancy(x)
    torch.testing.assert_close(found[0, 0, 2, 3], x[0, 0, 2, 3] - x[0, 0, 1:4, 2:5].mean())
    torch.testing.assert_close(found[0, 0, 0, 0], x[0, 0, 0, 0] - x[0, 0, :2, :2].mean())


@torch.no_grad()
def test_the_local_pathway_sees_differences_alone(seeded: torch.Generator) -> None:
    pathway = LocalPathway((8, 8, 8), 16)
    maps = [torch.randn(1, 8, 6, 7) for _ in range(3)]
    lifted = [m + torch.randn(1, 8, 1, 1) for m in maps]
    torch.testing.assert_close(pathway(lifted, (6, 7)), pathway(maps, (6, 7)), atol=1e-4, rtol=1e-4)
    other = [maps[0] + torch.randn(1, 8, 6, 7), *maps[1:]]  # the shallowest map reaches the end
    assert (pathway(other, (6, 7)) - pathway(maps, (6, 7))).abs().max() > 0.1


@torch.no_grad()
def test_the_pathways_are_decoupled(seeded: torch.Generator) -> None:
    """Nothing of the local pathway goes back into the backbone."""
    model, images = build(), torch.randn(1, 3, 32, 32)
    before = [m.clone() for m in model.backbone(images).maps]
    seen: list[Tensor] = []
    model.head.local.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[0]))
    model(images)
    assert all(torch.equal(a, b) for a, b in zip(seen, before, strict=True))


@pytest.mark.parametrize("kernel", [3, 5])
@torch.no_grad()
def test_the_local_mean_is_taken_inside_the_map(kernel: int, seeded: torch.Generator) -> None:
    separation = AdaptiveSeparation(8, kernel=kernel)
    x = torch.randn(2, 8, 5, 4)
    found, half = separation.local_mean(x), kernel // 2
    scores = separation.weigh(x)
    for image, row, column in ((0, 0, 0), (1, 2, 1), (0, 4, 3), (1, 0, 2)):
        places = [(i, j) for i in range(row - half, row + half + 1) for j in range(column - half, column + half + 1)]
        kept = [number for number, (i, j) in enumerate(places) if 0 <= i < 5 and 0 <= j < 4]
        weights = scores[image, kept, row, column].softmax(0)
        cells = torch.stack([x[image, :, places[number][0], places[number][1]] for number in kept])
        torch.testing.assert_close(found[image, :, row, column], weights @ cells)


@torch.no_grad()
def test_separation_moves_cells_apart(seeded: torch.Generator) -> None:
    separation = AdaptiveSeparation(8, kernel=3)
    smooth = F.avg_pool2d(torch.randn(2, 8, 20, 20), 5, stride=1)
    separated = separation(smooth)
    torch.testing.assert_close(separated, smooth + 0.5 * (smooth - separation.local_mean(smooth)))  # half open at first
    assert discrepancy(separated).norm() > 1.3 * discrepancy(smooth).norm()
    flat = torch.randn(2, 8, 1, 1).expand(2, 8, 6, 6)
    torch.testing.assert_close(separation(flat), flat)  # nothing to separate
    separation.gate.bias.fill_(-50.0)
    torch.testing.assert_close(separation(smooth), smooth)  # a shut gate


@torch.no_grad()
def test_separation_adapts_to_the_place(seeded: torch.Generator) -> None:
    separation = AdaptiveSeparation(8, kernel=3)
    scores = separation.weigh(torch.randn(1, 8, 6, 6))
    assert scores.shape == (1, 9, 6, 6)
    assert scores.flatten(2).std(2).min() > 0


def test_supervision_of_every_layer_in_training_only(seeded: torch.Generator) -> None:
    model, images = build(), torch.randn(2, 3, 32, 40)
    assert model(images).extras == {}
    logits = model(images).logits
    out = model.train()(images)
    shapes = {name: tuple(value.shape) for name, value in out.extras.items()}
    regions, masks, pixels = (2, K, K + 1), (2, K, 4, 5), (2, K, 4, 5)
    assert shapes == {"regions0": regions, "masks0": masks, "regions1": regions, "masks1": masks, "aux": pixels}
    torch.testing.assert_close(out.logits, logits, atol=1e-5, rtol=1e-4)  # the fused attention of inference


def test_masks_are_the_attention_of_their_layer(seeded: torch.Generator) -> None:
    layer = rsseg.DiscriminativeLayer(16, heads=2, dropout=0.0).train()
    queries, memory = torch.randn(1, K, 16), torch.randn(1, 12, 16)
    _, regions, masks = layer(queries, memory)
    q, k, v = layer.q(queries), layer.k(memory), layer.v(memory)
    scores = torch.stack([a @ b.mT / 8**0.5 for a, b in zip(q.chunk(2, -1), k.chunk(2, -1), strict=True)], 1)
    torch.testing.assert_close(masks, scores.mean(1))
    mixed = torch.cat([a.softmax(-1) @ b for a, b in zip(scores.unbind(1), v.chunk(2, -1), strict=True)], -1)
    torch.testing.assert_close(regions, layer.proj(mixed))


def supervised() -> tuple[Dense, Tensor]:
    masks = torch.randint(0, K - 1, (2, 20, 30), dtype=torch.uint8)  # the last class is absent
    masks[1][masks[1] == 0] = 255
    extras = {"regions0": torch.randn(2, K, K + 1), "masks0": torch.randn(2, K, 5, 8), "aux": torch.randn(2, K, 5, 8)}
    return Dense(torch.randn(2, K, 5, 8), extras, (20, 32)), masks


def test_region_losses_by_hand(seeded: torch.Generator) -> None:
    out, masks = supervised()
    totals = normalisers(masks, num_classes=K, ignore_index=255)
    assert {key: int(value) for key, value in totals.items()} == {
        "valid": int((masks != 255).sum()), "pixels": 1200, "images": 2, "present": 5,
    }  # fmt: skip
    found = region_losses(out, masks, totals, ignore_index=255, class_weights=None, absent=0.1)
    pairs = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2)]
    entropy, focal, dice = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for image in range(2):
        for label in range(K):
            here = (image, label) in pairs
            scores = out.extras["regions0"][image, label].log_softmax(0)
            entropy = entropy - (scores[label] if here else 0.1 * scores[K])
            if here:
                full = F.interpolate(out.extras["masks0"], size=(20, 32), mode="bilinear", align_corners=False)[
                    ..., :30
                ]
                p, t = full[image, label].sigmoid(), (masks[image] == label).float()
                right = t * p + (1 - t) * (1 - p)
                focal = focal - ((0.25 * t + 0.75 * (1 - t)) * (1 - right) ** 2 * right.log()).mean()
                dice = dice + 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    expected = {
        "loss_region_0": entropy / (5 + 0.1 * 3), "loss_mask_focal_0": focal / 5, "loss_mask_dice_0": dice / 5,
    }  # fmt: skip
    torch.testing.assert_close(found, expected)
    doubled = region_losses(out, masks, totals, ignore_index=255, class_weights=torch.full((K,), 2.0), absent=0.1)
    torch.testing.assert_close(doubled["loss_mask_dice_0"], 2 * expected["loss_mask_dice_0"])


def test_the_criterion(seeded: torch.Generator) -> None:
    out, masks = supervised()
    totals = normalisers(masks, num_classes=K, ignore_index=255)
    found = criterion(out, masks, totals)
    assert list(found) == ["loss_ce", "loss_aux_ce", "loss_region_0", "loss_mask_focal_0", "loss_mask_dice_0"]
    full = F.interpolate(out.logits, size=(20, 32), mode="bilinear", align_corners=False)[..., :30]
    torch.testing.assert_close(found["loss_ce"], F.cross_entropy(full, masks.long(), ignore_index=255))
    plain = region_losses(out, masks, totals, ignore_index=255, class_weights=None, absent=0.1)
    torch.testing.assert_close(found["loss_mask_focal_0"], 20 * plain["loss_mask_focal_0"])
    changed = criterion(out, masks, totals, aux_weight=0.2, region_weight=3.0, mask_focal=1.0, mask_dice=2.0, dice=1.0)
    torch.testing.assert_close(changed["loss_aux_ce"], found["loss_aux_ce"] / 2)
    torch.testing.assert_close(changed["loss_region_0"], 3 * plain["loss_region_0"])
    torch.testing.assert_close(changed["loss_mask_dice_0"], 2 * plain["loss_mask_dice_0"])
    assert {"loss_dice", "loss_aux_dice"} <= changed.keys()
    bare = criterion(out._replace(extras={}), masks, totals)  # as in evaluation
    assert list(bare) == ["loss_ce"]


def test_supervision_makes_regions_discriminative(seeded: torch.Generator) -> None:
    """Trained by the region terms alone, the regions of present classes are told apart from those of absent ones."""
    model, images = build(), torch.randn(2, 3, 32, 32)
    head = model.head.train()
    masks = torch.zeros(2, 32, 32, dtype=torch.uint8)
    masks[:, :, 16:], masks[1, 16:] = 1, 2
    totals = normalisers(masks, num_classes=K, ignore_index=255)
    with torch.no_grad():
        maps = model.backbone(images).maps
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(80):
        logits, extras = head(maps, (4, 4))
        out = Dense(logits, extras, (32, 32))
        terms = region_losses(out, masks, totals, ignore_index=255, class_weights=None, absent=1.0)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
    for layer in range(2):
        assert out.extras[f"regions{layer}"].argmax(-1).tolist() == [[0, 1, K, K], [0, 1, 2, K]]


@torch.no_grad()
def test_classes_have_no_order(seeded: torch.Generator) -> None:
    palette = tuple((i, i, i) for i in range(3))
    options = {name: value for name, value in TINY.items() if name not in ("num_classes", "backbone")}
    source = create_model("rsseg_vit_tiny", classes=Classes(("ape", "bee", "cat"), palette), **options).eval()
    turned = create_model("rsseg_vit_tiny", classes=Classes(("cat", "bee", "ape"), palette), **options).eval()
    match_classes(turned, source)
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(turned(images).logits, source(images).logits.flip(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (37, 61), (8, 8), (5, 90)])
@torch.no_grad()
def test_any_size(size: tuple[int, int]) -> None:
    out = build()(torch.randn(1, 3, *size))
    covers = tuple(-(-side // 8) * 8 for side in size)
    assert out.covers == covers
    assert out.logits.shape == (1, K, covers[0] // 8, covers[1] // 8)
    assert torch.isfinite(out.logits).all()


@pytest.mark.parametrize("backbone", ["pvt_v2_b0", "swin_tiny_patch4_window7_224"])
def test_pyramids_work_at_stride_8(backbone: str) -> None:
    model: Any = rsseg.rsseg_pyramid(num_classes=K, backbone=backbone, dim=32, heads=4, layers=1).train()
    out = model(torch.randn(2, 3, 70, 100))
    assert out.covers == (96, 128)
    assert out.logits.shape == out.extras["masks0"].shape == (2, K, 12, 16)
    out.logits.square().mean().backward()
    assert all(enter[1].weight.grad.abs().max() > 0 for enter in model.head.local.enter)


def test_size_of_the_published_model() -> None:
    """330 M parameters are published for ViT-L with BEiT's weights on ADE20K; ours should be near."""
    with torch.device("meta"):
        model: Any = build_network("rsseg_beit_large", num_classes=150, image_size=640)
    assert 320e6 < count_parameters(model) < 335e6
    assert 15e6 < count_parameters(model.head) < 30e6
    assert model.backbone.out_indices == (5, 11, 17, 23)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "dim 32 must be a multiple of 4 and of its heads 3"),
        ({"kernel": 4}, "an odd number of cells from 3 on, not 4"),
        ({"kernel": 1}, "not 1; set kernel to 3, 5 or 7"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**options)


def test_there_are_no_official_weights() -> None:
    with pytest.raises(UserError, match="no weights of RSSeg were published, so this file of 1 tensors"):
        convert({"a": torch.zeros(1)})
