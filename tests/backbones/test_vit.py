"""The plain ViT against timm's own forward pass, and what it can do beyond it: any size, fewer tokens, gaps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.backbones.vit import PlainViT, plain_vit
from segvit.contracts import UserError
from segvit.nn.tokens import Step, patch_map

SIDE = 64
FAMILIES = [
    "vit_tiny_patch16_224", "deit3_small_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224", "beit_base_patch16_224",
    "beitv2_base_patch16_224", "vit_base_patch32_clip_224", "vit_base_patch16_siglip_224",
    "vit_little_patch16_reg4_gap_256", "vit_small_patch16_rope_mixed_224", "vit_pe_core_tiny_patch16_384",
]  # fmt: skip
# One family for each way to run a block: plain, rotary, rotary learned by block, relative bias.
WAYS = ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_224", "beit_base_patch16_224"]


def randomise(module: nn.Module) -> None:
    """Move every parameter away from its initial value: tables and scales may start at zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def build(name: str, *, side: int | tuple[int, int] = SIDE, **options: Any) -> PlainViT:
    """A tiny model of a family with random weights."""
    torch.manual_seed(0)
    model = plain_vit(name, image_size=side, **{"out_indices": [0, 1], "depth": 2, "embed_dim": 128} | options)
    randomise(model)
    return model.eval()


def twin(name: str, model: PlainViT, *, side: int | tuple[int, int] = SIDE) -> Any:
    """timm's own model with the same weights; the keys are the same."""
    dynamic = {"dynamic_img_size": True} if isinstance(model.rope, nn.Module) else {}
    trunk = timm.create_model(
        name, num_classes=0, img_size=side, depth=len(model.blocks), embed_dim=model.dim, num_heads=model.dim // 64,
        **dynamic,
    )  # fmt: skip
    report = trunk.load_state_dict(model.state_dict(), strict=False)
    assert not report.unexpected_keys
    assert all(key.startswith(("norm.", "fc_norm.", "attn_pool.", "head")) for key in report.missing_keys)
    return trunk.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_timm(name: str, seeded: torch.Generator) -> None:
    side = next(side for patch, side in (("patch14", 70), ("patch32", 96), ("", 80)) if patch in name)
    model = build(name, side=side)
    trunk = twin(name, model, side=side)
    images = torch.randn(1, 3, side, side)
    with torch.no_grad():
        ours = model(images)
        _, theirs = trunk.forward_intermediates(images, indices=[0, 1])
    assert ours.grid == trunk.patch_embed.grid_size
    for mine, reference in zip(ours.maps, theirs, strict=True):
        torch.testing.assert_close(mine, reference, atol=2e-5, rtol=2e-5)
    assert (ours.pooled is None) == (model.cls_token is None)


def test_equals_timm_on_other_grids_where_timm_can(seeded: torch.Generator) -> None:
    """Rotary tables of a non-square input; timm resizes no learned table here."""
    name = "vit_small_patch16_dinov3"
    model = build(name)
    trunk = twin(name, model)
    images = torch.randn(1, 3, 48, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(images).maps[1], trunk.forward_intermediates(images)[1][1])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_final_norm(name: str, seeded: torch.Generator) -> None:
    model = build(name, side=112, final_norm=True)
    trunk = twin(name, model, side=112)
    images = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        features = model(images)
        tokens = trunk.forward_features(images)
        raw = trunk.forward_intermediates(images, indices=[0])[1][0]
    torch.testing.assert_close(features.maps[-1].flatten(2).mT, tokens[:, trunk.num_prefix_tokens :])
    torch.testing.assert_close(features.pooled, tokens[:, 0])
    torch.testing.assert_close(features.maps[0], raw)  # only the last map is normalised


def test_final_norm_of_models_that_pool_by_averaging() -> None:
    model = build("vit_little_patch16_reg4_gap_256", final_norm=True)
    assert isinstance(model.norm, nn.LayerNorm)
    assert isinstance(build("vit_little_patch16_reg4_gap_256").norm, nn.Identity)


@pytest.mark.parametrize("name", [*WAYS, "vit_small_patch14_reg4_dinov2"])
@pytest.mark.parametrize("size", [(48, 80), (37, 50)])
def test_any_size(name: str, size: tuple[int, int], seeded: torch.Generator) -> None:
    model = build(name)
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        features = model(images)
    patch = model.patch[0]
    grid = (-(-size[0] // patch), -(-size[1] // patch))
    covers = (grid[0] * patch, grid[1] * patch)
    assert (features.grid, features.covers, features.strides) == (grid, covers, [patch, patch])
    assert [tuple(m.shape) for m in features.maps] == [(1, 128, *grid)] * 2
    padded = F.pad(images, (0, covers[1] - size[1], 0, covers[0] - size[0]))
    with torch.no_grad():
        again = model(padded)
    assert all(torch.equal(a, b) for a, b in zip(features.maps, again.maps, strict=True))
    assert again.covers == covers


def test_position_embeddings_are_resized_without_antialias(seeded: torch.Generator) -> None:
    for mode in ("bicubic", "bilinear"):
        model = build("vit_tiny_patch16_224", side=96, position_mode=mode)
        images = torch.randn(1, 3, 32, 64)
        step = model.embed(images)
        table = model.pos_embed[:, 1:].mT.unflatten(2, (6, 6))
        table = F.interpolate(table, size=(2, 4), mode=mode, align_corners=False, antialias=False)
        expected = model.patch_embed.proj(images).flatten(2).mT + table.flatten(2).mT
        torch.testing.assert_close(step.tokens[:, 1:], expected)
        torch.testing.assert_close(step.tokens[:, :1], model.cls_token + model.pos_embed[:, :1])


def test_dropped_prefix(seeded: torch.Generator) -> None:
    model = build("vit_tiny_patch16_224", prefix_tokens="drop")
    images = torch.randn(1, 3, SIDE, SIDE)
    features = model(images)
    assert features.pooled is None
    assert model.embed(images).prefix == 0
    sum(m.square().mean() for m in features.maps).backward()
    assert torch.equal(model.cls_token.grad, torch.zeros_like(model.cls_token))
    assert model.pos_embed.grad[:, 0].abs().max() == 0
    assert model.pos_embed.grad[:, 1:].abs().min() > 0
    with torch.no_grad():
        kept = build("vit_tiny_patch16_224")(images)
        trunk = twin("vit_tiny_patch16_224", model)
        tokens = trunk.patch_embed(images) + trunk.pos_embed[:, 1:]
        expected = trunk.blocks[1](trunk.blocks[0](tokens))
    torch.testing.assert_close(features.maps[1].flatten(2).mT, expected)
    assert not torch.allclose(features.maps[1], kept.maps[1], atol=1e-3)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_all_kinds_of_prefix_tokens_are_dropped(name: str, seeded: torch.Generator) -> None:
    model = build(name, prefix_tokens="drop")
    before = model(torch.ones(1, 3, SIDE, SIDE)).maps[1]
    with torch.no_grad():
        for token in (model.cls_token, model.reg_token, model.dist_token):
            if token is not None:
                token.fill_(7.0)
    assert torch.equal(model(torch.ones(1, 3, SIDE, SIDE)).maps[1], before)


def every_second(step: Step) -> tuple[Tensor, tuple[int, int]]:
    rows, columns = step.grid
    chosen = torch.arange(rows * columns).view(rows, columns)[::2, ::2]
    return chosen.flatten(), (chosen.shape[0], chosen.shape[1])


@pytest.mark.parametrize("prefix_tokens", ["keep", "drop"])
@pytest.mark.parametrize("name", [*WAYS, "deit3_small_patch16_224", "vit_small_patch16_dinov3"])
def test_fewer_queries_are_the_full_block_selected(name: str, prefix_tokens: str, seeded: torch.Generator) -> None:
    model = build(name, prefix_tokens=prefix_tokens)
    with torch.no_grad():
        step = model.embed(torch.randn(2, 3, 48, 80))
        keep, grid = every_second(step)
        full, fewer = model.run(0, step), model.run(0, step, keep=keep, grid=grid)
    torch.testing.assert_close(patch_map(full)[:, :, ::2, ::2], patch_map(fewer), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(full.tokens[:, : step.prefix], fewer.tokens[:, : step.prefix], atol=1e-5, rtol=1e-5)
    assert (fewer.grid, fewer.base, fewer.prefix) == (grid, step.grid, step.prefix)
    assert fewer.kept is not None
    assert fewer.kept.tolist() == keep.tolist()


@pytest.mark.parametrize("name", WAYS)
def test_kept_tokens_keep_their_relations(name: str, seeded: torch.Generator) -> None:
    """The block after a reduction sees the kept tokens at their old places: timm's block, told so by hand."""
    model = build(name)
    trunk = twin(name, model)
    with torch.no_grad():
        step = model.embed(torch.randn(1, 3, SIDE, SIDE))
        keep, grid = every_second(step)
        step = model.run(0, step, keep=keep, grid=grid)
        ours = model.run(1, step).tokens
        block = copy.deepcopy(trunk.blocks[1])
        rows = torch.cat([torch.arange(step.prefix), keep + step.prefix])
        if model.rope is not None:
            rope = trunk.rope.get_embed(shape=list(step.base))
            rope = rope[1] if model.rope_per_block else rope
            theirs = block(step.tokens, rope=rope[..., keep, :])
        elif name.startswith("beit"):
            bias = block.attn._get_rel_pos_bias()[:, :, rows][:, :, :, rows]
            block.attn.relative_position_bias_table = None
            theirs = block(step.tokens, shared_rel_pos_bias=bias)
        else:
            theirs = block(step.tokens)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", WAYS)
def test_keeping_all_tokens_changes_nothing(name: str, seeded: torch.Generator) -> None:
    model = build(name)
    with torch.no_grad():
        step = model.embed(torch.randn(1, 3, 48, 80))
        everything = torch.arange(step.grid[0] * step.grid[1])
        plain = model.run(1, model.run(0, step))
        kept = model.run(1, model.run(0, step, keep=everything), keep=everything)
    torch.testing.assert_close(plain.tokens, kept.tokens, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", WAYS)
def test_reducing_twice(name: str, seeded: torch.Generator) -> None:
    model = build(name)
    with torch.no_grad():
        step = model.embed(torch.randn(1, 3, SIDE, SIDE))
        first, grid = every_second(step)
        once = model.run(0, step, keep=first, grid=grid)
        second, smaller = every_second(once)
        twice = model.run(1, once, keep=second, grid=smaller)
        full = model.run(1, once)
    torch.testing.assert_close(twice.tokens[:, once.prefix :], full.tokens[:, once.prefix + second], atol=1e-5, rtol=0)
    assert twice.kept is not None
    assert twice.kept.tolist() == first[second].tolist()


class Prompts(nn.Module):
    """Puts tokens behind the other prefix tokens, as prompt tuning does."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, count, dim))

    def forward(self, step: Step) -> Step:
        head, patches = step.tokens[:, : step.prefix], step.tokens[:, step.prefix :]
        tokens = torch.cat([head, self.tokens.expand(len(head), -1, -1), patches], dim=1)
        return step._replace(tokens=tokens, prefix=step.prefix + self.tokens.shape[1])


class Shift(nn.Module):
    def forward(self, step: Step) -> Step:
        return step._replace(tokens=step.tokens + 1)


@pytest.mark.parametrize("name", WAYS)
def test_a_gap_acts_before_its_block(name: str, seeded: torch.Generator) -> None:
    model = build(name)
    images = torch.randn(1, 3, SIDE, SIDE)
    with torch.no_grad():
        plain = model(images)
        model.gaps["1"] = Shift()
        shifted = model(images)
        step = model.run(0, model.embed(images))
        del model.gaps["1"]
        expected = patch_map(model.run(1, step._replace(tokens=step.tokens + 1)))
        model.gaps["2"] = Shift()  # after the last block
        last = model(images)
    assert torch.equal(plain.maps[0], shifted.maps[0])
    assert torch.equal(expected, shifted.maps[1])
    assert not torch.allclose(plain.maps[1], shifted.maps[1], atol=1e-3)
    assert torch.equal(plain.maps[1] + 1, last.maps[1])


@pytest.mark.parametrize("prefix_tokens", ["keep", "drop"])
@pytest.mark.parametrize("name", [*WAYS, "vit_small_patch16_dinov3"])
def test_a_gap_may_insert_tokens(name: str, prefix_tokens: str, seeded: torch.Generator) -> None:
    model = build(name, prefix_tokens=prefix_tokens)
    images = torch.randn(2, 3, 48, 80)
    plain = model(images)
    model.gaps["1"] = Prompts(model.dim, 3)
    prompted = model(images)
    assert [m.shape for m in prompted.maps] == [m.shape for m in plain.maps]
    assert torch.equal(prompted.maps[0], plain.maps[0])
    assert not torch.allclose(prompted.maps[1], plain.maps[1], atol=1e-3)
    assert (prompted.pooled is None) == (prefix_tokens == "drop")  # a prompt is no class token
    prompted.maps[1].sum().backward()
    assert model.gaps["1"].tokens.grad.abs().max() > 0


@pytest.mark.parametrize("prefix_tokens", ["keep", "drop"])
@pytest.mark.parametrize("name", WAYS)
def test_inserted_tokens_have_no_position(name: str, prefix_tokens: str, seeded: torch.Generator) -> None:
    """Their order does not matter, and patches stand to each other as before."""
    model = build(name, prefix_tokens=prefix_tokens)
    model.gaps["1"] = Prompts(model.dim, 3)
    images = torch.randn(1, 3, SIDE, SIDE)
    with torch.no_grad():
        before = model(images).maps[1]
        model.gaps["1"].tokens.copy_(model.gaps["1"].tokens.flip(1))
        torch.testing.assert_close(model(images).maps[1], before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", WAYS)
def test_checkpointing_gives_the_same_gradients(name: str, seeded: torch.Generator) -> None:
    images = torch.randn(1, 3, SIDE, SIDE)
    gradients = []
    for checkpointing in (False, True):
        model = build(name, checkpointing=checkpointing).train()
        sum(m.square().mean() for m in model(images).maps).backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], msg=key)


def test_stochastic_depth_can_spare_the_attention() -> None:
    model = build("vit_tiny_patch16_224", drop_path=0.4, attention_drop_path=False)
    assert isinstance(model.blocks[1].drop_path1, nn.Identity)
    assert model.blocks[1].drop_path2.drop_prob == pytest.approx(0.4)
    assert build("vit_tiny_patch16_224", drop_path=0.4).blocks[1].drop_path1.drop_prob == pytest.approx(0.4)


def test_norm_eps() -> None:
    for eps in (None, 1e-5):
        model = build("vit_tiny_patch16_224", norm_eps=eps, final_norm=True)
        assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {eps or 1e-6}


def test_out_indices() -> None:
    assert build("vit_tiny_patch16_224", out_indices=[-2, -1]).out_indices == (0, 1)
    assert build("vit_tiny_patch16_224", out_indices=(1,)).out_indices == (1,)
    for wrong in ([1, 0], [0, 0], [2], [-3], [0, 7]):
        with pytest.raises(UserError, match="out_indices"):
            build("vit_tiny_patch16_224", out_indices=wrong)


def test_unknown_names_come_with_near_ones() -> None:
    with pytest.raises(UserError, match="vit_tiny_patch16_"):
        plain_vit("vit_tiny_patch16_225", out_indices=[0])
    with pytest.raises(UserError, match=r"near names: .*dinov2"):
        plain_vit("vit_smal_patch14_dinov2", out_indices=[0])


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "swin_tiny_patch4_window7_224", "vit_small_r26_s32_224"])
def test_other_architectures_are_refused(name: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=f"{name} is .*not a plain ViT"):
        plain_vit(name, image_size=SIDE, out_indices=[0])


def test_changed_architectures_take_no_weights() -> None:
    with pytest.raises(UserError, match="depth change the architecture"):
        plain_vit("vit_tiny_patch16_224", out_indices=[0], depth=1, weights="x.pth")


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("channels", [1, 5])
def test_images_of_any_number_of_channels(name: str, channels: int) -> None:
    model = build(name, in_channels=channels)
    assert model(torch.randn(1, channels, SIDE, SIDE)).maps[-1].shape[:2] == (1, 128)
    assert model.mean == model.std == (0.5,) * channels


def test_three_channels_keep_the_mean_of_the_pretraining() -> None:
    assert build("vit_tiny_patch16_224").mean == (0.5, 0.5, 0.5)
    assert build("vit_small_patch14_dinov2").mean == (0.485, 0.456, 0.406)
    with pytest.raises(UserError, match="in_channels is 0"):
        build("vit_tiny_patch16_224", in_channels=0)
