"""The classic families against the libraries that they come from: outputs, weights, and what a user can mend."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import nn

from segvit.contracts import UserError
from segvit.model_folder import load_state
from segvit.systems import classic
from segvit.zoo import create_model

K = 5
NAMES = [*classic.CLASSES, "dpt", "fcn", "lraspp"]


def resnet(name: str, **options: Any) -> classic.Classic:
    torch.manual_seed(0)
    return classic.classic(num_classes=K, family=name, backbone="resnet18", **options).eval()


# Outputs


@torch.no_grad()
@pytest.mark.parametrize(("name", "factor"), [("fpn", 4), ("deeplabv3", 8), ("deeplabv3_plus", 4), ("upernet", 4)])
def test_the_library_only_resizes_our_logits(name: str, factor: int, seeded: torch.Generator) -> None:
    ours = resnet(name)
    theirs = vars(smp)[classic.CLASSES[name]]("resnet18", encoder_weights=None, classes=K).eval()
    theirs.load_state_dict(ours.network.state_dict())
    images = torch.randn(1, 3, 64, 96)
    resized = F.interpolate(ours(images).logits, scale_factor=factor, mode="bilinear", align_corners=True)
    torch.testing.assert_close(resized, theirs(images))


@torch.no_grad()
def test_images_are_padded_with_zeros_and_scores_cropped(seeded: torch.Generator) -> None:
    model, images = resnet("unet"), torch.randn(2, 3, 37, 50)
    out = model(images)
    assert out.covers == (64, 64)
    torch.testing.assert_close(out.logits, model.network(F.pad(images, (0, 14, 0, 27))))
    scores = classic.READOUT(out, (37, 50), range(37))
    torch.testing.assert_close(scores, out.logits[..., :37, :50])


@torch.no_grad()
@pytest.mark.parametrize("name", ["fcn", "lraspp"])
def test_torchvision_networks_give_torchvision_scores(name: str, seeded: torch.Generator) -> None:
    model = create_model(name, num_classes=K).eval()
    images = torch.randn(1, 3, 32, 48)
    scores = classic.READOUT(model(images), (32, 48), range(32))
    torch.testing.assert_close(scores, model.network(images)["out"], atol=1e-5, rtol=1e-4)


def test_the_criterion_is_the_mean_over_valid_pixels(seeded: torch.Generator) -> None:
    out, masks = resnet("fpn")(torch.randn(2, 3, 32, 32)), torch.randint(0, K, (2, 32, 32), dtype=torch.uint8)
    masks[0, :8] = 255
    totals = classic.normalisers(masks, num_classes=K, ignore_index=255)
    full = F.interpolate(out.logits, size=(32, 32), mode="bilinear", align_corners=False)
    expected = F.cross_entropy(full, masks.long(), ignore_index=255)
    torch.testing.assert_close(classic.criterion(out, masks, totals), {"loss_ce": expected})
    assert set(classic.criterion(out, masks, totals, cross_entropy=0, dice=1.0, lovasz=1.0)) == {
        "loss_dice", "loss_lovasz",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_family_exports_at_its_own_size(name: str) -> None:
    model = create_model(name, num_classes=K, **({"image_size": 64} if name == "dpt" else {})).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        torch.testing.assert_close(program.module()(images).logits, model(images).logits, atol=1e-5, rtol=1e-4)


# Parts


def test_pspnet_has_no_stage_that_it_does_not_read() -> None:
    encoder = resnet("pspnet").network.encoder
    assert isinstance(encoder.layer3, nn.Identity)
    assert isinstance(encoder.layer4, nn.Identity)
    assert not isinstance(encoder.layer2, nn.Identity)


def test_encoders_by_name_and_decoder_keywords() -> None:
    model = classic.unet(
        num_classes=K, backbone="tu-mobilenetv3_small_100", decoder={"decoder_channels": [16, 16, 8, 8, 8]}
    )
    assert model.network.segmentation_head[0].in_channels == 8
    assert (model.mean, model.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert classic.statistics(smp, "xception", None, 3) == ((0.5,) * 3, (0.5,) * 3)
    assert classic.statistics(smp, "tu-vit_tiny_patch16_224", None, 3) == ((0.5,) * 3, (0.5,) * 3)
    assert classic.statistics(smp, "resnet18", None, 4) == ((0.5,) * 4, (0.5,) * 4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["unet", "lraspp"])
def test_images_of_other_channels(name: str) -> None:
    options = {"backbone": "resnet18"} if name == "unet" else {}
    model = create_model(name, num_classes=K, in_channels=5, **options).eval()
    assert model(torch.randn(1, 5, 32, 32)).logits.shape[1] == K
    assert model.spec.channels == 5


def test_dropout_replaces_the_rates() -> None:
    rates = {module.p for module in resnet("fpn", dropout=0.4).modules() if isinstance(module, nn.Dropout2d)}
    assert rates == {0.4}
    assert resnet("unet", dropout=0.0)
    with pytest.raises(UserError, match="no dropout layer"):
        resnet("unet", dropout=0.1)


# Weights


@pytest.fixture
def encoder_file(tmp_path: Path) -> Path:
    """A ResNet-18 as torchvision saves it, classifier and all."""
    torch.manual_seed(1)
    save_file(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "resnet18.safetensors")
    return tmp_path / "resnet18.safetensors"


def test_encoder_weights_from_a_file(encoder_file: Path) -> None:
    torch.manual_seed(1)
    kernel = torchvision.models.resnet18(weights=None).conv1.weight
    for name in ("unet", "pspnet"):
        torch.testing.assert_close(resnet(name, weights=str(encoder_file)).network.encoder.conv1.weight, kernel)
    gray = resnet("unet", weights=str(encoder_file), in_channels=1)
    torch.testing.assert_close(gray.network.encoder.conv1.weight, kernel.sum(1, keepdim=True))


def test_a_file_of_timm_fits_its_network(tmp_path: Path) -> None:
    import timm

    state = timm.create_model("convnext_atto").state_dict()
    save_file(state, tmp_path / "atto.safetensors")
    model = classic.fpn(num_classes=K, backbone="tu-convnext_atto", weights=str(tmp_path / "atto.safetensors"))
    loaded = model.network.encoder.model.stages_3.blocks[0].conv_dw.weight
    torch.testing.assert_close(loaded, state["stages.3.blocks.0.conv_dw.weight"])


def test_weights_that_do_not_fit(encoder_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not fit the encoder: .* keys missing"):
        classic.unet(num_classes=K, backbone="resnet34", weights=str(encoder_file))
    with pytest.raises(UserError, match="no such weights file"):
        resnet("unet", weights=str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match="Wrong pretrained weights `imagnet`"):
        resnet("unet", weights="imagnet")


def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    remedy = r"weights 'imagenet' of .* cannot be downloaded .* pass weights=PATH, or weights=none"
    monkeypatch.setattr("segmentation_models_pytorch.encoders.hf_hub_download", unreachable)
    with pytest.raises(UserError, match=remedy):
        resnet("unet", weights="imagenet")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(UserError, match=remedy):
        create_model("lraspp", num_classes=K, weights="imagenet")


def unreachable(*args: object, **kwargs: object) -> None:
    raise URLError("no route")


def test_whole_checkpoints_convert() -> None:
    model = create_model("lraspp", num_classes=K)
    theirs = {key.removeprefix("network."): value for key, value in model.state_dict().items()}
    theirs["aux_classifier.0.weight"] = torch.ones(1)
    load_state(model, classic.convert(theirs), source="test")


# Mistakes


def test_mistakes() -> None:
    with pytest.raises(UserError, match="no encoder 'resnet34x'; did you mean resnet34"):
        classic.unet(num_classes=K, backbone="resnet34x")
    with pytest.raises(UserError, match="unet_plus_plus cannot be built on mit_b0"):
        classic.unet_plus_plus(num_classes=K, backbone="mit_b0")
    with pytest.raises(UserError, match=r"unet cannot be built on resnet18 .Attention magic"):
        classic.unet(num_classes=K, backbone="resnet18", decoder={"decoder_attention_type": "magic"})
    with pytest.raises(UserError, match=r"unet has no keyword 'attention'; it has .*decoder_attention_type"):
        classic.unet(num_classes=K, backbone="resnet18", decoder={"attention": "scse"})
    with pytest.raises(UserError, match="timm has no model 'vit_huge'"):
        classic.dpt(num_classes=K, backbone="vit_huge")
    with pytest.raises(UserError, match="has patches of 14; DPT needs them to divide 32"):
        classic.dpt(num_classes=K, backbone="vit_small_patch14_dinov2", image_size=56)
    with pytest.raises(UserError, match="2 images a process or more"):
        resnet("deeplabv3").train()(torch.randn(1, 3, 32, 32))


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(UserError, match=r"pip install segvit\[classic\]"):
        create_model("unet", num_classes=K)
