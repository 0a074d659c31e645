"""DuAT beyond the goldens: published counts, two classes as one logit, losses, official checkpoints, bad options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segvit.contracts import UserError
from segvit.model_folder import load_state
from segvit.nn.flops import count_parameters
from segvit.systems import duat
from segvit.systems.duat import GLSA, SBA, DuAT, GlobalAttention, convert, criterion, normalisers
from segvit.zoo import build_network
from tests.backbones.test_pyramid import official_pvt_v2, randomised
from tests.counting import gmacs


def build(num_classes: int = 2, **options: Any) -> DuAT:
    torch.manual_seed(0)
    return duat.duat(num_classes=num_classes, **({"backbone": "pvt_v2_b0", "dim": 8} | options)).eval()


def test_published_counts() -> None:
    """24,968,265 parameters, of which the official code never uses 17,382, and 10.721 G multiply-adds at 352."""
    with torch.device("meta"):
        model: Any = build_network("duat_pvt_v2_b2", num_classes=2)
    assert count_parameters(model) == 24_968_265 - 17_382
    assert count_parameters(model.backbone) == 24_849_856
    parts = [model.head.boundary, model.head.sba, model.head.deep, model.head.join, model.head.classify]
    assert [count_parameters(part) for part in parts] == [18_496, 10_912, 2_112, 3_136, 32]
    # Each of the official GLSA modules also holds the layers it never calls.
    unused = {"glsa4": 64 * 2 * 4 + 98 + 256 * 32 + 64, "glsa3": 610 + 160 * 32 + 64, "glsa2": 610 + 64 * 32 + 64}
    found = {name: count_parameters(getattr(model.head, name)) + extra for name, extra in unused.items()}
    assert found == {"glsa4": 37_123, "glsa3": 27_907, "glsa2": 18_691}
    assert gmacs(model, (352, 352)) == pytest.approx(10.721, abs=5e-4)


@torch.no_grad()
def test_two_classes_are_one_logit() -> None:
    model, images = build(), torch.randn(2, 3, 50, 70)
    out = model(images)
    assert out.extras["glsa"].shape == (2, 1, 8, 12)
    assert out.extras["sba"].shape == (2, 1, 16, 24)
    full = [F.interpolate(out.extras[name], size=(64, 96), mode="bilinear") for name in ("glsa", "sba")]
    scores = duat.READOUT(out, (50, 70), range(50))
    torch.testing.assert_close(scores.softmax(1)[:, 1], (full[0] + full[1]).sigmoid()[:, 0, :50, :70])
    assert build(3)(images).extras["sba"].shape == (2, 3, 16, 24)
    assert build(1)(images).logits.shape == (2, 1, 64, 96)


@torch.no_grad()
def test_gates_start_at_one_half() -> None:
    x = torch.randn(2, 6, 5, 4)
    torch.testing.assert_close(GlobalAttention(6)(x), 1.5 * x)


@torch.no_grad()
def test_the_coarse_map_reads_the_updated_fine_one() -> None:
    torch.manual_seed(0)
    module = SBA(4, 1).eval()
    coarse, fine = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3)
    before, low = module.fine_in(fine), module.coarse_in(coarse)
    gate, low_gate, sharp, deep = before.sigmoid(), low.sigmoid(), module.fine(before), module.coarse(low)
    mixed = sharp + sharp * gate + (1 - gate) * low_gate * deep
    filled = deep + deep * low_gate + (1 - low_gate) * gate * mixed
    torch.testing.assert_close(module(coarse, fine), module.classify(module.join(torch.cat([filled, mixed], 1))))


def official_loss(logits: Tensor, mask: Tensor, *, per_pixel: bool) -> Tensor:
    """The structure loss, one image after the other."""
    weight = 1 + 5 * (F.avg_pool2d(mask, 31, 1, 15) - mask).abs()
    entropy = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    p, losses = logits.sigmoid(), []
    for w, e, q, m in zip(weight, entropy, p, mask, strict=True):
        bce = (w * e).sum() / w.sum() if per_pixel else entropy.mean()
        overlap = (w * q * m).sum()
        losses.append(bce + 1 - (overlap + 1) / ((w * (q + m)).sum() - overlap + 1))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("reading", ["released", "per_pixel"])
def test_losses_of_both_paths(reading: str) -> None:
    out = build()(torch.randn(3, 3, 64, 64))
    masks = (torch.rand(3, 64, 64) < 0.3).to(torch.uint8)
    terms = criterion(out, masks, normalisers(masks, num_classes=2, ignore_index=255), reading=reading)
    assert list(terms) == ["loss_glsa_bce", "loss_glsa_iou", "loss_sba_bce", "loss_sba_iou"]
    full = [F.interpolate(out.extras[name], size=(64, 64), mode="bilinear") for name in ("glsa", "sba")]
    wanted = sum(official_loss(x, masks[:, None].float(), per_pixel=reading == "per_pixel") for x in full)
    torch.testing.assert_close(torch.stack(list(terms.values())).sum(), wanted)


@pytest.mark.parametrize("reading", ["released", "per_pixel"])
def test_each_of_several_classes_is_one_against_the_rest(reading: str) -> None:
    """The loss is the mean over the classes, and what is ignored changes nothing."""
    out = build(3)(torch.randn(2, 3, 64, 64))
    masks = torch.randint(0, 3, (2, 64, 64), dtype=torch.uint8)
    terms = criterion(out, masks, normalisers(masks, num_classes=3, ignore_index=255), reading=reading)
    single = []
    for k in range(3):
        part = out._replace(extras={name: out.extras[name][:, k : k + 1] for name in ("glsa", "sba")})
        part = part._replace(logits=torch.zeros(2, 2, 1, 1))  # two classes, so one logit for the second
        mask = (masks == k).to(torch.uint8)
        found = criterion(part, mask, normalisers(mask, num_classes=2, ignore_index=255), reading=reading)
        single.append(torch.stack(list(found.values())))
    torch.testing.assert_close(torch.stack(list(terms.values())), torch.stack(single).mean(0))


@pytest.mark.parametrize("reading", ["released", "per_pixel"])
def test_ignored_pixels_have_no_gradient(reading: str) -> None:
    masks = (torch.rand(2, 64, 64) < 0.3).to(torch.uint8)
    masks[:, :32] = 255
    out = build()(torch.randn(2, 3, 64, 64))
    fine = torch.randn(2, 1, 64, 64, requires_grad=True)
    out = out._replace(extras={"glsa": fine, "sba": fine})
    terms = criterion(out, masks, normalisers(masks, num_classes=2, ignore_index=255), reading=reading)
    torch.stack(list(terms.values())).sum().backward()
    assert fine.grad is not None
    assert (fine.grad[:, :, :32] == 0).all()
    assert (fine.grad[:, :, 32:] != 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reading": "paper"}, "reading is 'paper'; choose from released, per_pixel"),
        ({"window": 30}, "window is 30; give an odd number of pixels"),
    ],
)
def test_loss_options_that_do_not_exist(options: dict[str, Any], message: str) -> None:
    out, masks = build()(torch.randn(2, 3, 32, 32)), torch.zeros(2, 32, 32, dtype=torch.uint8)
    with pytest.raises(UserError, match=message):
        criterion(out, masks, normalisers(masks, num_classes=2, ignore_index=255), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 7}, "dim is 7; DuAT halves it"),
        ({"backbone": "pvt_v2_b9"}, "timm has no model 'pvt_v2_b9'"),
    ],
)
def test_what_cannot_be_built(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**options)


def test_maps_that_cannot_be_halved() -> None:
    with pytest.raises(UserError, match="a map has 17 channels, which DuAT halves"):
        GLSA(17, 8)


def official(model: DuAT, backbone: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names of the head, written out, with what their modules hold without using it."""
    names = {"boundary": "L_feature", "deep": "fuse", "join": "fuse2.0", "classify": "fuse2.1"}
    sba = {"fine_in": "fc1", "coarse_in": "fc2", "fine": "d_in1", "coarse": "d_in2", "join": "conv.0"}
    names |= {f"sba.{ours}": f"SBA.{theirs}" for ours, theirs in sba.items()} | {"sba.classify": "SBA.conv.1"}
    for i in (2, 3, 4):
        inside = {"local_in": "local_11conv", "global_in": "global_11conv", "join": "conv1_1"}
        inside |= {"global_attention.mask": "GlobelBlock.conv_mask"}
        inside |= {f"global_attention.mlp.{k}": f"GlobelBlock.channel_mul_conv.{k}" for k in (0, 1, 3)}
        inside["local_attention.last"] = "local.conv7.0"
        for k in range(3):
            for ours, number in (("points", 2 * k + 1), ("depths", 2 * k + 2)):
                inside[f"local_attention.{ours}.{k}.conv"] = f"local.conv{number}.0"
                inside[f"local_attention.{ours}.{k}.bn"] = f"local.conv{number}.1"
        names |= {f"glsa{i}.{ours}": f"GLSA_c{i}.{theirs}" for ours, theirs in inside.items()}
    theirs = {f"backbone.{key}": value for key, value in backbone.items()}
    for key, value in model.head.state_dict().items():
        place = max((name for name in names if key.startswith(f"{name}.")), key=len)
        theirs[key.replace(place, names[place], 1)] = value
    extra = ("GLSA_c3.conv1_1_1.bn.bias", "GLSA_c2.local.ca.fc1.weight", "GLSA_c4.local.sa.conv1.weight")
    return theirs | {key: torch.zeros(1) for key in extra}


def test_official_checkpoints() -> None:
    model = build()
    whole = randomised("pvt_v2_b0", num_classes=0)
    ours = convert(official(model, official_pvt_v2(whole)))
    assert ours.keys() == model.state_dict().keys()
    load_state(model, ours, source="test")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in ours.items())
    with pytest.raises(UserError, match="unknown"):
        load_state(model, ours | convert({"SBA.surprise": torch.ones(1)}), source="test")
