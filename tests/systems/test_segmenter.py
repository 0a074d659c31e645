"""Segmenter beyond the golden decoder: the encoder's norms, cosine masks, the linear decoder, conversion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.contracts import UserError
from segvit.model_folder import load_state
from segvit.nn.flops import count_parameters
from segvit.systems import segmenter
from segvit.zoo import build_network

K = 5
TINY: dict[str, Any] = {
    "num_classes": K, "backbone": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "depth": 2,
    "embed_dim": 128,
}  # fmt: skip


def build(**options: Any) -> segmenter.Segmenter:
    torch.manual_seed(0)
    return segmenter.segmenter(**(TINY | options)).eval()


# (name, other options, classes, side, width): our parameters, and the README's, in millions. Those count the image
# classifier's 1000 D + 1000, which the released encoders still have and we leave out. Two rows do not come out: small
# would be 26.4 and base 103.3. The row of Cityscapes does with a decoder of one layer, whatever it was trained with.
PATCH_8 = {"backbone": "vit_base_patch8_224"}
DEIT = {"backbone": "deit_base_distilled_patch16_384"}
PUBLISHED: list[tuple[str, dict[str, Any], int, int, int, int, int | None]] = [
    ("segmenter_vit_tiny", {}, 150, 512, 192, 6_713_388, 7),
    ("segmenter_vit_small", {}, 150, 512, 384, 26_033_964, None),  # 27
    ("segmenter_vit_base", {}, 150, 512, 768, 102_497_580, None),  # 106
    ("segmenter_vit_base", DEIT, 150, 512, 768, 102_499_116, None),  # 106; a distillation token more
    ("segmenter_linear_vit_base", PATCH_8, 150, 512, 768, 88_466_838, 89),
    ("segmenter_vit_large", {}, 150, 640, 1024, 333_234_476, 334),
    ("segmenter_vit_large", {"layers": 1}, 19, 768, 1024, 321_224_742, 322),
]


@pytest.mark.parametrize(("name", "options", "classes", "side", "width", "ours", "readme"), PUBLISHED)
def test_published_parameters(
    name: str, options: dict[str, Any], classes: int, side: int, width: int, ours: int, readme: int | None
) -> None:
    with torch.device("meta"):
        model = build_network(name, num_classes=classes, image_size=side, **options)
    assert count_parameters(model) == ours
    if readme is not None:
        assert round((ours + 1000 * width + 1000) / 1e6) == readme


@pytest.mark.parametrize("decoder", ["mask_transformer", "linear"])
def test_every_norm_has_the_default_eps(decoder: str) -> None:
    norms = [m for m in build(decoder=decoder).modules() if isinstance(m, nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-5}


@torch.no_grad()
def test_masks_are_cosines_under_a_norm(seeded: torch.Generator) -> None:
    decoder = build().decoder
    tokens = torch.randn(2, 16, 128)
    cosines: list[Tensor] = []
    decoder.mask_norm.register_forward_pre_hook(lambda module, inputs: cosines.append(inputs[0]))
    masks = decoder(tokens)
    assert masks.shape == (2, K, 16)
    assert cosines[0].shape == (2, 16, K)
    assert cosines[0].abs().max() <= 1 + 1e-5
    torch.testing.assert_close(masks, F.layer_norm(cosines[0], (K,)).mT)


@torch.no_grad()
def test_linear_decoder(seeded: torch.Generator) -> None:
    model = build(decoder="linear")
    images = torch.randn(2, 3, 24, 37)
    out, features = model(images), model.backbone(images)
    assert features.grid == (3, 5)
    head = model.decoder.head
    expected = torch.einsum("bdhw,kd->bkhw", features.maps[-1], head.weight) + head.bias[:, None, None]
    torch.testing.assert_close(out.logits, expected)
    full = F.interpolate(out.logits, size=(24, 40), mode="bilinear", align_corners=False)[..., :37]
    torch.testing.assert_close(segmenter.READOUT(out, (24, 37), range(24)), full)


def test_the_encoder_ends_with_its_norm_and_its_class_token_takes_part(seeded: torch.Generator) -> None:
    model = build(decoder="linear")
    assert isinstance(model.backbone.norm, nn.LayerNorm)
    assert model.backbone.position_mode == "bilinear"
    model(torch.randn(1, 3, 32, 32)).logits.square().sum().backward()
    assert model.backbone.cls_token.grad.abs().max() > 0


@pytest.mark.parametrize("decoder", ["mask_transformer", "linear"])
def test_official_checkpoints_convert(decoder: str) -> None:
    model = build(decoder=decoder)
    state = model.state_dict()
    theirs = {key.replace("backbone.", "encoder.", 1): value for key, value in state.items()}
    assert "encoder.blocks.0.attn.qkv.weight" in theirs
    theirs |= {"encoder.head.weight": torch.zeros(10, 128), "encoder.head.bias": torch.zeros(10)}
    ours = segmenter.convert(theirs)
    assert ours.keys() == state.keys()
    assert all(ours[key] is value for key, value in state.items())
    with pytest.raises(UserError, match="unknown"):
        load_state(model, segmenter.convert(theirs | {"decoder.surprise": torch.ones(1)}), source="test")


def test_the_keys_of_the_official_mask_transformer() -> None:
    """As the reference's decoder names them."""
    block = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    pairs = ["proj_dec", "decoder_norm", "mask_norm", *(f"blocks.{i}.{part}" for i in range(2) for part in block)]
    expected = {"cls_emb", "proj_patch", "proj_classes"} | {f"{p}.{kind}" for p in pairs for kind in ("weight", "bias")}
    assert set(build().decoder.state_dict()) == expected


def test_initialisation() -> None:
    decoder = build(num_classes=60).decoder
    assert decoder.proj_patch.std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert decoder.cls_emb.std().item() == pytest.approx(0.02, rel=0.05)
    assert decoder.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_dropout_acts_in_the_decoder_and_drop_path_in_the_encoder() -> None:
    model = build(dropout=0.2, drop_path=0.3)
    rates = {m.p for m in model.decoder.modules() if isinstance(m, nn.Dropout)}
    assert rates == {0.2}
    assert {m.p for m in model.backbone.modules() if isinstance(m, nn.Dropout)} == {0.0}
    assert model.backbone.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)


def test_the_criterion_is_cross_entropy_unless_asked_for_more(seeded: torch.Generator) -> None:
    out, masks = build()(torch.randn(2, 3, 32, 32)), torch.randint(0, K, (2, 32, 32), dtype=torch.uint8)
    totals = segmenter.normalisers(masks, num_classes=K, ignore_index=255)
    plain = segmenter.criterion(out, masks, totals)
    full = F.interpolate(out.logits, size=(32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(plain, {"loss_ce": F.cross_entropy(full, masks.long())})
    weights = torch.arange(1.0, K + 1)
    terms = segmenter.criterion(
        out, masks, totals, class_weights=weights, cross_entropy=2.0, focal=1.0, dice=1.0, lovasz=1.0, ohem=1.0,
        gamma=0.0, ohem_threshold=1.0, ohem_min_kept=0,
    )  # fmt: skip
    assert list(terms) == ["loss_ce", "loss_focal", "loss_ohem", "loss_dice", "loss_lovasz"]
    expected = (F.cross_entropy(full, masks.long(), reduction="none") * weights[masks.long()]).mean()
    for name, factor in (("ce", 2), ("focal", 1), ("ohem", 1)):  # with these options all three are cross entropy
        torch.testing.assert_close(terms[f"loss_{name}"], factor * expected)
