"""Few-shot segmentation: segment a query image by K support images with masks of one class never trained on.

Papers    PFENet: Z. Tian et al., "Prior Guided Feature Enrichment Network for Few-shot Segmentation", TPAMI 2020, arXiv
          2008.01449. BAM: C. Lang et al., "Learning What Not to Segment", CVPR 2022, arXiv 2203.07615.
Idea      The mean of support features under the mask is a prototype; the cosine of the query's deepest features with
          the closest support position is a prior. PFENet enriches the query by both at several scales; BAM's meta
          learner by an ASPP, and BAM takes off what a PSPNet knows to be a class of training.
Differs   from the official code: any image size (theirs needs square ones, with sides 8 n + 1); ResNets only, no VGG.
          BAM's meta learner alone is what the SVF tables call baseline (inferred, the paper does not say); without
          `shot` it takes the mean over any number of supports. BAM's base learner is trained before, by
          `tasks.few_shot_base`, or comes from an official file.
Checked   tests/golden/few_shot_segmentation__*, tests/golden_partial/svf__few_shot_baseline without the logits before
          tuning, whose singular values the case does not store (dvlab-research/PFENet, chunbolang/BAM).

Shapes    B episodes, K supports, H W pixels, h w grid of stride 8, C features, d width of the head, N base classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.backbones.deep_stem import DEPTHS, STAGES, DeepStemResNet, deep_stem_resnet
from segvit.contracts import Dense, Size, UserError
from segvit.losses.cross_entropy import pixel_counts, pixel_cross_entropy
from segvit.nn.rename import Rules, rename

EPS, AREA = 1e-7, 5e-4  # of cosines and of the prior's range; added to the area of a mask in cells
DILATIONS = (6, 12, 18)  # of BAM's ASPP
PSP_BINS = (1, 2, 3, 6)


class Supports(NamedTuple):
    """All that a query needs of its supports."""

    prototypes: Tensor  # (B, K, d)
    deepest: Tensor  # (B, K, C4, h, w), zero outside the masks
    grams: Tensor  # (B, K, C, C) of shallow features


class Matches(NamedTuple):
    """What the supports say about the query."""

    query: Tensor  # (B, d, h, w), reduced
    prototypes: Tensor  # (B, K, d)
    priors: Tensor  # (B, K, h, w) in 0..1
    distances: Tensor  # (B, K) between the Gram matrices of shallow features
    deepest: Tensor  # (B, C4, h, w) of the query


class Matcher(nn.Module):
    """Features of query and supports with the masked average prototypes and the prior masks of PFENet, section 3.2."""

    def __init__(self, backbone: DeepStemResNet, dim: int, *, gram_stage: int = 2) -> None:
        super().__init__()
        self.backbone, self.gram_stage = backbone, gram_stage
        inputs = backbone.dims[2] + backbone.dims[3]
        self.down_query, self.down_support = (
            nn.Sequential(nn.Conv2d(inputs, dim, 1, bias=False), nn.ReLU(), nn.Dropout2d(0.5)) for _ in range(2)
        )

    def train(self, mode: bool = True) -> Matcher:
        """The backbone's norms keep their statistics, as `fix_bn` of the official recipes."""
        super().train(mode)
        self.backbone.eval()
        return self

    def describe(self, images: Tensor, masks: Tensor) -> Supports:
        """Supports (B, K, 3, H, W) and their masks (B, K, H, W), 1 the object, as queries need them."""
        maps, shots = self.backbone.until_third(images.flatten(0, 1)), (-1, masks.shape[1])
        inside = resize((masks == 1).to(images.dtype).flatten(0, 1)[:, None], size_of(maps[3]))  # (BK, 1, h, w)
        deep = self.backbone.layer4(maps[3] * inside)
        reduced = self.down_support(torch.cat([maps[3], maps[2]], 1))
        prototypes = (reduced * inside).sum((2, 3)) / (inside.sum((2, 3)) + AREA)
        found = (prototypes, deep * inside, gram(maps[self.gram_stage]))
        return Supports(*(value.unflatten(0, shots) for value in found))

    def forward(self, query: Tensor, supports: Supports) -> Matches:
        maps, shots = self.backbone(query), supports.deepest.shape[1]
        priors = prior(maps[4].repeat_interleave(shots, 0), supports.deepest.flatten(0, 1))
        grams = gram(maps[self.gram_stage])[:, None] - supports.grams
        return Matches(
            self.down_query(torch.cat([maps[3], maps[2]], 1)), supports.prototypes,
            priors.unflatten(0, (-1, shots)), grams.norm(dim=(2, 3)) / grams.shape[-1], maps[4],
        )  # fmt: skip


def prior(query: Tensor, support: Tensor) -> Tensor:
    """For each query position its largest cosine with any of the support, stretched to 0..1 in an image: (B, h, w)."""
    dots = support.flatten(2).mT @ query.flatten(2)  # (B, support positions, query positions)
    norms = support.flatten(2).norm(dim=1)[:, :, None] * query.flatten(2).norm(dim=1)[:, None]
    best = (dots / (norms + EPS)).amax(1)
    low, high = best.amin(1, keepdim=True), best.amax(1, keepdim=True)
    return ((best - low) / (high - low + EPS)).unflatten(1, size_of(query))


def gram(x: Tensor) -> Tensor:
    """Cosines between the channels of a map: (B, C, C)."""
    rows = x.flatten(2)
    norms = rows.norm(dim=2, keepdim=True)
    return rows @ rows.mT / (norms * norms.mT + EPS)


class ShotWeights(nn.Module):
    """BAM's weights of exactly `shot` supports, from their distances to the query: (B, K) -> (B, K), sum 1."""

    def __init__(self, shot: int, hidden: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(shot, shot, 1, bias=False)]
        if hidden:
            layers = [nn.Conv2d(shot, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, shot, 1)]
        else:
            nn.init.constant_(layers[0].get_parameter("weight"), 1 / shot)
        self.shot, self.layers = shot, nn.Sequential(*layers)

    def forward(self, distances: Tensor) -> Tensor:
        if distances.shape[1] != self.shot:
            raise UserError(f"the network weighs {self.shot} supports and got {distances.shape[1]}; give as many")
        ordered, order = distances.sort(1)
        weights = self.layers(ordered[:, :, None, None])[..., 0, 0]
        return weights.gather(1, order.argsort(1)).softmax(1)


class Refine(nn.Module):
    """Two 3x3 convolutions with a shortcut around them; the names are the official ones."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*conv_relu(dim, dim, 3), *conv_relu(dim, dim, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + x


class ASPP(nn.Module):
    """The pooled map, a 1x1 and three dilated 3x3 convolutions, side by side: (B, d, h, w) -> (B, 5d, h, w)."""

    def __init__(self, dim: int, dilations: Sequence[int]) -> None:
        super().__init__()
        convs = [nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)]
        convs += [nn.Conv2d(dim, dim, 3, padding=rate, dilation=rate) for rate in dilations]
        self.branches = nn.ModuleList(convs)

    def forward(self, x: Tensor) -> Tensor:
        inputs = [x.mean((2, 3), keepdim=True), *[x] * (len(self.branches) - 1)]
        return torch.cat([conv(y).relu().expand_as(x) for conv, y in zip(self.branches, inputs, strict=True)], 1)


class BaseLearner(nn.Module):
    """PSPNet's head on the deepest map: logits (B, 1 + N, h, w) of background and the classes of training."""

    def __init__(self, inputs: int, classes: int, *, hidden: int, bins: Sequence[int] = PSP_BINS) -> None:
        super().__init__()
        part = inputs // len(bins)
        self.pools = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(bin), nn.Conv2d(inputs, part, 1, bias=False), nn.BatchNorm2d(part), nn.ReLU()
            )
            for bin in bins
        )
        self.classify = nn.Sequential(
            nn.Conv2d(inputs + part * len(bins), hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(),
            nn.Dropout2d(0.1), nn.Conv2d(hidden, 1 + classes, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classify(torch.cat([x, *(resize(pool(x), size_of(x)) for pool in self.pools)], 1))
        return logits


class MetaLearner(nn.Module):
    """BAM's meta learner: (query (B, 3, H, W), supports (B, K, 3, H, W), masks (B, K, H, W)) -> logits (B, 2, H, W).

    1 in a mask is the object. `extras` hold the head's stages on the grid.
    """

    def __init__(
        self, matcher: Matcher, dim: int, *, weights: ShotWeights | None = None, dilations: Sequence[int] = DILATIONS
    ) -> None:
        super().__init__()
        self.matcher, self.weights = matcher, weights
        self.merge = nn.Sequential(*conv_relu(2 * dim + 1, dim))
        self.aspp = ASPP(dim, dilations)
        self.res1, self.res2 = nn.Sequential(*conv_relu((2 + len(dilations)) * dim, dim)), Refine(dim)
        self.classify = classifier(dim)

    def forward(self, query: Tensor, supports: Tensor, masks: Tensor) -> Dense:
        return self.segment(query, self.matcher.describe(supports, masks))

    def segment(self, query: Tensor, supports: Supports) -> Dense:
        """The same with supports that are described already."""
        found = self.matcher(query, supports)
        # One support has weight 1 also in a network that was made for several.
        shots = found.distances.shape[1]
        weights = torch.full_like(found.distances, 1 / shots)
        if self.weights is not None and shots > 1:
            weights = self.weights(found.distances)
        prototype = torch.einsum("bk,bkd->bd", weights, found.prototypes)[..., None, None]
        prior_mask = torch.einsum("bk,bkhw->bhw", weights, found.priors)[:, None]
        merged = self.merge(torch.cat([found.query, prototype.expand_as(found.query), prior_mask], 1))
        refined = self.res2(self.res1(self.aspp(merged)))
        small = self.classify(refined)
        size = size_of(query)
        extras = {
            "query": found.query, "prototype": prototype, "prior": prior_mask, "merged": merged, "refined": refined,
            "meta": small, "distance": (weights * found.distances).sum(1), "deepest": found.deepest,
        }  # fmt: skip
        return Dense(resize(small, size), extras, size)


class BAM(nn.Module):
    """The meta learner with a frozen base learner; `logits` are the sums that the official code trains as logits.

    `extras` add `meta` (B, 2, H, W) and `base` (B, 1 + N, H, W) logits. `base_class` (B,) says which base class (from
    1) the episode is about, whose score counts as no background; None = a novel one, as in all tests.
    """

    def __init__(self, meta: MetaLearner, base: BaseLearner) -> None:
        super().__init__()
        self.meta, self.base = meta, base.requires_grad_(False)
        self.gram_merge, self.base_merge = nn.Conv2d(2, 1, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False)
        for conv in (self.gram_merge, self.base_merge):  # starts as the meta learner alone
            conv.weight.data = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)

    @property
    def matcher(self) -> Matcher:
        """The meta learner's."""
        return self.meta.matcher

    def train(self, mode: bool = True) -> BAM:
        """The base learner stays as it was trained."""
        super().train(mode)
        self.base.eval()
        return self

    def forward(self, query: Tensor, supports: Tensor, masks: Tensor, base_class: Tensor | None = None) -> Dense:
        return self.segment(query, self.matcher.describe(supports, masks), base_class)

    def segment(self, query: Tensor, supports: Supports, base_class: Tensor | None = None) -> Dense:
        """The same with supports that are described already."""
        out = self.meta.segment(query, supports)
        base = self.base(out.extras["deepest"])
        others = base.softmax(1).clone()
        others[:, 0] = 0
        if base_class is not None:
            others[torch.arange(len(others), device=others.device), base_class] = 0
        scores = out.extras["meta"].softmax(1)
        distance = out.extras["distance"][:, None, None, None].expand_as(scores[:, :1])
        background, foreground = (self.gram_merge(torch.cat([scores[:, i : i + 1], distance], 1)) for i in (0, 1))
        background = self.base_merge(torch.cat([background, others.sum(1, keepdim=True)], 1))
        size = size_of(query)
        extras = out.extras | {"meta": out.logits, "base": resize(base, size)}
        return Dense(resize(torch.cat([background, foreground], 1), size), extras, size)


class PFENet(nn.Module):
    """The feature enrichment module on prototype and prior, with the meta learner's call.

    `bins` above 1 are the cells of a side, others shares of the grid's sides. `extras` hold `inner_0` ... (B, 2, bin,
    bin), the logits of each scale, and the inputs of the head.
    """

    def __init__(self, matcher: Matcher, dim: int, *, bins: Sequence[float] = (60, 30, 15, 8)) -> None:
        super().__init__()
        self.matcher, self.bins = matcher, tuple(bins)
        self.merge = nn.ModuleList(nn.Sequential(*conv_relu(2 * dim + 1, dim)) for _ in bins)
        self.alpha = nn.ModuleList(nn.Sequential(*conv_relu(2 * dim, dim)) for _ in bins[1:])
        self.beta = nn.ModuleList(Refine(dim) for _ in bins)
        self.inner = nn.ModuleList(classifier(dim) for _ in bins)
        self.res1, self.res2 = nn.Sequential(*conv_relu(len(bins) * dim, dim)), Refine(dim)
        self.classify = classifier(dim)

    def forward(self, query: Tensor, supports: Tensor, masks: Tensor) -> Dense:
        return self.segment(query, self.matcher.describe(supports, masks))

    def segment(self, query: Tensor, supports: Supports) -> Dense:
        """The same with supports that are described already."""
        found = self.matcher(query, supports)
        prototype, prior_mask = found.prototypes.mean(1)[..., None, None], found.priors.mean(1, keepdim=True)
        extras = {
            "query": found.query,
            "prototype": prototype,
            "prototypes": found.prototypes,
            "deepest": found.deepest,
        }
        grid, levels = size_of(found.query), list[Tensor]()
        for i, bin in enumerate(self.bins):
            size = (int(bin), int(bin)) if bin > 1 else (max(int(grid[0] * bin), 1), max(int(grid[1] * bin), 1))
            pooled, small_prior = F.adaptive_avg_pool2d(found.query, size), resize(prior_mask, size)
            x = self.merge[i](torch.cat([pooled, prototype.expand_as(pooled), small_prior], 1))
            if levels:
                x = x + self.alpha[i - 1](torch.cat([x, resize(levels[-1], size)], 1))
            x = self.beta[i](x)
            extras |= {f"inner_{i}": self.inner[i](x), f"prior_{i}": small_prior}
            levels.append(resize(x, grid))
        small = self.classify(self.res2(self.res1(torch.cat(levels, 1))))
        return Dense(resize(small, size_of(query)), extras, size_of(query))


def conv_relu(inputs: int, outputs: int, size: int = 1) -> list[nn.Module]:
    """A convolution without bias that keeps the size, and a ReLU."""
    return [nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False), nn.ReLU()]


def classifier(dim: int) -> nn.Sequential:
    """Logits of background and object."""
    return nn.Sequential(*conv_relu(dim, dim, 3), nn.Dropout2d(0.1), nn.Conv2d(dim, 2, 1))


def resize(x: Tensor, size: Size) -> Tensor:
    """Bilinear, corners aligned, as everywhere in these networks."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def size_of(x: Tensor) -> Size:
    """Height and width."""
    return (x.shape[-2], x.shape[-1])


normalisers = partial(pixel_counts, num_classes=2)


def criterion(
    out: Dense, masks: Tensor, totals: dict[str, Tensor], *, base_masks: Tensor | None = None,
    ignore_index: int = 255, inner_weight: float = 1.0,
) -> dict[str, Tensor]:  # fmt: skip
    """Cross entropy with the query's mask (0, 1, ignored), and that of PFENet's inner logits or BAM's meta logits.

    With `base_masks`, the query's pixels as 0 and base classes from 1, BAM's base logits too: its base learner is
    frozen, but not a backbone that is tuned beneath it.
    """
    entropy = partial(pixel_cross_entropy, masks=masks, total=totals["valid"], ignore_index=ignore_index)
    losses = {"loss_ce": entropy(out.logits.float())}
    inner = [value for name, value in out.extras.items() if name.startswith("inner_")]
    if inner:
        terms = [entropy(resize(value.float(), out.covers)) for value in inner]
        losses["loss_inner"] = inner_weight * torch.stack(terms).mean()
    if "base" in out.extras:
        losses["loss_meta"] = entropy(out.extras["meta"].float())
        if base_masks is not None:
            losses["loss_base"] = pixel_cross_entropy(
                out.extras["base"].float(), base_masks, total=(base_masks != ignore_index).sum(),
                ignore_index=ignore_index,
            )  # fmt: skip
    return losses


Network = MetaLearner | PFENet | BAM


def few_shot(
    *, head: Literal["baseline", "pfenet", "bam"], backbone: str = "resnet50", weights: str | None = None,
    dim: int = 256, shot: int | None = None, bins: Sequence[float] = (60, 30, 15, 8), base_classes: int | None = None,
    base_hidden: int = 512,
) -> Network:  # fmt: skip
    """A few-shot network with a frozen backbone; `weights` are the backbone's, and `dim` is the head's width.

    `shot` gives baseline and BAM learned weights for that many supports; `bins` are PFENet's scales. BAM's base learner
    has `base_classes` classes and `base_hidden` channels before the last layer.
    Raises UserError for an unknown backbone, weights that do not fit and BAM without classes.
    """
    matcher = Matcher(deep_stem_resnet(backbone, weights=weights).requires_grad_(False), dim)
    if head == "pfenet":
        if shot is not None:
            raise UserError("shot is for learned weights of supports; PFENet takes the mean, leave it out")
        return PFENet(matcher, dim, bins=bins)
    meta = MetaLearner(matcher, dim, weights=ShotWeights(shot, 2) if shot is not None and shot > 1 else None)
    if head == "baseline":
        return meta
    if base_classes is None:
        raise UserError("BAM needs a base learner; train one with segvit few_shot train_base and give --base its run")
    return BAM(meta, BaseLearner(matcher.backbone.dims[-1], base_classes, hidden=base_hidden))


HEADS: dict[str, Literal["baseline", "pfenet", "bam"]] = {
    "few_shot_baseline": "baseline",
    "pfenet": "pfenet",
    "bam": "bam",
}
FEW_SHOT: dict[str, Callable[..., Network]] = {
    f"{name}_{backbone}": partial(few_shot, head=head, backbone=backbone)
    for name, head in HEADS.items()
    for backbone in DEPTHS
}

COMMON: Rules = (
    *STAGES,
    (r"^(stem|layer\d)\.", r"matcher.backbone.\1."),
    (r"^down_query\.", "matcher.down_query."),
    (r"^down_supp\.", "matcher.down_support."),
    (r"^(beta_conv\.\d|res2(?:_meta)?)\.", r"\1.layers."),
    (r"^(res[12]|cls|ASPP)_meta\.", r"\1."),
    (r"^init_merge\.", "merge."),
    (r"^(alpha|beta)_conv\.", r"\1."),
    (r"^inner_cls\.", "inner."),
    (r"^cls\.", "classify."),
    (r"^ASPP\.layer6_(\d)\.0\.", r"aspp.branches.\1."),
    (r"^kshot_rw\.(weight|bias)$", r"kshot_rw.0.\1"),
    (r"^kshot_rw\.", "weights.layers."),
)
BASE = r"^(learner_base|gram_merge|cls_merge)\."
ENSEMBLE: Rules = (
    (r"^(?!learner_base|gram_merge|cls_merge)", "meta."),
    (r"^learner_base\.0\.features\.", "base.pools."),
    (r"^learner_base\.1\.", "base.classify."),
    (r"^cls_merge\.", "base_merge."),
)


def convert(state: dict[str, Tensor], *, ensemble: bool = False) -> dict[str, Tensor]:
    """Official PFENet or BAM weights -> ours; of BAM the meta learner alone, or all with `ensemble`."""
    if not ensemble:
        return rename(state, COMMON, unused=BASE)
    return rename(rename(state, COMMON, unused="^$"), ENSEMBLE, unused="^$")
