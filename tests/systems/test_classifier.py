"""Classifiers: timm's own features, a contract that dense tools understand, and published counts of adapters."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from segvit.contracts import UserError
from segvit.systems.classifier import classifier, criterion, normalisers
from segvit.zoo import CLASSIFIERS, MODELS, create_model, find_system

SWIN = "swin_tiny_patch4_window7_224"
VIT: dict[str, Any] = {"image_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 64}


def images(side: int = 64) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "resnet10t", "convnext_atto", pytest.param(SWIN, marks=pytest.mark.slow)]
)
def test_the_vector_is_timms(name: str, tmp_path: Any) -> None:
    """What timm's classifier feeds to its last layer, with the last norm's weights read from the same file."""
    options: dict[str, Any] = {"strict_img_size": False} if name.startswith("swin") else {}
    options |= {"img_size": 64} if name.startswith(("swin", "vit")) else {}
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=3, **options).eval()
    for key, parameter in theirs.named_parameters():
        if key in ("norm.weight", "norm.bias", "head.norm.weight", "head.norm.bias"):
            parameter.data.normal_()
    path = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), path)
    side = options.get("img_size")
    ours = classifier(num_classes=3, backbone=name, weights=str(path), image_size=side).eval()
    expected = theirs.forward_head(theirs.forward_features(images()), pre_logits=True)
    torch.testing.assert_close(ours.pool(ours.backbone(images())), expected, rtol=1e-4, atol=1e-5)


def test_logits_are_a_map_of_one_cell() -> None:
    model = create_model("classifier_vit_tiny", num_classes=4, **VIT).eval()
    out = model(images(40))
    assert out.logits.shape == (2, 4, 1, 1)
    shown = model.readout(out, (40, 40), range(3, 5))
    torch.testing.assert_close(shown, out.logits.expand(2, 4, 2, 40))


def test_the_loss_is_the_mean_over_the_whole_batch() -> None:
    model = create_model("classifier_vit_tiny", num_classes=4, **VIT)
    out, labels = model(images(32)), torch.tensor([3, 1])
    logits = out.logits.flatten(1)
    loss = criterion(out, labels, normalisers(labels), label_smoothing=0.1)["loss_class"]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1))
    halves = [
        criterion(out._replace(logits=out.logits[i : i + 1]), labels[i : i + 1], normalisers(labels))["loss_class"]
        for i in range(2)
    ]
    torch.testing.assert_close(sum(halves), torch.nn.functional.cross_entropy(logits, labels))


def test_without_a_class_token_patches_are_averaged() -> None:
    options: dict[str, Any] = {"image_size": 32, "patch_size": 16, "depth": 1, "embed_dim": 64}
    model = create_model("classifier", num_classes=2, backbone="vit_base_patch16_siglip_224", **options).eval()
    features = model.backbone(images(32))
    assert features.pooled is None
    torch.testing.assert_close(model.pool(features), features.maps[-1].mean((2, 3)))


def test_the_catalogue_keeps_them_apart() -> None:
    assert not CLASSIFIERS.keys() & MODELS.keys()
    assert {system.task for system in CLASSIFIERS.values()} == {"classify"}
    assert find_system("classifier_resnet50") is CLASSIFIERS["classifier_resnet50"]


def test_mistakes() -> None:
    with pytest.raises(UserError, match="resnet18 is a pyramid; depth is for plain ViTs"):
        classifier(num_classes=2, backbone="resnet18", depth=3)
    with pytest.raises(UserError, match="timm has no model 'vit_tinny_patch16'"):
        classifier(num_classes=2, backbone="vit_tinny_patch16")


def trained(name: str, classes: int, adapter: str, **options: Any) -> int:
    with torch.device("meta"):
        model = create_model(name, num_classes=classes, adapter=adapter, adapter_options=options)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(("name", "classes", "adapter", "options", "count"), [
    ("classifier_vit_base", 100, "ssf", {}, 282_724),  # the official code's 0.28 M
    ("classifier_vit_base", 1000, "ssf", {}, 974_824),
    ("classifier_vit_base", 1, "ssf", {}, 205_824 + 769),
    ("classifier_vit_base", 100, "vpt_deep", {"num_prompts": 10}, 92_160 + 76_900),
    ("classifier_vit_base", 100, "vpt_deep", {"num_prompts": 50}, 460_800 + 76_900),
    ("classifier_vit_base", 100, "vpt_shallow", {"num_prompts": 50}, 50 * 768 + 76_900),
    ("classifier_vit_large", 100, "vpt_deep", {"num_prompts": 50}, 1_228_800 + 102_500),
    ("classifier_resnet50", 100, "conv_adapter", {"reduction": 4}, 356_848 + 204_900),
    ("classifier_resnet50", 100, "conv_adapter", {"reduction": 8}, 199_192 + 204_900),
    pytest.param("classifier_convnext_base", 100, "conv_adapter", {"reduction": 4}, 3_721_728 + 102_500 + 2048,
                 marks=pytest.mark.slow),
])  # fmt: skip
def test_the_cards_counts_with_a_head(
    name: str, classes: int, adapter: str, options: dict[str, Any], count: int
) -> None:  # fmt: skip
    """The adapter, and C x K + K of the head; ConvNeXt's last norm is new too."""
    assert trained(name, classes, adapter, **options) == count


@pytest.mark.parametrize(("name", "position", "millions"), [
    ("classifier_resnet50", "input", 2.30), ("classifier_vit_base", "input", 3.93),
    pytest.param("classifier_swin_base", "input", 2.32, marks=pytest.mark.slow),
])  # fmt: skip
def test_the_budgets_of_pro_tuning_with_a_head(name: str, position: str, millions: float) -> None:
    head = trained(name, 100, "head_only")
    assert trained(name, 100, "pro_tuning", position=position) - head == pytest.approx(millions * 1e6, abs=1.5e4)


def test_vpt_on_setr_pup_explained() -> None:
    """Table 3 of the VPT paper has 13.43 M for VPT-deep and 13.18 M for the head alone, which is 0.25 M for prompts.

    With 10 prompts on ViT-L they are 24 x 10 x 1024. All the rest is heads: SETR's own are a decoder of 4.17 M and four
    auxiliary ones of 2.40 M, 13.78 M; three auxiliary ones with a second convolution would be 13.15 M. Neither is
    13.18 M to the last digit, so the total is not reproduced; what VPT adds is.
    """
    head = trained("setr_pup_vit_large", 150, "head_only")
    total = trained("setr_pup_vit_large", 150, "vpt_deep", num_prompts=10)
    assert total - head == 24 * 10 * 1024 == 245_760
    assert round((total - head) / 1e6, 2) == round(13.43 - 13.18, 2)
    decoder, auxiliary, convolution = 4_172_438, 2_400_662, 256 * 256 * 9 + 3 * 256
    assert head == decoder + 4 * auxiliary == 13_775_086
    assert (decoder + 3 * (auxiliary + convolution)) / 1e6 == pytest.approx(13.18, abs=0.04)
