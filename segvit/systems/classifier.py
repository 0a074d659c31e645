"""Image classification: one linear layer on what a backbone makes of the whole image.

Idea      The setting in which VPT, SSF, Conv-Adapter and Pro-tuning were published: a frozen backbone, a new linear
          head. A plain ViT gives its class token behind the last norm (without such a token, the mean of the patches);
          a pyramid the mean of its last map, with the last norm where timm's classifier has one (Swin before the mean,
          ConvNeXt behind it). That norm is no part of the backbone here, so it trains with the head.
Contract  Logits are a map of one cell, so that folders, adapters and their checks are those of the dense systems.
Checked   tests/systems/test_classifier.py against timm's own classifiers; SSF's published counts with heads.

Shapes    B images, K classes, C channels.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from segvit.backbones.pyramid import Pyramid, pyramid
from segvit.backbones.vit import PlainViT, plain_vit
from segvit.backbones.weights import find_state
from segvit.contracts import Dense, Features, Readout, Size, UserError
from segvit.nn.readout import logit_rows

LAST_NORMS = ("norm", "head.norm")  # of timm's classifiers: before and behind the mean


class Classifier(nn.Module):
    """A backbone and a linear head; logits (B, K, 1, 1)."""

    def __init__(
        self, backbone: PlainViT | Pyramid, dim: int, *, num_classes: int, norm: nn.Module, norm_first: bool,
        dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.backbone, self.norm, self.norm_first = backbone, norm, norm_first
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Dense:
        features = self.backbone(images)
        logits = self.head(self.drop(self.pool(features)))
        return Dense(logits[..., None, None], features.extras, features.covers)

    def pool(self, features: Features) -> Tensor:
        """One vector (B, C) for each image: what the head reads, and a descriptor of the image."""
        if features.pooled is not None:
            return features.pooled
        cells = features.maps[-1].flatten(2).mT
        return cast(Tensor, self.norm(cells).mean(1) if self.norm_first else self.norm(cells.mean(1)))


READOUT = Readout(logit_rows)


def criterion(
    out: Dense, labels: Tensor, totals: dict[str, Tensor], *, label_smoothing: float = 0.0
) -> dict[str, Tensor]:  # fmt: skip
    """Cross entropy of the labels (B,), over the number of images of the whole batch."""
    logits = out.logits.flatten(1).float()
    total = F.cross_entropy(logits, labels.long(), reduction="sum", label_smoothing=label_smoothing)
    return {"loss_class": total / totals["images"]}


def normalisers(labels: Tensor) -> dict[str, Tensor]:
    """The number of images."""
    return {"images": torch.tensor(float(len(labels)), device=labels.device)}


def classifier(
    *,
    num_classes: int,
    backbone: str = "vit_base_patch16_224",
    weights: str | None = None,
    image_size: int | Size | None = None,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    patch_size: int | None = None,
    depth: int | None = None,
    embed_dim: int | None = None,
    in_channels: int = 3,
) -> Classifier:
    """A classifier on any plain ViT or feature pyramid of timm by name.

    `weights` are those of the backbone, see `plain_vit` and `pyramid`; the head is always new. `image_size` None = 224
    for a plain ViT, its own for a pyramid. `patch_size`, `depth` and `embed_dim` change a plain ViT, for training from
    nothing. Raises UserError for them with a pyramid, and for what the two builders refuse.
    """
    changes: dict[str, Any] = {"patch_size": patch_size, "depth": depth, "embed_dim": embed_dim}
    if not timm.is_model(backbone.partition(".")[0]) or is_plain(backbone):
        vit = plain_vit(
            backbone, image_size=image_size or 224, out_indices=(-1,), weights=weights, final_norm=True,
            drop_path=drop_path, in_channels=in_channels, **changes,
        )  # fmt: skip
        return Classifier(
            vit, vit.dim, num_classes=num_classes, norm=nn.Identity(), norm_first=True, dropout=dropout
        )  # fmt: skip
    given = [name for name, value in changes.items() if value is not None]
    if given or not isinstance(image_size, int | None):
        raise UserError(f"{backbone} is a pyramid; {', '.join(given) or 'an oblong image_size'} is for plain ViTs")
    trunk = pyramid(backbone, weights=weights, drop_path=drop_path, in_channels=in_channels, image_size=image_size)
    norm, first = last_norm(backbone, weights)
    return Classifier(
        trunk, trunk.dims[-1], num_classes=num_classes, norm=norm, norm_first=first, dropout=dropout
    )  # fmt: skip


def is_plain(name: str) -> bool:
    """Whether timm's model of that name is a plain ViT."""
    with torch.device("meta"):
        return isinstance(timm.create_model(name.partition(".")[0]), VisionTransformer | Eva | Beit)


def last_norm(name: str, weights: str | None) -> tuple[nn.Module, bool]:
    """The norm that timm's classifier of that name has behind its stages, and whether it comes before the mean."""
    with torch.device("meta"):
        parts = dict(timm.create_model(name).named_modules())
    place = next((place for place in LAST_NORMS if isinstance(parts.get(place), nn.LayerNorm)), None)
    if place is None:
        return nn.Identity(), True
    known = cast(nn.LayerNorm, parts[place])
    norm = nn.LayerNorm(known.normalized_shape, eps=known.eps)
    state = {} if weights is None else find_state(weights)
    if f"{place}.weight" in state:
        norm.load_state_dict({leaf: state[f"{place}.{leaf}"] for leaf in ("weight", "bias")})
    return norm, place == "norm"


classifier_vit_tiny = partial(classifier, backbone="vit_tiny_patch16_224")
classifier_vit_small = partial(classifier, backbone="vit_small_patch16_224")
classifier_vit_base = partial(classifier, backbone="vit_base_patch16_224")
classifier_vit_large = partial(classifier, backbone="vit_large_patch16_224")
classifier_resnet50 = partial(classifier, backbone="resnet50")
classifier_convnext_base = partial(classifier, backbone="convnext_base")
classifier_swin_base = partial(classifier, backbone="swin_base_patch4_window7_224")


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """There are no official checkpoints of this form: ours, as they are."""
    return state
