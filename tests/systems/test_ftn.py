"""FTN beyond the goldens: published counts, any size, the auxiliary head, losses, the authors' names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from segvit.contracts import Dense, UserError
from segvit.model_folder import load_state
from segvit.nn.flops import count_parameters
from segvit.systems import ftn
from segvit.systems.ftn import FTN, FPTHead, convert, criterion, normalisers
from segvit.zoo import MODELS, build_network
from tests.counting import fvcore_gmacs, gmacs

K = 4
TINY: dict[str, Any] = {"num_classes": K, "depths": (1, 1, 1, 1), "embed_dim": 32, "dim": 16, "heads": 2}


def build(**options: Any) -> FTN:
    torch.manual_seed(0)
    return ftn.ftn(**(TINY | options)).eval()


# Millions of parameters and multiply-adds at 512, 150 classes, no auxiliary head, the latter also by fvcore with the
# resize of the scores to the image; measured on the authors' code. The paper's own table was not at hand.
PUBLISHED = {
    "tiny": (45.097, 86.02, 86.35), "small": (60.601, 101.37, 101.73), "base": (81.941, 132.82, 133.23),
    "large": (120.090, 173.35, 173.80),
}  # fmt: skip
HEAVY = ("base", "large")


@pytest.mark.parametrize("size", [pytest.param(n, marks=pytest.mark.slow if n in HEAVY else []) for n in PUBLISHED])
def test_published_counts(size: str) -> None:
    with torch.device("meta"):
        model = build_network(f"ftn_{size}", num_classes=150, aux=False)
    parameters, multiply_adds, by_fvcore = PUBLISHED[size]
    assert count_parameters(model) / 1e6 == pytest.approx(parameters, abs=5e-4)
    assert gmacs(model, (512, 512)) == pytest.approx(multiply_adds, abs=5e-3)
    resize = 4 * 150 * 512**2 / 1e9
    assert fvcore_gmacs(model, (512, 512)) + resize == pytest.approx(by_fvcore, abs=5e-3)


def test_the_larger_ones_drop_more_paths() -> None:
    rates = {name: MODELS[name].build.keywords.get("drop_path", 0.1) for name in MODELS if name.startswith("ftn_")}
    assert rates == {"ftn_tiny": 0.1, "ftn_small": 0.1, "ftn_base": 0.3, "ftn_large": 0.3}


@pytest.mark.parametrize("size", [(64, 64), (65, 127), (100, 180), (1, 70)])
@torch.no_grad()
def test_any_size(size: tuple[int, int]) -> None:
    out = build()(torch.randn(2, 3, *size))
    covers = tuple(max(side, 64) for side in size)
    assert out.covers == covers
    assert out.logits.shape == (2, K, covers[0] // 8, covers[1] // 8)
    assert torch.isfinite(out.logits).all()
    assert ftn.READOUT(out, size, range(size[0])).shape == (2, K, *size)


@torch.no_grad()
def test_branches_have_as_many_stages_as_doublings(seeded: torch.Generator) -> None:
    head = FPTHead(16, num_classes=K, heads=2).eval()
    assert [len(branch) for branch in head.branches] == [3, 2, 1]
    levels = [torch.randn(1, 16, 8, 12), torch.randn(1, 16, 4, 6), torch.randn(1, 16, 2, 3)]
    logits, outputs = head(levels)
    x = levels[2]
    for number, stage in enumerate(head.branches[0]):
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False) if number else x
        tokens = stage[0](x.flatten(2).mT, (x.shape[-2], x.shape[-1]))
        x = tokens.mT.unflatten(2, x.shape[-2:])
    torch.testing.assert_close(outputs[0], x)
    torch.testing.assert_close(logits, head.classify(sum(outputs)))


@torch.no_grad()
def test_branches_of_odd_maps_meet(seeded: torch.Generator) -> None:
    head = FPTHead(16, num_classes=K, heads=2).eval()
    _, outputs = head([torch.randn(1, 16, 9, 15), torch.randn(1, 16, 4, 7), torch.randn(1, 16, 2, 3)])
    assert {x.shape for x in outputs} == {(1, 16, 9, 15)}


@torch.no_grad()
def test_position_maps_are_added_where_branches_start(seeded: torch.Generator) -> None:
    torch.manual_seed(0)
    head = FPTHead(16, num_classes=K, heads=2, position_sizes=(2, 4, 8)).eval()
    assert [tuple(x.shape) for x in head.positions] == [(1, 16, 2, 2), (1, 16, 4, 4), (1, 16, 8, 8)]
    levels = [torch.randn(1, 16, 8, 8), torch.randn(1, 16, 4, 4), torch.randn(1, 16, 2, 2)]
    _, outputs = head(levels)
    moved = [level + position for level, position in zip(levels, reversed(head.positions), strict=True)]
    head.positions = torch.nn.ParameterList()
    for mine, theirs in zip(outputs, head(moved)[1], strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_auxiliary_head_reads_the_middle_level_in_training() -> None:
    model, images = build(dropout=0.0, drop_path=0.0), torch.randn(2, 3, 64, 96)
    assert model(images).extras == {}
    out = model.train()(images)
    assert out.extras["aux"].shape == (2, K, 4, 6)
    level = model.fpn(model.backbone(images).maps)[1]
    torch.testing.assert_close(out.extras["aux"], model.aux_head(level))
    assert build(aux=False).train()(images).extras == {}
    rates = {m.p for m in build(dropout=0.2).modules() if isinstance(m, torch.nn.Dropout2d)}
    assert rates == {0.2}


def test_losses_are_means_over_all_pixels(seeded: torch.Generator) -> None:
    masks = torch.randint(0, K, (2, 20, 30), dtype=torch.uint8)
    masks[0, :10] = 255
    out = Dense(torch.randn(2, K, 5, 8), {"aux": torch.randn(2, K, 3, 4)}, (20, 30))
    totals = normalisers(masks, num_classes=K, ignore_index=255)
    expected = {}
    for name, logits, weight in (("loss_ce", out.logits, 1.0), ("loss_aux_ce", out.extras["aux"], 0.4)):
        full = F.interpolate(logits, size=(20, 30), mode="bilinear", align_corners=False)
        expected[name] = weight * F.cross_entropy(full, masks.long(), ignore_index=255, reduction="none").mean()
    torch.testing.assert_close(criterion(out, masks, totals), expected)
    assert list(criterion(out, masks, totals, aux_weight=0.0)) == ["loss_ce"]
    more = criterion(out, masks, totals, cross_entropy=0.0, ohem=1.0, lovasz=1.0)
    assert list(more) == ["loss_ohem", "loss_lovasz", "loss_aux_ohem", "loss_aux_lovasz"]


# Our parts by the authors' names, each once.
PARTS = {
    "backbone.stages.2.blocks.0.attn.kv.weight": "backbone.stages.2.blocks.0.attn.kv.weight",
    "backbone.stages.0.blocks.0.ffn.layers.0.0.weight": "backbone.stages.0.blocks.0.mlp.fc1.weight",
    "backbone.stages.0.blocks.0.ffn.layers.1.bias": "backbone.stages.0.blocks.0.mlp.fc2.bias",
    "backbone.stages.3.blocks.0.cpe.conv.weight": "backbone.stages.3.blocks.0.cpe.weight",
    "backbone.stages.1.transform.proj.bias": "backbone.stages.1.transform.proj.bias",
    "backbone.norm3.weight": "backbone.norms.3.weight",
    "neck.lateral_convs.2.conv.weight": "fpn.lateral.2.weight",
    "neck.fpn_convs.0.conv.bias": "fpn.output.0.bias",
    "decode_head.branches.0.2.0.attn.sr.weight": "head.branches.0.2.0.attn.sr.weight",
    "decode_head.branches.1.0.0.ffn.layers.1.weight": "head.branches.1.0.0.mlp.fc2.weight",
    "decode_head.conv_seg.weight": "head.classify.weight",
    "auxiliary_head.convs.0.conv.weight": "aux_head.0.weight",
    "auxiliary_head.convs.0.bn.running_var": "aux_head.1.running_var",
    "auxiliary_head.conv_seg.bias": "aux_head.4.bias",
}


def test_official_names() -> None:
    state = build().state_dict()
    ours = convert({theirs: state[mine] for theirs, mine in PARTS.items()})
    assert set(ours) == set(PARTS.values())
    assert convert({"decode_head.ape_embeds.1": torch.ones(1)}).keys() == {"head.positions.1"}
    with pytest.raises(UserError, match="unknown"):
        load_state(build(), state | convert({"backbone.surprise": torch.ones(1)}), source="test")


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="dim 16 must be a multiple of its heads 3"):
        build(heads=3)
    with pytest.raises(UserError, match="no PGT 'pgt_huge'"):
        build(backbone="pgt_huge")
    gray = build(in_channels=1)
    assert gray(torch.randn(1, 1, 64, 64)).logits.shape == (1, K, 8, 8)
    assert gray.backbone.mean == (0.5,)
