"""Other libraries' networks for the same job, with random weights: image -> label map as their own guides do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.contracts import Size, UserError


class Rival(NamedTuple):
    """A network and what makes label maps of its output."""

    what: str
    network: nn.Module
    labels: Callable[[Tensor], Tensor]  # normalised images (1, 3, H, W) -> (H, W)


def build_rival(name: str, classes: int, size: Size) -> Rival:
    """A rival by name, for images of `size`.

    Raises UserError for unknown names and where its library is missing.
    """
    if name not in RIVALS:
        raise UserError(f"there is no rival {name!r}; choose from {', '.join(RIVALS)}")
    torch.manual_seed(0)
    try:
        rival = RIVALS[name](classes, size)
    except ImportError as error:
        raise UserError(f"{name} needs {error.name}; pip install {PACKAGES[name][1]}") from None
    rival.network.eval()
    return rival


def _transformers(what: str, network: nn.Module, processor: Any) -> Rival:
    def labels(images: Tensor) -> Tensor:
        out = network(pixel_values=images)
        found: Tensor = processor.post_process_semantic_segmentation(out, target_sizes=[tuple(images.shape[-2:])])[0]
        return found

    return Rival(what, network, labels)


def _eomt(classes: int, size: Size) -> Rival:
    from transformers import EomtConfig, EomtForUniversalSegmentation, EomtImageProcessor

    if size[0] != size[1]:
        raise UserError(f"eomt takes square images only, not {size[0]} x {size[1]}; choose one --size")
    config = EomtConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, patch_size=16, image_size=size[0], num_blocks=3,
        num_queries=100, num_labels=classes,
    )  # fmt: skip
    network = EomtForUniversalSegmentation(config)
    processor = EomtImageProcessor(size={"shortest_edge": size[0], "longest_edge": size[1]})

    def labels(images: Tensor) -> Tensor:
        out = network(pixel_values=images)
        out["patch_offsets"] = None  # the image is one window
        found: Tensor = processor.post_process_semantic_segmentation(out, target_sizes=[size])[0]
        return found

    return Rival("EoMT, ViT-B/16, 100 queries (transformers)", network, labels)


def _mask2former(classes: int, size: Size) -> Rival:
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    swin = SwinConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    network = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, num_labels=classes))
    return _transformers("Mask2Former, Swin-T (transformers)", network, Mask2FormerImageProcessor())


def _segformer(classes: int, size: Size) -> Rival:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    config = SegformerConfig(
        depths=[3, 4, 6, 3], hidden_sizes=[64, 128, 320, 512], decoder_hidden_size=768, num_labels=classes
    )
    network = SegformerForSemanticSegmentation(config)
    return _transformers("SegFormer, MiT-B2 (transformers)", network, SegformerImageProcessor())


def _upernet(classes: int, size: Size) -> Rival:
    from transformers import ConvNextConfig, SegformerImageProcessor, UperNetConfig, UperNetForSemanticSegmentation

    stages = ["stage1", "stage2", "stage3", "stage4"]
    convnext = ConvNextConfig(hidden_sizes=[96, 192, 384, 768], depths=[3, 3, 9, 3], out_features=stages)
    network = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=convnext, num_labels=classes))
    return _transformers("UPerNet, ConvNeXt-T (transformers)", network, SegformerImageProcessor())


def _smp_unet(classes: int, size: Size) -> Rival:
    import segmentation_models_pytorch as smp

    network = smp.create_model("unet", encoder_name="resnet50", encoder_weights=None, classes=classes)
    return Rival("U-Net, ResNet-50 (segmentation-models-pytorch)", network, lambda images: network(images)[0].argmax(0))


def _timm_linear(classes: int, size: Size) -> Rival:
    import timm

    vit = timm.create_model("vit_base_patch16_224", num_classes=0, img_size=size, dynamic_img_pad=True)
    head = nn.Conv2d(768, classes, 1)

    def labels(images: Tensor) -> Tensor:
        (features,) = vit.forward_intermediates(images, indices=1, intermediates_only=True)
        scores = F.interpolate(head(features), tuple(images.shape[-2:]), mode="bilinear")
        return scores[0].argmax(0)

    return Rival("ViT-B/16 and a linear layer (timm)", nn.ModuleList([vit, head]), labels)


RIVALS: dict[str, Callable[[int, Size], Rival]] = {
    "eomt": _eomt, "mask2former": _mask2former, "segformer": _segformer, "upernet": _upernet, "smp_unet": _smp_unet,
    "timm_linear": _timm_linear,
}  # fmt: skip
PACKAGES = {  # what each comes from, and what brings it
    **dict.fromkeys(("eomt", "mask2former", "segformer", "upernet"), ("transformers", "'segvit[bench]'")),
    "smp_unet": ("segmentation-models-pytorch", "'segvit[bench]'"), "timm_linear": ("timm", "timm"),
}  # fmt: skip


def versions(rivals: Sequence[str]) -> dict[str, str]:
    """The version of each package that these come from."""
    return {package: metadata.version(package) for package, _ in (PACKAGES[rival] for rival in rivals)}
