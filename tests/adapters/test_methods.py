"""VPT, SSF, LoRA and the baselines: parameter counts of the papers, what each inserts, and the memory it saves."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from segvit.adapters import lora, ssf, tuning, vpt
from segvit.adapters.handle import Handle
from segvit.backbones.pyramid import pyramid
from segvit.backbones.vit import PlainViT, plain_vit
from segvit.contracts import UserError
from segvit.zoo import create_model

SWIN: dict[str, Any] = {"embed_dim": 16, "depths": (2, 2, 2, 1), "num_heads": (1, 2, 2, 4), "window_size": 4}


def large(name: str) -> PlainViT:
    with torch.device("meta"):
        return plain_vit(name, image_size=224, out_indices=(-1,), final_norm=True).requires_grad_(False)


def tiny(**options: Any) -> PlainViT:
    torch.manual_seed(0)
    options = {"image_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 64, "out_indices": (0, 2)} | options
    return plain_vit("vit_tiny_patch16_224", **options).requires_grad_(False).eval()


def count(handle: Handle) -> int:
    return sum(handle.root.get_parameter(name).numel() for name in handle.trained)


@pytest.mark.parametrize(
    ("name", "prompts", "deep", "project", "expected"),
    [
        ("vit_base_patch16_224", 10, True, None, 92_160),
        ("vit_base_patch16_224", 100, True, None, 921_600),
        ("vit_large_patch16_224", 10, True, None, 245_760),
        ("vit_large_patch16_224", 200, True, None, 4_915_200),
        ("vit_base_patch16_224", 50, False, None, 50 * 768),
        ("vit_base_patch16_224", 10, True, 100, 12 * 10 * 100 + 100 * 768 + 768),
    ],
)
def test_vpt_parameters(name: str, prompts: int, deep: bool, project: int | None, expected: int) -> None:
    method = vpt.vpt_deep if deep else vpt.vpt_shallow
    assert count(method(large(name), num_prompts=prompts, project_dim=project)) == expected


@pytest.mark.parametrize(("name", "expected"), [("vit_base_patch16_224", 205_824), ("vit_large_patch16_224", 544_768)])
def test_ssf_parameters(name: str, expected: int) -> None:
    assert count(ssf.ssf(large(name))) == expected


def test_other_parameters() -> None:
    # The same sum for a ViT-L is 0.272 M; table 3 of the VPT paper has 13.46 - 13.18 M.
    assert count(tuning.bitfit(tiny(final_norm=True))) == 3 * 11 * 64 + 2 * 64
    assert count(tuning.norm_only(tiny(final_norm=True))) == 7 * 2 * 64
    assert count(tuning.head_only(tiny())) == 0
    assert count(lora.lora(large("vit_base_patch16_224"), rank=4)) == 12 * 4 * (768 + 3 * 768)


def test_prompts_take_their_place_in_the_sequence() -> None:
    backbone = tiny()
    vpt.vpt_deep(backbone, num_prompts=4, dropout=0.0)
    prompts = backbone.gaps["0"]
    first = backbone.embed(torch.randn(2, 3, 32, 32))
    step = backbone.gap(0, first)
    assert step.prefix == 5
    torch.testing.assert_close(step.tokens[:, 1:5], prompts.prompt_embeddings.expand(2, -1, -1))
    before = backbone.run(0, first)
    after = backbone.gap(1, before)
    torch.testing.assert_close(after.tokens[:, 1:5], prompts.deep_prompt_embeddings[:1].expand(2, -1, -1))
    torch.testing.assert_close(after.tokens[:, 5:], before.tokens[:, 5:], rtol=0, atol=0)
    torch.testing.assert_close(after.tokens[:, :1], before.tokens[:, :1], rtol=0, atol=0)


def test_prompts_of_blocks_that_never_run_are_not_made() -> None:
    handle = vpt.vpt_deep(tiny(out_indices=(0, 1)), num_prompts=4)
    assert count(handle) == 2 * 4 * 64
    assert not any("blocks.2" in name for name in ssf.ssf(tiny(out_indices=(0, 1))).names)


def test_prompts_start_within_the_papers_limit() -> None:
    backbone = tiny(embed_dim=128)
    vpt.vpt_shallow(backbone, num_prompts=200)
    values = backbone.gaps["0"].prompt_embeddings
    limit = (6 / (3 * 8 * 8 + 128)) ** 0.5
    assert 0.99 * limit < values.abs().max() <= limit
    assert values.std().item() == pytest.approx(limit / 3**0.5, rel=0.02)


def test_prompt_dropout_acts_in_training_only_and_on_each_image() -> None:
    backbone = tiny()
    vpt.vpt_deep(backbone, num_prompts=50, dropout=0.5)
    images = torch.randn(1, 3, 32, 32).expand(2, -1, -1, -1)
    maps = backbone.eval()(images).maps[-1]
    torch.testing.assert_close(maps[0], maps[1])
    maps = backbone.train()(images).maps[-1]
    assert not torch.allclose(maps[0], maps[1])


def test_bias_beside_prompts() -> None:
    handle = vpt.vpt_deep(tiny(), num_prompts=4, train_bias=True)
    assert "blocks.0.attn.qkv.bias" in handle.trained
    assert "blocks.0.attn.qkv.weight" not in handle.trained


def swin() -> Any:
    torch.manual_seed(0)
    network = timm.create_model(
        "swin_tiny_patch4_window7_224", features_only=True, img_size=64, strict_img_size=False, **SWIN
    )
    found = pyramid("swin_tiny_patch4_window7_224")
    found.network = network
    return found.requires_grad_(False).eval()


@pytest.mark.parametrize("method", [vpt.vpt_deep, vpt.vpt_shallow])
@pytest.mark.parametrize("side", [64, 96])
def test_prompted_swin_treats_each_image_alone(method: Any, side: int) -> None:
    backbone = swin()
    handle = method(backbone, num_prompts=3)
    images = torch.randn(2, 3, side, side)
    together, alone = backbone.eval()(images), backbone(images[1:])
    for ours, single in zip(together.maps, alone.maps, strict=True):
        torch.testing.assert_close(ours[1:], single, atol=1e-5, rtol=1e-4)
    handle.disable()
    assert not torch.allclose(backbone(images).maps[-1], together.maps[-1])


def test_swin_without_prompts_is_timms() -> None:
    backbone = swin()
    images = torch.randn(2, 3, 64, 64)
    expected = backbone(images).maps
    handle = vpt.vpt_shallow(backbone, num_prompts=1)
    blocks = [module for module in backbone.modules() if isinstance(module, vpt.SwinTransformerBlock)]
    prompts = torch.zeros(2, 0, 16)  # none at all: only the windows are left
    maps = backbone.network.patch_embed(images)
    for block in blocks[:2]:
        prompts, maps = vpt.prompted_block(block, prompts, maps)
    torch.testing.assert_close(maps.permute(0, 3, 1, 2), expected[0], atol=1e-5, rtol=1e-4)
    handle.detach()
    torch.testing.assert_close(backbone(images).maps[0], expected[0], rtol=0, atol=0)


def test_vpt_refuses_what_it_does_not_fit() -> None:
    with pytest.raises(UserError, match="plain ViT or a Swin"):
        vpt.vpt_deep(pyramid("resnet18"))
    with pytest.raises(UserError, match="project_dim is for plain ViTs"):
        vpt.vpt_deep(swin(), project_dim=8)
    with pytest.raises(UserError, match="must be positive"):
        vpt.vpt_deep(tiny(), num_prompts=0)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "pvt_v2_b0"])
def test_ssf_and_lora_on_pyramids(name: str) -> None:
    images = torch.randn(2, 3, 64, 64)
    for method in (ssf.ssf, lambda b: lora.lora(b, target_modules=("q", "kv", "conv1", "fc1"))):
        backbone = pyramid(name).requires_grad_(False).eval()
        handle = method(backbone)
        with torch.no_grad():
            for parameter in handle.names:
                backbone.get_parameter(parameter).add_(0.1)
            tuned = backbone(images).maps
            handle.merge()
            plain = backbone(images).maps
        for ours, merged in zip(tuned, plain, strict=True):
            torch.testing.assert_close(merged, ours, rtol=1e-3, atol=1e-3 * ours.abs().max().item())
        assert not [key for key in backbone.state_dict() if "ssf" in key or "lora" in key or "base_layer" in key]


def test_ssf_decides_by_layout_where_width_equals_channels() -> None:
    pair = ssf.Scaled(nn.Identity(), 4, channels_last=False, like=torch.zeros(1))
    nn.init.zeros_(pair.ssf_shift)
    x = torch.ones(1, 4, 4, 4)
    torch.testing.assert_close(pair(x)[0, :, 0, 0], pair.ssf_scale)


@pytest.mark.parametrize("layer", [nn.Linear(6, 8), nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.Linear(6, 8, False)])
def test_lora_is_the_definition(layer: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 6, 7, 7)
    low = lora.LowRank(layer, rank=2, alpha=6.0, dropout=0.0).eval()
    torch.testing.assert_close(low(x), layer(x), rtol=0, atol=0)
    nn.init.normal_(low.lora_B.weight)
    torch.testing.assert_close(low(x), layer(x) + 3 * low.lora_B(low.lora_A(x)))
    torch.testing.assert_close(lora.merged(low)(x), low(x), atol=1e-5, rtol=1e-5)


def test_lora_names_its_choices() -> None:
    with pytest.raises(UserError, match="some of fc1, fc2, proj, qkv"):
        lora.lora(tiny(), target_modules=("query",))
    with pytest.raises(UserError, match="rank must be positive"):
        lora.lora(tiny(), rank=0)


def saved_bytes(method: str | None) -> int:
    """What one training step keeps for the backward pass, parameters not counted."""
    torch.manual_seed(0)
    model = create_model(
        "segmenter_vit_tiny", num_classes=3, image_size=64, patch_size=8, depth=4, embed_dim=128, layers=1,
        adapter=method,
    ).train()  # fmt: skip
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(torch.randn(2, 3, 64, 64)).logits.sum()
    return sum(kept.values())


def test_memory_falls_where_the_method_allows_it() -> None:
    everything = saved_bytes(None)
    assert saved_bytes("head_only") < 0.35 * everything  # no graph in the backbone at all
    for method in ("vpt_deep", "bitfit", "lora"):  # inputs of frozen linear layers are not kept
        assert saved_bytes(method) < 0.9 * everything, method
    assert saved_bytes("full") == everything
