"""zsseg: fusing opinions, words that change, hidden classes, pseudo labels, official names, learning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.contracts import UserError
from segvit.systems import zsseg
from segvit.systems.zsseg import ZSSeg, convert, criterion, fuse, normalisers, zsseg_resnet101c
from tests.counting import gmacs

SEEN = torch.tensor([True, True, False])
VISION = {"width": 64, "layers": 1, "heads": 2, "patch_size": 16, "image_size": 32}


def tiny(**options: Any) -> ZSSeg:
    torch.manual_seed(0)
    sizes = {"dim": 64, "mask_dim": 16, "queries": 6, "layers": 2, "heads": 2, "hidden": 32, "embed_hidden": 32}
    common = {"num_classes": 3, "backbone": "resnet18", "embed_dim": 16, "region_size": 32, "dropout": 0.0}
    return zsseg.zsseg(**(common | sizes | {"vision": VISION} | options)).eval()


def test_seen_classes_trust_the_queries_and_unseen_ones_clip() -> None:
    queries, regions = torch.tensor([[0.5, 0.25, 0.2]] * 2), torch.tensor([[0.1, 0.6, 0.3]])
    scores = fuse(queries, regions, torch.tensor([False, True]), seen=SEEN, weight=0.8)
    torch.testing.assert_close(scores[0], torch.tensor([0.5**0.8, 0.25**0.8, 0.2**0.2]))
    expected = [0.5**0.8 * 0.1**0.2, 0.25**0.8 * 0.6**0.2, 0.2**0.2 * 0.3**0.8]
    torch.testing.assert_close(scores[1], torch.tensor(expected))
    alone = fuse(queries, regions, torch.tensor([False, True]), seen=SEEN, weight=0)
    assert torch.equal(alone, torch.cat([torch.zeros(1, 3), regions]))


def test_clip_names_the_regions_of_an_evaluation_only() -> None:
    model, images = tiny(), torch.randn(2, 3, 40, 70)
    with torch.no_grad():
        named, plain = model(images), tiny(regions=False)(images)
        assert torch.equal(model.train()(images).extras["scores"].sum(-1) <= 1, torch.ones(2, 6, dtype=torch.bool))
    assert named.covers == plain.covers == (64, 96)
    assert named.extras["scores"].shape == (2, 6, 3)
    assert not torch.allclose(named.extras["scores"], named.extras["class_logits"].softmax(-1)[..., :-1])


def test_masks_that_are_all_empty() -> None:
    model = tiny(threshold=0.999)
    with torch.no_grad():
        model.decoder.mask_embed.layers[-1].weight.zero_()
        out = model(torch.randn(1, 3, 32, 32))
    assert torch.isfinite(out.logits).all()


def test_other_words_need_no_training() -> None:
    model = tiny()
    model.set_classes(F.normalize(torch.randn(5, 16), dim=-1))
    assert not model.seen.any()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 32)).logits.shape == (1, 5, 8, 8)
    with pytest.raises(UserError, match="width 16"):
        model.set_classes(torch.randn(5, 8))


def test_labels_of_unseen_classes_are_hidden() -> None:
    model = tiny(unseen=[2], regions=False).train()
    masks = torch.randint(0, 3, (2, 64, 64))
    hidden = masks.masked_fill(masks == 2, 255)
    out = model(torch.randn(2, 3, 64, 64))
    first, second = (
        criterion(out, m, normalisers(m, num_classes=3, ignore_index=255), ignore_index=255) for m in (masks, hidden)
    )
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name])
    assert all(torch.isfinite(value) for value in first.values())
    assert out.extras["scores"][..., 2].max() == 0


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Some of a ResNet-101c's checkpoint by its names."""
    stem = {f"backbone.stem.conv{i}.{part}": torch.zeros(1) for i in (1, 2, 3) for part in ("weight", "norm.weight")}
    block = {
        f"backbone.res5.0.{name}": torch.zeros(1) for name in ("conv3.weight", "conv3.norm.bias", "shortcut.weight")
    }
    other = {"criterion.empty_weight": torch.zeros(1), "clip_adapter.non_object_embedding": torch.zeros(1)}
    text = {"clip_adapter.clip_model.token_embedding.weight": torch.zeros(1), "clip_adapter.pixel_mean": torch.zeros(1)}
    return state | stem | block | other | text


def test_official_names_are_those_of_the_network() -> None:
    with torch.device("meta"):
        model = zsseg_resnet101c(num_classes=3)
    own = set(model.state_dict())
    found = convert(official({"sem_seg_head.predictor.input_proj.bias": torch.zeros(1)}))
    assert set(found) <= own
    assert len(found) == 11


@pytest.mark.parametrize(("build", "millions"), [(zsseg.zsseg_resnet50, 42.00), (zsseg_resnet101c, 61.07)])
def test_trained_parameters_of_the_original(build: Any, millions: float) -> None:
    with torch.device("meta"):
        model = build(num_classes=3)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]  # the card's count leaves them out
    fixed = {id(p) for norm in norms for p in norm.parameters()}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in fixed)
    assert trained / 1e6 == pytest.approx(millions, abs=0.006)
    assert sum(p.numel() for p in model.regions.parameters()) / 1e6 == pytest.approx(86.19, abs=0.006)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "at_512", "at_640"), [(zsseg.zsseg_resnet50, 51.2, 79.2), (zsseg_resnet101c, 77.7, 120.5)]
)
def test_multiply_adds_of_the_original(build: Any, at_512: float, at_640: float) -> None:
    """Proposals alone, and a hundred crops through CLIP; measured on the official code."""
    with torch.device("meta"):
        model = build(num_classes=171).requires_grad_(False)
    for side, expected in ((512, at_512), (640, at_640)):
        mixing = 100 * 171 * (side // 4) ** 2  # of the masks by their scores, which the card leaves out
        assert gmacs(model, (side, side)) - mixing / 1e9 == pytest.approx(expected, abs=0.1)
    cells = 196 * 768 * 512  # of every patch to the joint space, where the official tower takes the image's alone
    assert 100 * (gmacs(model.regions.tower, (224, 224)) - cells / 1e9) == pytest.approx(1756.3, abs=0.5)


@pytest.mark.slow
def test_it_learns_two_halves() -> None:
    model = tiny(regions=False, num_classes=2).train()
    images = torch.zeros(2, 3, 64, 64)
    images[..., 32:] = 1
    masks = (images[:, 0] > 0).to(torch.uint8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        totals = normalisers(masks, num_classes=2, ignore_index=255)
        loss = torch.stack(list(criterion(model(images), masks, totals, ignore_index=255).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        out = model(images)
        found = zsseg.READOUT(out, (64, 64), range(64)).argmax(1)
    assert (found == masks).float().mean() > 0.95
