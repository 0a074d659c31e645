"""PVT v1 beyond the goldens: published counts, any size, position rules, official checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from segvit.backbones.pvt import DEPTHS, PVT, PVTClassifier, pvt
from segvit.contracts import UserError
from segvit.nn.flops import count_parameters
from tests.counting import fvcore_gmacs, gmacs

TINY: dict[str, Any] = {"depths": (1, 2, 1, 1), "dims": (8, 16, 20, 32), "image_size": 64}


def build(**options: Any) -> PVT:
    torch.manual_seed(0)
    return pvt("pvt_tiny", **(TINY | options)).eval()


# Parameters of the classifier and the dense backbone, multiply-adds of the latter at 224 and 512 and, by fvcore, of the
# classifier at 224; measured on the official code.
PUBLISHED = {
    "pvt_tiny": (13_229_288, 12_714_752, 1.926, 11.744, 1.944),
    "pvt_small": (24_485_864, 23_971_328, 3.805, 23.029, 3.834),
    "pvt_medium": (44_208_104, 43_693_568, 6.649, 39.512, 6.686),
    "pvt_large": (61_369_320, 60_854_784, 9.804, 58.083, 9.851),
}
# The official code resizes the positions of stages 2 to 4 even to the size that they have; fvcore counts 4 an element.
IDLE_RESIZES = 4 * (28**2 * 128 + 14**2 * 320 + 7**2 * 512) / 1e9
HEAVY = ("pvt_medium", "pvt_large")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in HEAVY else []) for n in PUBLISHED])
def test_published_counts(name: str) -> None:
    with torch.device("meta"):
        backbone = pvt(name)
        classifier = PVTClassifier(backbone, 1000)
    whole, dense, small, large, by_fvcore = PUBLISHED[name]
    assert (count_parameters(classifier), count_parameters(backbone)) == (whole, dense)
    assert gmacs(backbone, (224, 224)) == pytest.approx(small, abs=1e-3)
    assert gmacs(backbone, (512, 512)) == pytest.approx(large, abs=1e-3)
    assert fvcore_gmacs(classifier, (224, 224)) + IDLE_RESIZES == pytest.approx(by_fvcore, abs=1e-3)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (128, 128), (256, 256), (64, 256), (37, 101), (33, 32), (1, 1), (5, 70)])
@torch.no_grad()
def test_any_size(size: tuple[int, int], strict: bool) -> None:
    """128, 256 and 64 x 256 stop the official code where positions are for 64: its test mistakes the stage."""
    features = build(strict_positions=strict)(torch.randn(1, 3, *size))
    height, width = (max(side, 32) for side in size)
    assert features.covers == (height, width)
    assert features.grid == (height // 4, width // 4)
    for x, dim, stride in zip(features.maps, TINY["dims"], features.strides, strict=True):
        assert x.shape == (1, dim, height // stride, width // stride)
        assert torch.isfinite(x).all()


@torch.no_grad()
def test_small_images_are_padded_with_zeros(seeded: torch.Generator) -> None:
    network, images = build(), torch.randn(2, 3, 20, 40)
    padded = F.pad(images, (0, 0, 0, 12))
    for mine, theirs in zip(network(images).maps, network(padded).maps, strict=True):
        assert torch.equal(mine, theirs)


@torch.no_grad()
def test_positions_follow_the_shape_of_the_grid() -> None:
    stored = build().get_parameter("pos_embed1")
    resized = F.interpolate(stored.mT.unflatten(2, (16, 16)), size=(8, 32), mode="bilinear", align_corners=False)
    assert torch.equal(build().positions(1, (16, 16)), stored)
    torch.testing.assert_close(build().positions(1, (8, 32)), resized.flatten(2).mT)
    assert torch.equal(build(strict_positions=True).positions(1, (8, 32)), stored)  # as many tokens: the official way
    torch.testing.assert_close(build(strict_positions=True).positions(1, (8, 16)), build().positions(1, (8, 16)))


@torch.no_grad()
def test_the_class_token_has_the_first_slot_of_the_last_stage() -> None:
    network = build()
    slots = network.get_parameter("pos_embed4")
    assert slots.shape == (1, 2 * 2 + 1, 32)
    assert torch.equal(network.positions(4, (2, 2)), slots[:, 1:])
    before = network(torch.ones(1, 3, 64, 64)).maps[-1]
    slots[:, 0] += 1
    assert torch.equal(network(torch.ones(1, 3, 64, 64)).maps[-1], before)


def test_parts() -> None:
    network = build(drop_path=0.2)
    blocks = [block for stage in range(1, 5) for block in network.get_submodule(f"block{stage}").children()]
    assert [block.drop_path.drop_prob for block in blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    norms = {name: module for name, module in network.named_modules() if isinstance(module, nn.LayerNorm)}
    assert {(name.split(".")[-1], norm.eps) for name, norm in norms.items()} == {
        ("norm", 1e-5), ("norm1", 1e-6), ("norm2", 1e-6)
    }  # fmt: skip
    large = pvt("pvt_tiny", depths=(1, 1, 1, 1))
    assert large.get_parameter("pos_embed1").std().item() == pytest.approx(0.02, rel=0.05)
    assert large.get_submodule("block4.0.mlp.fc1").weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert large.get_submodule("block4.0.mlp.fc1").bias.abs().max() == 0


def official(network: PVT) -> dict[str, Tensor]:
    """A classifier's checkpoint: its keys are ours, and there are a token, a norm and a head."""
    state = network.state_dict()
    assert {"patch_embed1.proj.weight", "pos_embed4", "block1.0.attn.sr.weight", "block2.1.mlp.fc2.bias"} <= set(state)
    return state | {
        "cls_token": torch.zeros(1, 1, 32), "norm.weight": torch.ones(32), "norm.bias": torch.zeros(32),
        "head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10),
    }  # fmt: skip


@pytest.mark.parametrize("wrapped", [False, True])
def test_official_checkpoints(wrapped: bool, tmp_path: Path) -> None:
    source = build()
    theirs = official(source)
    if wrapped:  # as a segmentation model saves it
        theirs = {f"backbone.{key}": value for key, value in theirs.items()}
        theirs |= {"neck.lateral_convs.0.conv.weight": torch.zeros(1), "decode_head.conv_seg.bias": torch.zeros(1)}
    path = tmp_path / "official.pth"
    torch.save({"state_dict": theirs} if wrapped else theirs, path)
    torch.manual_seed(1)
    loaded = pvt("pvt_tiny", weights=str(path), **TINY)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_checkpoints_of_other_sizes_and_channels(tmp_path: Path) -> None:
    source, path = build(), tmp_path / "official.safetensors"
    save_file(official(source), path)
    larger = pvt("pvt_tiny", weights=str(path), **(TINY | {"image_size": 96}))
    for stage, side in ((1, 24), (4, 3)):
        slots = larger.get_parameter(f"pos_embed{stage}")
        torch.testing.assert_close(slots[:, -(side**2) :], source.positions(stage, (side, side)))
    assert torch.equal(larger.get_parameter("pos_embed4")[:, 0], source.get_parameter("pos_embed4")[:, 0])
    gray = pvt("pvt_tiny", weights=str(path), in_channels=1, **TINY)
    kernel = source.get_submodule("patch_embed1").proj.weight
    torch.testing.assert_close(gray.get_submodule("patch_embed1").proj.weight, kernel.sum(1, keepdim=True))
    assert gray.mean == (0.5,)


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "official.safetensors"
    save_file(official(build()), path)
    for changed in ({"depths": (2, 2, 1, 1)}, {"dims": (8, 16, 20, 40)}):
        with pytest.raises(UserError, match="does not fit this PVT") as caught:
            pvt("pvt_tiny", weights=str(path), **(TINY | changed))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such weights file"):
        pvt("pvt_tiny", weights=str(tmp_path / "nothing.pth"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "pvt_huge"}, "no PVT 'pvt_huge'; choose from pvt_tiny, pvt_small"),
        ({"depths": (1, 1)}, "must have 4 values each"),
        ({"depths": (1, 1, 0, 1)}, "depths from 1"),
        ({"dims": (8, 16, 24, 32)}, r"multiples of the numbers of heads \[1, 2, 5, 8\]"),
        ({"image_size": 16}, "images of 32 pixels a side or more, not 16"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pvt(**({"name": "pvt_tiny"} | TINY | options))


def test_depths_are_those_of_the_paper() -> None:
    assert [sum(depths) for depths in DEPTHS.values()] == [8, 16, 28, 41]
