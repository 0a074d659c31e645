"""SegViT and Shrunk SegViT beyond the goldens: odd grids, the official canvas, losses, conversion, initialisation."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.contracts import Dense, UserError
from segvit.model_folder import load_state
from segvit.nn.attention import Attention
from segvit.nn.tokens import Step
from segvit.systems import segvit
from segvit.systems.segvit import convert, criterion, normalisers, scores

K = 4
TINY: dict[str, Any] = {
    "num_classes": K, "backbone": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "depth": 3,
    "embed_dim": 128, "layers": 2,
}  # fmt: skip


def plain(**options: Any) -> segvit.SegViT:
    torch.manual_seed(0)
    return segvit.segvit(**(TINY | {"out_indices": (0, 1, 2)} | options)).eval()


def shrunk(**options: Any) -> segvit.ShrunkSegViT:
    torch.manual_seed(0)
    return segvit.segvit_shrunk(**(TINY | {"out_indices": (0, 2), "shrink_at": 1} | options)).eval()


def by_hand(out: Dense, size: tuple[int, int]) -> Tensor:
    """The scores at full size as the paper has them, over the padded area, then cropped."""
    masks = F.interpolate(out.extras["masks"], size=out.covers, mode="bilinear", align_corners=False).sigmoid()
    classes = out.extras["class_logits"].softmax(-1)[..., :K]
    return torch.einsum("bqc,bqhw->bchw", classes, masks[..., : size[0], : size[1]])


@pytest.mark.parametrize("make", [plain, shrunk])
@pytest.mark.parametrize("size", [(24, 40), (37, 50), (8, 72)])
@torch.no_grad()
def test_odd_and_non_square_grids(make: Any, size: tuple[int, int], seeded: torch.Generator) -> None:
    model = make()
    out = model(torch.randn(2, 3, *size))
    grid = tuple(-(-side // 8) for side in size)
    assert out.covers == (grid[0] * 8, grid[1] * 8)
    assert out.extras["masks"].shape == (2, K, *grid)
    torch.testing.assert_close(scores(out, size, range(size[0])), by_hand(out, size), atol=1e-6, rtol=1e-5)
    part = scores(out, size, range(3, 7))
    torch.testing.assert_close(part, by_hand(out, size)[:, :, 3:7], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("make", [plain, shrunk])
def test_masks_and_their_softmax_are_in_fp32_under_autocast(make: Any, seeded: torch.Generator) -> None:
    model, images = make(), torch.randn(2, 3, 32, 32)
    exact = model(images).extras
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images)
    masks = {name: value for name, value in out.extras.items() if name.endswith("masks")}
    assert {value.dtype for value in masks.values()} == {torch.float32}
    assert out.extras["class_logits"].dtype == torch.bfloat16  # the network itself is not
    for name, value in masks.items():
        assert (value != value.bfloat16()).any()  # heads are averaged and stages added up without rounding
        torch.testing.assert_close(value, exact[name], atol=0.05, rtol=0.05)
    half = make().bfloat16()(images.bfloat16())  # without autocast too
    assert half.logits.isfinite().all()
    assert scores(half, (32, 32), range(32)).isfinite().all()


@torch.no_grad()
def test_shrunk_tokens(seeded: torch.Generator) -> None:
    """Every second row and column goes on; odd sides are rounded up."""
    features = shrunk().shrunk_features(torch.randn(1, 3, 24, 56))
    assert [m.shape[-2:] for m in features.maps] == [(3, 7), (2, 4)]
    assert (features.grid, features.strides) == ((3, 7), [8, 12])


@pytest.mark.parametrize("gap", ["0", "1", "2", "3"])
@torch.no_grad()
def test_every_gap_acts_in_shrunk_too(gap: str, seeded: torch.Generator) -> None:
    class Double(nn.Module):
        def forward(self, step: Step) -> Step:
            return step._replace(tokens=2 * step.tokens)

    model, images = shrunk(), torch.randn(1, 3, 32, 32)
    before = model.shrunk_features(images).maps[-1]
    model.backbone.gaps[gap] = Double()
    assert not torch.allclose(model.shrunk_features(images).maps[-1], before, atol=1e-3)


@pytest.mark.parametrize("make", [plain, shrunk])
@torch.no_grad()
def test_fixed_masks_are_read_as_squares_and_stretched(make: Any, seeded: torch.Generator) -> None:
    model, size = make(fixed_masks=True, **({"fixed_queries": True} if make is shrunk else {})), (16, 64)
    free = make()
    free.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, *size)
    out = model(images)
    canvas = out.extras["canvas"]
    assert out.covers == size
    assert canvas.shape == (1, K, 32, 32)
    assert out.extras["masks"].shape == (1, K, 4, 4)  # 2 x 8 tokens
    again = F.interpolate(out.extras["masks"], size=(32, 32), mode="bilinear", align_corners=False).sigmoid()
    classes = out.extras["class_logits"].softmax(-1)[..., :K]
    torch.testing.assert_close(canvas, torch.einsum("bqc,bqhw->bchw", classes, again), atol=1e-6, rtol=1e-5)
    stretched = F.interpolate(canvas, size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(scores(out, size, range(16)), stretched, atol=1e-6, rtol=1e-5)
    if make is plain:  # the same numbers in another shape
        assert torch.equal(free(images).extras["masks"].flatten(2), out.extras["masks"].flatten(2))
        with pytest.raises(UserError, match="there are 15"):
            model(torch.randn(1, 3, 24, 40))


@torch.no_grad()
def test_learned_queries_follow_the_input_unless_fixed(seeded: torch.Generator) -> None:
    images = torch.randn(1, 3, 24, 56)
    free, fixed = shrunk(), shrunk(fixed_queries=True)
    assert free.head.upsample_queries.shape == (16, 64)
    assert free(images).extras["masks"].shape[-2:] == (3, 7)
    assert fixed(images).extras["masks"].shape[-2:] == (4, 4)
    assert fixed(images).covers == (24, 56)
    native = torch.randn(1, 3, 32, 32)
    assert torch.equal(free(native).logits, fixed(native).logits)
    table = free.head.upsample_queries.mT.unflatten(1, (4, 4))[None]
    resized = F.interpolate(table, size=(3, 7), mode="bicubic", align_corners=False)[0].flatten(1).mT
    features = free.shrunk_features(images)
    outputs = free.head(features.maps, features.grid)
    fixed.head.upsample_queries = nn.Parameter(resized)
    fixed.head.grid = (3, 7)
    assert torch.equal(fixed.head(features.maps, (3, 7))[-1][1], outputs[-1][1])


@torch.no_grad()
def test_masks_add_up_over_stages_but_not_in_shrunk(seeded: torch.Generator) -> None:
    model = plain()
    features = model.backbone(torch.randn(1, 3, 32, 32))
    outputs, queries = model.head(features.maps), model.head.queries[None]
    total: Tensor | float = 0.0
    for stage, features_map, (classes, masks) in zip(
        model.head.stages, reversed(features.maps), outputs, strict=True
    ):  # fmt: skip
        queries, own = stage(queries, features_map.flatten(2).mT)
        total = total + own.unflatten(2, (4, 4))
        torch.testing.assert_close(masks, total)
        torch.testing.assert_close(classes, model.head.class_embed(queries))
    out = model(torch.randn(1, 3, 32, 32))
    assert [key for key in out.extras if key.startswith("aux")] == [
        "aux0_class_logits", "aux0_masks", "aux1_class_logits", "aux1_masks",
    ]  # fmt: skip


@torch.no_grad()
def test_maps_of_several_sizes_are_brought_to_the_shallowest(seeded: torch.Generator) -> None:
    head = segvit.ATMHead(16, 8, num_classes=K, heads=2, layers=1, stages=2, dropout=0.0).eval()
    outputs = head([torch.randn(1, 16, 4, 6), torch.randn(1, 16, 2, 3)])
    assert [masks.shape for _, masks in outputs] == [(1, K, 4, 6)] * 2


def test_mask_losses_only_for_present_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def count(maps: Tensor, masks: Tensor, pairs: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        seen.append((tuple(maps.shape), pairs.tolist(), options["covers"]))
        return maps.mean(dim=(1, 2)), maps.mean(dim=(1, 2))

    monkeypatch.setattr(segvit, "focal_and_dice", count)
    masks = torch.zeros(2, 32, 32, dtype=torch.uint8)
    masks[0, :4], masks[0, 4:6], masks[1] = 3, 255, 1
    out = plain().train()(torch.randn(2, 3, 32, 32))
    totals = normalisers(masks, num_classes=K, ignore_index=255)
    assert {key: int(value) for key, value in totals.items()} == {"images": 2, "present": 3}
    terms = criterion(out, masks, totals)
    assert seen == [((3, 4, 4), [[0, 0], [0, 3], [1, 1]], (32, 32))] * 3
    assert list(terms) == [f"loss_{kind}{suffix}" for suffix in ("", "_0", "_1") for kind in ("ce", "mask", "dice")]


def test_class_weights_multiply_the_terms_of_present_pairs(seeded: torch.Generator) -> None:
    masks = torch.zeros(2, 32, 32, dtype=torch.uint8)
    masks[0, :20] = 2
    out, totals = plain()(torch.randn(2, 3, 32, 32)), normalisers(masks, num_classes=K, ignore_index=255)
    paper = criterion(out, masks, totals)
    equal = criterion(out, masks, totals, class_weights=torch.ones(K))
    assert all(torch.equal(value, equal[name]) for name, value in paper.items())
    weights = [torch.ones(K), torch.ones(K), torch.ones(K)]
    weights[0][0], weights[1][2], weights[2][1] = 5.0, 3.0, 7.0
    first, second, absent = (criterion(out, masks, totals, class_weights=weight) for weight in weights)
    both = criterion(out, masks, totals, class_weights=torch.tensor([5.0, 1.0, 3.0, 1.0]))
    for name, value in paper.items():
        assert torch.equal(absent[name], value)
        torch.testing.assert_close(both[name] - value, (first[name] - value) + (second[name] - value))
        if "mask" in name or "dice" in name:  # these have only terms of present pairs
            torch.testing.assert_close((first[name] - value) / 4 + (second[name] - value) / 2, value)


def test_terms_by_hand(seeded: torch.Generator) -> None:
    masks = torch.zeros(2, 37, 50, dtype=torch.uint8)
    masks[0, :20], masks[1, :, :9] = 2, 255
    out = plain()(torch.randn(2, 3, 37, 50))
    terms = criterion(out, masks, normalisers(masks, num_classes=K, ignore_index=255))
    labels = torch.tensor([[0, K, 2, K], [0, K, K, K]])
    weight = torch.tensor([1.0] * K + [0.1])
    entropy = F.cross_entropy(out.extras["class_logits"].mT, labels, weight=weight)
    torch.testing.assert_close(terms["loss_ce"], entropy)
    logits = F.interpolate(out.extras["masks"], size=(40, 56), mode="bilinear", align_corners=False)[..., :37, :50]
    focal, dice = torch.zeros(()), torch.zeros(())
    for image, label in ((0, 0), (0, 2), (1, 0)):
        z, target = logits[image, label], (masks[image] == label).float()
        p = z.sigmoid()
        right = torch.where(target > 0, p, 1 - p)
        alpha = torch.where(target > 0, 0.25, 0.75)
        focal = focal + (-alpha * (1 - right) ** 2 * right.log()).mean()
        dice = dice + 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)
    torch.testing.assert_close(terms["loss_mask"], 20 * focal / 3)
    torch.testing.assert_close(terms["loss_dice"], dice / 3)


def official(state: dict[str, Tensor], layout: str, *, is_shrunk: bool) -> dict[str, Tensor]:
    """Our keys under the names of the official repository, with the backbone in mmseg's or timm's names."""
    packed = ".multihead_attn.in_proj_", ".multihead_attn.out_proj."
    result = {}
    for key, value in state.items():
        if layout == "mmseg":
            for old, new in (
                (r"^backbone\.blocks\.", "backbone.layers."), (r"(layers\.\d+\.)norm([12])", r"\1ln\2"),
                (r"attn\.qkv\.", "attn.attn.in_proj_"), (r"attn\.proj\.", "attn.attn.out_proj."),
                (r"mlp\.fc1", "ffn.layers.0.0"), (r"mlp\.fc2", "ffn.layers.1"),
                (r"patch_embed\.proj\.", "patch_embed.projection."),
            ):  # fmt: skip
                key = re.sub(old, new, key) if key.startswith("backbone.") else key
        if key.startswith("head."):
            key = "decode_" + key
            gathering = is_shrunk and "decode_head.stages." in key
            key = key.replace("self_attn.qkv.", "self_attn.in_proj_").replace("self_attn.proj.", "self_attn.out_proj.")
            if gathering:
                key = key.replace(".cross_attn.qkv.", packed[0]).replace(".cross_attn.proj.", packed[1])
            key = key.replace(".cross_attn.", ".multihead_attn.")
            key = re.sub(r"\.fc([12])\.", r".linear\1.", key)
            stage = re.match(r"decode_head\.stages\.(\d+)\.(proj_norm|proj|layers)", key)
            if stage:
                number, part = int(stage[1]) + 1, stage[2]
                kind = {"proj": "input_proj", "proj_norm": "proj_norm", "layers": "decoder"}[part]
                tail = ".layers" if part == "layers" else ""
                key = key.replace(stage[0], f"decode_head.{kind}_{number}{tail}", 1)
            if is_shrunk:
                key = key.replace("decode_head.atm.layers.", "decode_head.atm.decoder_1.layers.")
                key = key.replace("decode_head.class_embed", "decode_head.atm.class_embed")
                key = key.replace("decode_head.queries", "decode_head.atm.q.weight")
                key = key.replace("decode_head.upsample_queries", "decode_head.q.weight")
            key = key.replace("decode_head.queries", "decode_head.q.weight")
        result[key] = value
    result["decode_head.loss_decode.criterion.empty_weight"] = torch.ones(K + 1)
    if is_shrunk:
        result["decode_head.atm.loss_decode.criterion.empty_weight"] = torch.ones(K + 1)
    return result


@pytest.mark.parametrize("make", [plain, shrunk])
@pytest.mark.parametrize("layout", ["mmseg", "timm"])
def test_official_checkpoints_convert(make: Any, layout: str) -> None:
    state = make().state_dict()
    theirs = official(state, layout, is_shrunk=make is shrunk)
    assert len(theirs) == len(state) + (2 if make is shrunk else 1)
    ours = convert(theirs)
    assert ours.keys() == state.keys()
    assert all(ours[key] is value for key, value in state.items())
    load_state(make(), ours, source="test")
    with pytest.raises(UserError, match=r"unknown \['head\.surprise'\]"):
        load_state(make(), convert(theirs | {"decode_head.surprise": torch.ones(1)}), source="test")
    theirs.pop("backbone.cls_token")
    with pytest.raises(UserError, match=r"missing \['backbone\.cls_token'\]"):
        load_state(make(), convert(theirs), source="test")


@pytest.mark.parametrize("make", [plain, shrunk])
def test_initialisation(make: Any) -> None:
    torch.manual_seed(0)
    head = make(dim=256, heads=4, num_classes=50).head
    for key, module in head.named_modules():
        if isinstance(module, Attention):
            limit = (6 / (256 + 3 * 256)) ** 0.5  # xavier uniform of the packed (3C, C) matrix
            assert module.qkv.weight.abs().max() <= limit, key
            assert module.qkv.weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.02), key
            assert module.qkv.bias.abs().max() == 0
        elif isinstance(module, nn.Linear):
            assert module.bias.abs().max() == 0, key
            if not key.endswith("qkv"):
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.05), key
        elif isinstance(module, nn.LayerNorm):
            assert (module.eps, module.weight.min(), module.bias.abs().max()) == (1e-5, 1, 0)
    assert head.queries.std().item() == pytest.approx(1, rel=0.05)
    if make is shrunk:
        assert head.upsample_queries.std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("make", [plain, shrunk])
def test_stochastic_depth_acts_on_the_mlp_branch_only(make: Any) -> None:
    blocks = make(drop_path=0.3).backbone.blocks
    assert all(isinstance(block.drop_path1, nn.Identity) for block in blocks)
    assert blocks[-1].drop_path2.drop_prob == pytest.approx(0.3)
    assert make(drop_path=0.3, attention_drop_path=True).backbone.blocks[-1].drop_path1.drop_prob > 0


@pytest.mark.parametrize("make", [plain, shrunk])
@pytest.mark.parametrize("prefix_tokens", ["keep", "drop"])
@pytest.mark.parametrize(
    "backbone",
    [
        "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224", "beit_base_patch16_224",
        "vit_base_patch16_clip_224", "vit_base_patch16_siglip_224",
    ],
)  # fmt: skip
@torch.no_grad()
def test_other_backbones(make: Any, prefix_tokens: str, backbone: str, seeded: torch.Generator) -> None:
    out = make(backbone=backbone, prefix_tokens=prefix_tokens)(torch.randn(1, 3, 37, 50))
    assert out.logits.shape == (1, K, 5, 7)
    assert torch.isfinite(out.logits).all()


def test_wrong_shrink_at() -> None:
    for wrong in (-1, 3):
        with pytest.raises(UserError, match=r"shrink_at .* 0\.\.2"):
            shrunk(shrink_at=wrong)
