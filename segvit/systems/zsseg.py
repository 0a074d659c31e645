"""zsseg: MaskFormer proposes masks, CLIP names them; both opinions are fused, and the masks add up to a map.

Paper     M. Xu et al., "A Simple Baseline for Zero-shot Semantic Segmentation with Pre-trained Vision-language Model",
          ECCV 2022, arXiv 2112.14757.
Idea      A query's embedding is compared with the classes' text vectors and a learned "no object"; at test time the
          masked crop of each proposal goes through CLIP's image tower as well. For seen classes the query's opinion
          weighs more, for unseen ones CLIP's.
Stages    Prompts (`segvit.tasks.regions`), whose vectors are the option `vectors`; then the proposals with all text
          frozen (`criterion`); for self-training the same again on what `segvit.tasks.pseudo_labels` writes.
Differs   from the official code: masks are scored over the image's own pixels, without the padding.
Checked   tests/golden/zsseg__* (MendelXu/zsseg.baseline), part by part.

Shapes    B images, Q queries, V valid ones, K classes, E joint channels, H W pixels, h w grid of the masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.backbones.clip import ClipResNet, build_backbone, rename_vit
from segvit.backbones.pyramid import Pyramid, pyramid
from segvit.backbones.vit import PlainViT
from segvit.contracts import Dense, MaskScores, Readout, Size, UserError
from segvit.losses.masks import present_classes
from segvit.losses.matching import Terms, class_targets, match, set_losses
from segvit.nn.mask_queries import PixelDecoder, QueryDecoder
from segvit.nn.readout import bilinear_rows, mix_masks
from segvit.nn.regions import region_crops
from segvit.nn.rename import Rules, rename
from segvit.text.checkpoint import named_clip
from segvit.text.embeddings import Name, class_vectors
from segvit.text.splits import unseen_ids

SCALE = 100.0  # of every cosine; CLIP's own logit scale is not used


class RegionClassifier(nn.Module):
    """CLIP's image tower, frozen, on crops of masked regions; the masks may come from any source.

    `fill` is what pixels outside a mask become: the mean of CLIP's images, or black. See `region_crops` for the rest.
    """

    def __init__(
        self, tower: PlainViT | ClipResNet, *, side: int = 224, threshold: float = 0.5, expand: float = 1.0,
        fill: Literal["mean", "zero"] = "mean", soft: bool = False, chunk: int = 32,
    ) -> None:  # fmt: skip
        super().__init__()
        if expand < 1 or not 0 <= threshold < 1:
            raise UserError(f"expand is {expand} and threshold {threshold}; give 1 or more, and a probability below 1")
        self.tower = tower.requires_grad_(False)
        self.side, self.threshold, self.expand, self.soft, self.chunk = side, threshold, expand, soft, chunk
        mean, std = torch.tensor(tower.mean), torch.tensor(tower.std)
        self.register_buffer("mean", mean[:, None, None], persistent=False)
        self.register_buffer("std", std[:, None, None], persistent=False)
        self.register_buffer("fill", torch.zeros(3) if fill == "mean" else -mean / std, persistent=False)

    def crops(self, image: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """CLIP's input for each mask that is not empty, (V, 3, S, S), and which ones those are (Q,)."""
        return region_crops(
            (image - self.get_buffer("mean")) / self.get_buffer("std"), masks, side=self.side,
            fill=self.get_buffer("fill"), threshold=self.threshold, expand=self.expand, soft=self.soft,
        )  # fmt: skip

    @torch.no_grad()
    def forward(self, image: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Image (3, H, W) in 0..1 and mask probabilities (Q, H, W) -> unit vectors (V, E) and which are valid (Q,)."""
        crops, valid = self.crops(image, masks)
        vectors = [self.tower(part).pooled for part in crops.split(self.chunk)]
        return F.normalize(torch.cat(vectors), dim=-1), valid


def cosine_logits(embeddings: Tensor, text: Tensor) -> Tensor:
    """100 times the cosine of embeddings (..., E) with unit vectors (K, E): (..., K), never in half precision."""
    # What only counts operations (the meta device) knows no autocast.
    with nullcontext() if embeddings.is_meta else torch.autocast(embeddings.device.type, enabled=False):
        wide = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        return SCALE * F.normalize(wide, dim=-1) @ text.to(wide.dtype).mT


def fuse(queries: Tensor, regions: Tensor, valid: Tensor, *, seen: Tensor, weight: float) -> Tensor:
    """Scores (Q, K): the geometric mean of both opinions, for seen classes with the weight on the queries'.

    `queries` (Q, K) are probabilities without the one of "no object", `regions` (V, K) those of the `valid` masks by
    CLIP; a mask that CLIP has not seen counts as certain of every class. `seen` (K,) bool; all False swaps the weights
    for all classes, as for a dataset that the proposals were not trained on. Weight 0 is CLIP alone, on valid masks.
    """
    if weight == 0:
        return torch.zeros_like(queries).masked_scatter(valid[:, None], regions.to(queries.dtype))
    known = torch.ones_like(queries).masked_scatter(valid[:, None], regions.to(queries.dtype))
    power = torch.where(seen, weight, 1 - weight)
    return queries**power * known ** (1 - power)


class ZSSeg(nn.Module):
    """Proposals and, unless `regions` is None, their naming by CLIP, which only evaluation uses.

    `embeddings` (K, E) are the classes' unit vectors, which `set_classes` changes at any time; training hides the ids
    in `unseen`. Images are normalised by the backbone's mean and deviation. Without `regions` nothing depends on the
    values of the data, so that the network can be exported.
    """

    def __init__(
        self, backbone: Pyramid, pixel_decoder: PixelDecoder, decoder: QueryDecoder, regions: RegionClassifier | None,
        *, embeddings: Tensor, unseen: Sequence[int] = (), ensemble_weight: float = 0.8,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 0 <= ensemble_weight <= 1:
            raise UserError(f"ensemble_weight is {ensemble_weight}; give the queries' share, from 0 to 1")
        self.backbone, self.pixel_decoder, self.decoder, self.regions = backbone, pixel_decoder, decoder, regions
        self.ensemble_weight = ensemble_weight
        width = embeddings.shape[1]
        self.no_object = nn.Parameter(width**-0.5 * torch.randn(1, width))
        for name in ("class_embeddings", "region_embeddings", "seen"):
            self.register_buffer(name, None)
        self.set_classes(embeddings, unseen=unseen)

    def set_classes(
        self, embeddings: Tensor, *, unseen: Sequence[int] | None = None, regions: Tensor | None = None
    ) -> None:
        """Other classes by their unit vectors (K, E), without training; other vectors for the `regions` if wanted.

        `unseen` are the ids that training hides; None is all of them, as for words that the model was not trained on.
        Raises UserError for other widths and for ids that are no class.
        """
        other = embeddings if regions is None else regions
        width = self.no_object.shape[1]
        if embeddings.dim() != 2 or embeddings.shape[1] != width or other.shape != embeddings.shape:
            raise UserError(
                f"class vectors are {tuple(embeddings.shape)} and {tuple(other.shape)}; give two alike of width {width}"
            )
        hidden = unseen_ids(range(len(embeddings)) if unseen is None else unseen, num_classes=len(embeddings))
        self.seen = torch.ones(len(embeddings), dtype=torch.bool, device=self.no_object.device)
        self.seen[list(hidden)] = False
        self.class_embeddings, self.region_embeddings = (
            vectors.detach().to(self.no_object).clone() for vectors in (embeddings, other)
        )

    def query_logits(self, embeddings: Tensor) -> Tensor:
        """Class logits (B, Q, K + 1), "no object" last."""
        text = torch.cat([self.get_buffer("class_embeddings"), F.normalize(self.no_object, dim=-1)])
        logits = cosine_logits(embeddings, text)
        seen = self.get_buffer("seen")
        if not self.training or not seen.any():
            return logits
        hidden = F.pad(~seen, (0, 1), value=False)
        return logits.masked_fill(hidden, torch.finfo(logits.dtype).min)

    def forward(self, images: Tensor) -> Dense:
        features = self.backbone(images)
        outputs = self.decoder(features.maps[-1], self.pixel_decoder(features.maps))
        logits, masks = [self.query_logits(embeddings) for embeddings, _ in outputs], [masks for _, masks in outputs]
        extras = {"class_logits": logits[-1], "masks": masks[-1]}
        for index in range(len(outputs) - 1):
            extras |= {f"aux{index}_class_logits": logits[index], f"aux{index}_masks": masks[index]}
        scores = logits[-1].softmax(-1)[..., :-1].to(masks[-1].dtype)
        # What CLIP costs depends on the masks' values, which the meta device has not: a count leaves it out.
        if self.regions is not None and not self.training and not images.is_meta:
            scores = self.named(images, scores, masks[-1], self.regions, covers=features.covers)
        mixed = mix_masks(scores, masks[-1].sigmoid())
        extras |= {"scores": scores, "seen": self.get_buffer("seen").expand(images.shape[0], -1)}
        return Dense(mixed, features.extras | extras, features.covers)

    def named(
        self, images: Tensor, scores: Tensor, masks: Tensor, regions: RegionClassifier, *, covers: Size
    ) -> Tensor:
        """The queries' scores (B, Q, K) fused with CLIP's opinion of each mask."""
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.backbone.mean, self.backbone.std))
        text, fused = self.get_buffer("region_embeddings"), []
        for image, low, own in zip(images, masks, scores, strict=True):
            full = F.interpolate(low[None], size=covers, mode="bilinear", align_corners=False)[0]
            chances = full[:, : image.shape[1], : image.shape[2]].sigmoid()
            vectors, valid = regions(image * std + mean, chances)
            opinion = cosine_logits(vectors, text).softmax(-1)
            fused.append(fuse(own, opinion, valid, seen=self.get_buffer("seen"), weight=self.ensemble_weight))
        return torch.stack(fused)


def mask_scores(out: Dense, size: Size, rows: range) -> Tensor:
    """Class scores (B, K, len(rows), W): masks resized to the band, then sigmoid, then mixed."""
    masks = bilinear_rows(out.extras["masks"], out.covers, rows)[..., : size[1]]
    return mix_masks(out.extras["scores"], masks.sigmoid())


READOUT = Readout(
    mask_scores, keeps=("scores", "masks"), confidence="share",
    masks=lambda out: MaskScores(out.extras["masks"], out.extras["scores"]),
)  # fmt: skip


def normalisers(masks: Tensor, *, num_classes: int, ignore_index: int) -> dict[str, Tensor]:
    """Counts over the global batch: `images`, and `present` (image, class) pairs, unseen classes among them."""
    present = present_classes(masks, num_classes=num_classes, ignore_index=ignore_index)
    return {"images": torch.tensor(len(masks), device=masks.device), "present": present.sum()}


def criterion(
    out: Dense, masks: Tensor, totals: dict[str, Tensor], *, ignore_index: int = 255, class_weight: float = 1.0,
    mask_weight: float = 20.0, dice_weight: float = 1.0, no_object: float = 0.1, alpha: float = 0.25,
    gamma: float = 2.0,
) -> dict[str, Tensor]:  # fmt: skip
    """Set losses of the last decoder layer and, with `_i`, the earlier ones, each matched anew.

    Masks (B, H, W) integer, one target for each class of an image, none for unseen classes. Where the data has those,
    how many of the global targets they are is taken from the own micro-batch. The weights are the matching's costs too.
    """
    present = present_classes(masks, num_classes=out.logits.shape[1], ignore_index=ignore_index)
    known = present & (out.extras["seen"] | ~out.extras["seen"].any(1, keepdim=True))
    shift = (known.sum() - present.sum()) * (totals["images"] / len(masks))
    totals = totals | {"present": (totals["present"] + shift).clamp(min=0)}
    targets, terms = class_targets(masks, known), Terms(class_weight, mask_weight, dice_weight)
    dtype = torch.promote_types(out.logits.dtype, torch.float32)
    auxiliary = sum(name.startswith("aux") and name.endswith("_masks") for name in out.extras)
    losses: dict[str, Tensor] = {}
    for source, suffix in [("", "")] + [(f"aux{i}_", f"_{i}") for i in range(auxiliary)]:
        logits, maps = (out.extras[f"{source}{name}"].to(dtype) for name in ("class_logits", "masks"))
        matches = match(logits, maps, targets, covers=out.covers, costs=terms, alpha=alpha, gamma=gamma)
        found = set_losses(
            logits, maps, targets, matches, totals, covers=out.covers, weights=terms, no_object=no_object,
            alpha=alpha, gamma=gamma,
        )  # fmt: skip
        losses |= {f"loss_{name}{suffix}": value for name, value in found.items()}
    return losses


def zsseg(
    *, num_classes: int, class_names: Sequence[Name] | None = None, backbone: str = "resnet50",
    weights: str | None = None, dilations: Sequence[int] | None = None, clip: str = "ViT-B-16-quickgelu",
    text_weights: str | None = None, templates: str | Sequence[str] = "zsseg", vectors: str | None = None,
    unseen: str | Sequence[int] = (), regions: bool = True, dim: int = 256, mask_dim: int = 256,
    queries: int = 100, layers: int = 6, heads: int = 8, hidden: int = 2048, embed_hidden: int = 1024,
    dropout: float = 0.1, ensemble_weight: float = 0.8, region_size: int = 224, threshold: float = 0.5,
    expand: float = 1.0, fill: Literal["mean", "zero"] = "mean", soft: bool = False,
    embed_dim: int | None = None, vision: dict[str, Any] | None = None,
) -> ZSSeg:  # fmt: skip
    """zsseg on any pyramid of timm, with `weights` of its own, and both towers of `clip`, a name of open_clip.

    CLIP's `text_weights` are a tag such as `openai` or a file; from them come the vectors of `class_names` in
    `templates`, unless `vectors` is a file of them (of learned prompts, say); without either they are random.
    `unseen` are the ids of classes that training hides, or a split of `segvit.text.splits`. With `regions=False`
    the queries alone decide. `dilations` are those of the last blocks of a ResNet. `embed_dim` and `vision` change the
    towers' sizes for training from nothing.
    """
    found = named_clip(clip, text_weights, embed_dim=embed_dim, vision=vision)
    embeddings = class_vectors(found, class_names, num_classes=num_classes, templates=templates, file=vectors)
    classifier = None
    if regions:
        classifier = RegionClassifier(
            build_backbone(found), side=region_size, threshold=threshold, expand=expand, fill=fill, soft=soft
        )  # fmt: skip
    trunk = pyramid(backbone, weights=weights)
    if dilations is not None:
        dilate(trunk.network, dilations)
    decoder = QueryDecoder(
        trunk.dims[-1], dim, queries=queries, layers=layers, heads=heads, hidden=hidden, mask_dim=mask_dim,
        embed_dim=embeddings.shape[1], embed_hidden=embed_hidden, dropout=dropout,
    )  # fmt: skip
    return ZSSeg(
        trunk, PixelDecoder(trunk.dims, dim, mask_dim), decoder, classifier, embeddings=embeddings,
        unseen=unseen_ids(unseen, num_classes=num_classes, class_names=class_names), ensemble_weight=ensemble_weight,
    )  # fmt: skip


def dilate(network: nn.Module, dilations: Sequence[int]) -> None:
    """DeepLab's multi-grid: dilate the 3x3 convolutions of a ResNet's last blocks. Raises UserError for others."""
    blocks = list(dict(network.named_children()).get("layer4", nn.Sequential()).children())
    if len(blocks) != len(dilations):
        raise UserError(f"dilations has {len(dilations)} values; give one for each of the last {len(blocks)} blocks")
    for block, rate in zip(blocks, dilations, strict=True):
        middle = block.get_submodule("conv2")
        assert isinstance(middle, nn.Conv2d)
        middle.dilation = middle.padding = (rate, rate)


zsseg_resnet50 = partial(zsseg, backbone="resnet50")
zsseg_resnet101c = partial(zsseg, backbone="resnet101s", dilations=(1, 2, 4))

TRUNK: Rules = (  # detectron2's ResNet into timm's
    *((rf"^backbone\.res{i}\.", f"backbone.network.layer{i - 1}.") for i in range(2, 6)),
    (r"(\.layer\d\.\d+\.)conv(\d)\.norm\.", r"\1bn\2."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
)
PLAIN_STEM: Rules = (
    (r"^backbone\.stem\.conv1\.norm\.", "backbone.network.bn1."),
    (r"^backbone\.stem\.conv1\.", "backbone.network.conv1."),
)
DEEP_STEM: Rules = (
    *((rf"^backbone\.stem\.conv{i}\.norm\.", f"backbone.network.conv1.{3 * i - 2}.") for i in (1, 2)),
    *((rf"^backbone\.stem\.conv{i}\.(?!norm)", f"backbone.network.conv1.{3 * i - 3}.") for i in (1, 2, 3)),
    (r"^backbone\.stem\.conv3\.norm\.", "backbone.network.bn1."),
)
HEAD: Rules = (
    *((rf"^(sem_seg_head\.pixel_decoder\.)adapter_{i}\.", rf"\1lateral.{i - 1}.") for i in range(1, 10)),
    *((rf"^(sem_seg_head\.pixel_decoder\.)layer_{i}\.", rf"\1output.{i - 1}.") for i in range(1, 10)),
    (r"(\.(?:lateral|output)\.\d)\.norm\.", r"\1.1."),
    (r"(\.(?:lateral|output)\.\d)\.weight$", r"\1.0.weight"),
    (r"^sem_seg_head\.pixel_decoder\.mask_features\.", "pixel_decoder.masks."),
    (r"^sem_seg_head\.pixel_decoder\.", "pixel_decoder."),
    (r"^sem_seg_head\.predictor\.query_embed\.weight$", "decoder.queries"),
    (r"^sem_seg_head\.predictor\.(transformer\.decoder\.)?", "decoder."),
    (r"\.multihead_attn\.", ".cross_attn."),
    (r"\.linear([12])\.", r".fc\1."),
    (r"^clip_adapter\.non_object_embedding$", "no_object"),
)
# Constants, the text tower and the prompts, from which class vectors are made beforehand; see `convert_prompt`.
UNUSED = r"^criterion\.|^pixel_(mean|std)$|^clip_adapter\.(?!non_object)|^_region_clip_adapter\."


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official checkpoints (MendelXu/zsseg.baseline) into ours, but for the class vectors that `set_classes` gives."""
    own = any(key.startswith("_region_clip_adapter.") for key in state)  # regions may have an adapter of their own
    visual = f"{'_region_clip_adapter' if own else 'clip_adapter'}.clip_model.visual."
    tower = {key.removeprefix(visual): value for key, value in state.items() if key.startswith(visual)}
    official = rename_vit(tower) if "proj" in tower else tower  # a ResNet keeps its names
    stem = DEEP_STEM if "backbone.stem.conv3.weight" in state else PLAIN_STEM
    ours = rename(state, [*TRUNK, *stem, *HEAD], unused=UNUSED)
    return ours | {f"regions.tower.{key}": value for key, value in official.items()}
