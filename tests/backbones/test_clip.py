"""CLIP's image towers against open_clip's own, at other sizes, with adapters, and the counts of the card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from segvit.adapters.lora import lora
from segvit.adapters.pro_tuning import pro_tuning
from segvit.adapters.spm import spm
from segvit.adapters.vpt import vpt_deep
from segvit.backbones.clip import ClipResNet, clip_backbone, clip_towers, clip_vit, convert_vision
from segvit.backbones.vit import PlainViT
from segvit.contracts import UserError
from segvit.text.architecture import clip_config
from segvit.text.tokenize import tokenize
from tests.text.clips import clip_file, openai_state, tiny_clip

SIDE = {"vit": 32, "rn": 64}


def build(kind: str, tmp_path: Path, **options: Any) -> PlainViT | ClipResNet:
    return clip_backbone(weights=str(clip_file(tmp_path / f"{kind}.safetensors", kind)), **options).eval()


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("kind", SIDE)
def test_equals_open_clip(kind: str, tmp_path: Path) -> None:
    theirs, side = tiny_clip(kind), SIDE[kind]
    towers = clip_towers(weights=str(clip_file(tmp_path / "clip.safetensors", kind)))
    x, tokens = images(side, side), tokenize(["road", "a sky."])
    features = towers.image.eval()(x)
    torch.testing.assert_close(features.pooled, theirs.encode_image(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(towers.text.eval()(tokens), theirs.encode_text(tokens), rtol=1e-5, atol=1e-5)
    assert towers.logit_scale == theirs.logit_scale.item()
    maps = theirs.visual.forward_intermediates(x, output_fmt="NCHW", normalize_intermediates=False)[
        "image_intermediates"
    ]
    for mine, reference in zip(features.maps, maps[-len(features.maps) :], strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_exact_gelu(tmp_path: Path) -> None:
    theirs = tiny_clip(quick_gelu=False)
    model = build("vit", tmp_path, quick_gelu=False)
    x = images(32, 32)
    torch.testing.assert_close(model(x).pooled, theirs.encode_image(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(build("vit", tmp_path)(x).pooled, theirs.encode_image(x), atol=1e-3)


@torch.no_grad()
def test_dense_tokens_of_the_vit(tmp_path: Path) -> None:
    model = build("vit", tmp_path, out_indices=[0, 1])
    features = model(images(32, 32))
    visual = tiny_clip().visual
    expected = (visual.ln_post(features.maps[1].flatten(2).mT) @ visual.proj).mT.unflatten(2, (4, 4))
    torch.testing.assert_close(features.extras["dense"], expected, rtol=1e-5, atol=1e-5)
    assert [m.shape for m in features.maps] == [(2, 128, 4, 4)] * 2


@torch.no_grad()
def test_a_resnet_without_padding_loses_what_fills_no_cell() -> None:
    config = clip_config("RN50-quickgelu").vision
    assert config is not None
    small = replace(config, width=8, layers=(1, 1, 1, 1), heads=4, embed_dim=16)
    torch.manual_seed(0)
    resnet = ClipResNet(small, image_size=(64, 64), padded=False).eval()
    images = torch.randn(1, 3, 70, 100)
    features = resnet(images)
    assert [tuple(m.shape[-2:]) for m in features.maps] == [(17, 25), (8, 12), (4, 6), (2, 3)]
    assert features.covers == (70, 100)
    inside = resnet(images[..., :64, :96])  # a multiple: no difference, and none either when padding is asked for
    resnet.padded = True
    assert torch.equal(resnet(images[..., :64, :96]).maps[-1], inside.maps[-1])
    assert tuple(resnet(images).maps[-1].shape[-2:]) == (3, 4)


@torch.no_grad()
@pytest.mark.parametrize("kind", SIDE)
@pytest.mark.parametrize("size", [(48, 80), (50, 33), (96, 64)])
def test_any_size(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    features = build(kind, tmp_path)(images(*size))
    cell = features.strides[-1]
    grid = (-(-size[0] // cell), -(-size[1] // cell))
    assert features.extras["dense"].shape == (2, 16, *grid)
    assert features.pooled is not None
    assert features.pooled.shape == (2, 16)
    assert features.covers == (grid[0] * cell, grid[1] * cell)
    for feature, stride in zip(features.maps, features.strides, strict=True):
        assert feature.shape[-2:] == (features.covers[0] // stride, features.covers[1] // stride)


@torch.no_grad()
@pytest.mark.parametrize("kind", SIDE)
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_positions_are_resized_on_loading(kind: str, mode: Any, tmp_path: Path) -> None:
    """Stored for another size, the table gives what resizing at run time gives."""
    stored = build(kind, tmp_path, image_size=(96, 128), position_mode=mode)
    table = stored.pos_embed[0] if isinstance(stored, PlainViT) else stored.attnpool.positional_embedding
    cell = 8 if kind == "vit" else 32
    assert table is not None
    assert len(table) == 1 + (96 // cell) * (128 // cell)
    x = images(96, 128)
    pooled = build(kind, tmp_path, position_mode=mode)(x).pooled
    torch.testing.assert_close(stored(x).pooled, pooled, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_doubled_class_embedding(tmp_path: Path) -> None:
    """The quirk is an offset of the class's position."""
    quirky, plain = build("vit", tmp_path, doubled_class=True), build("vit", tmp_path)
    x = images(32, 32)
    assert isinstance(plain, PlainViT)
    assert not torch.allclose(quirky(x).extras["dense"], plain(x).extras["dense"], atol=1e-4)
    assert plain.pos_embed is not None
    assert plain.cls_token is not None
    plain.pos_embed[:, :1] += plain.cls_token
    torch.testing.assert_close(quirky(x).extras["dense"], plain(x).extras["dense"])


def test_adapters_act_on_them(tmp_path: Path) -> None:
    for kind, method in (("vit", vpt_deep), ("vit", lora), ("vit", spm), ("rn", spm)):
        options = {"num_classes": 3} if method is spm else {}
        model = build(kind, tmp_path).requires_grad_(False)
        x = images(SIDE[kind], SIDE[kind])
        before = model(x)
        handle = method(model, **options)  # type: ignore[operator]
        with torch.no_grad():
            for name in handle.names:
                model.get_parameter(name).add_(0.1 * torch.randn_like(model.get_parameter(name)))
        features = model(x)
        assert features.pooled is not None
        assert not torch.allclose(features.pooled, before.pooled, atol=1e-4)
        (features.extras["dense"].sum() + features.pooled.square().sum()).backward()
        assert any(model.get_parameter(name).grad is not None for name in handle.names)
        handle.detach()
        torch.testing.assert_close(model(x).pooled, before.pooled, rtol=0, atol=0)


def test_pro_tuning_finds_only_the_outputs_of_its_stages(tmp_path: Path) -> None:
    model = build("rn", tmp_path).requires_grad_(False)
    with pytest.raises(UserError, match='use position="output"'):
        pro_tuning(model)
    assert len(pro_tuning(model, position="output").changes) == 4


def test_openai_s_archive_under_the_plain_name(tmp_path: Path) -> None:
    """The trap: the name without quickgelu, and weights that need it."""
    torch.save(openai_state(tiny_clip()), tmp_path / "openai.pt")
    model = clip_backbone(weights=str(tmp_path / "openai.pt")).eval()
    expected = tiny_clip().half().float().encode_image(images(32, 32))
    torch.testing.assert_close(model(images(32, 32)).pooled, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "image", "whole"), [
    ("ViT-B-16", 86_192_640, 149_620_737), ("RN50", 38_316_896, 102_007_137), ("ViT-B-32", 87_849_216, 151_277_313),
    ("RN101", 56_259_936, 119_688_033),
])  # fmt: skip
def test_the_counts_of_the_card(name: str, image: int, whole: int) -> None:
    with torch.device("meta"):
        towers = clip_towers(name)
    assert sum(parameter.numel() for parameter in towers.image.parameters()) == image
    assert image + sum(parameter.numel() for parameter in towers.text.parameters()) + 1 == whole
    assert towers.image.mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)


def test_official_keys_round_trip() -> None:
    """Every key of the real towers is used, with its shape."""
    import open_clip

    for name in ("ViT-B-16-quickgelu", "RN50-quickgelu"):
        with torch.device("meta"):
            state = open_clip.create_model(name, device="meta").visual.state_dict()
            mine = clip_backbone(name)
            converted = convert_vision(state, mine)
        assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in mine.state_dict().items()}


def test_what_does_not_fit(tmp_path: Path) -> None:
    path = str(clip_file(tmp_path / "clip.safetensors"))
    with pytest.raises(UserError, match="does not fit PlainViT"), torch.device("meta"):
        clip_backbone("ViT-B-16", weights=path)
    with pytest.raises(UserError, match="ViTs, and this is a ResNet"):
        clip_backbone("RN50", doubled_class=True)
    config = clip_config("RN50").vision
    assert config is not None
    with pytest.raises(UserError, match="stages instead of blocks"):
        clip_vit(config, image_size=(224, 224))


def test_similarity_is_what_open_clip_says(tmp_path: Path) -> None:
    towers = clip_towers(weights=str(clip_file(tmp_path / "clip.safetensors")))
    x, tokens = images(32, 32), tokenize(["road", "a sky."])
    pooled = towers.image.eval()(x).pooled
    assert pooled is not None
    cosine = F.normalize(pooled, dim=-1) @ F.normalize(towers.text.eval()(tokens), dim=-1).T
    image, text, scale = tiny_clip()(x, tokens)
    torch.testing.assert_close(torch.tensor(towers.logit_scale).exp() * cosine, scale * image @ text.T)
