"""CASTformer: transformers on tokens that look for their places in a CNN's maps, trained against a critic.

Paper     C. You, R. Zhao, F. Liu, S. Dong, S. Chinchali, U. Topcu, L. Staib, J. S. Duncan, "Class-Aware Adversarial
          Transformers for Medical Image Segmentation", NeurIPS 2022, arXiv 2201.10737.
Idea      On each of four levels n x n points move, in a few steps, to where their class shows (CAT); a transformer
          encoder (TEM) relates what they saw and an all-MLP decoder joins the levels. This is the generator, CATformer.
          A critic that sees the image under the predicted or the true mask makes it CASTformer (WGAN-GP).
Differs   The authors published no code. Found in descriptions of the paper: the four levels, the equations of CAT and
          TEM, n = 16, 4 sampling steps, 12 layers, the decoder's form, the critic's form, the loss weights. Taken from
          the works that it builds on: the sampler of PS-ViT (with tokens row by row), the ResNetV2 and the Dice term
          of TransUNet (here of each image, so that parts of a batch add up; there of a device's batch). Proposed by
          us: all widths, the same grid on all levels, the decoder's norm and dropout, and how a mask of several
          classes multiplies the image.
Checked   tests/golden/castformer__* (yuexy/PS-ViT models/ps_vit.py, Beckschen/TransUNet resnet skip), both surrogates.

Shapes    B images, K classes, h w a map's grid, n token grid, N = n * n tokens, d width, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from segvit.contracts import Dense, Features, Readout, Size, UserError
from segvit.losses.adversarial import one_hot
from segvit.losses.cross_entropy import logits_at, pixel_counts, pixel_cross_entropy
from segvit.nn.readout import logit_rows
from segvit.nn.rename import Rules, rename
from segvit.nn.tokens import map_tokens, pad_beyond, pad_to_patches, resize_positions

CELL, LEAST = 16, 32  # images are padded to whole cells and to that many pixels a side
GROUPS = 32  # of the normalisation layers
SMOOTH = 1e-5  # of the Dice term, as TransUNet has it


class StdConv2d(nn.Conv2d):
    """Convolution whose kernels have mean 0 and variance 1 over (inputs, height, width)."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        weight = (self.weight - mean) / (variance + 1e-5).sqrt()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with GroupNorm around a residual, which is projected where shapes change."""

    def __init__(self, inputs: int, outputs: int, middle: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = StdConv2d(inputs, middle, 1, bias=False)
        self.gn1 = nn.GroupNorm(GROUPS, middle, eps=1e-6)
        self.conv2 = StdConv2d(middle, middle, 3, stride, padding=1, bias=False)
        self.gn2 = nn.GroupNorm(GROUPS, middle, eps=1e-6)
        self.conv3 = StdConv2d(middle, outputs, 1, bias=False)
        self.gn3 = nn.GroupNorm(GROUPS, outputs, eps=1e-6)
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            self.downsample = StdConv2d(inputs, outputs, 1, stride, bias=False)
            self.gn_proj = nn.GroupNorm(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.gn_proj(self.downsample(x)) if self.projects else x
        x = self.gn1(self.conv1(x)).relu()
        x = self.gn2(self.conv2(x)).relu()
        return (residual + self.gn3(self.conv3(x))).relu()


class ResNetV2(nn.Module):
    """Images -> four maps of `dims` channels at 1/2, 1/4, 1/8 and 1/16; `width` is a multiple of 32."""

    def __init__(self, *, width: int = 64, units: Sequence[int] = (3, 4, 6), in_channels: int = 3) -> None:
        super().__init__()
        self.dims, self.strides = (width, 4 * width, 8 * width, 16 * width), [2, 4, 8, 16]
        self.mean = self.std = (0.5,) * in_channels
        self.root = nn.Sequential()
        self.root.add_module("conv", StdConv2d(in_channels, width, 7, 2, padding=3, bias=False))
        self.root.add_module("gn", nn.GroupNorm(GROUPS, width, eps=1e-6))
        self.root.add_module("relu", nn.ReLU())
        self.body = nn.Sequential()
        for i, (count, (inputs, outputs)) in enumerate(zip(units, pairwise(self.dims), strict=False)):
            block = nn.Sequential()
            for unit in range(count):
                stride = 2 if i and not unit else 1
                block.add_module(
                    f"unit{unit + 1}", Bottleneck(outputs if unit else inputs, outputs, outputs // 4, stride=stride)
                )
            self.body.add_module(f"block{i + 1}", block)

    def forward(self, images: Tensor) -> Features:
        images = pad_to_patches(images, (CELL, CELL))
        below, right = (torch.sym_max(0, LEAST - side) for side in images.shape[-2:])
        images = pad_beyond(images, below, right)
        maps = self.maps(images)
        height, width = images.shape[-2:]
        padded = fill(maps[1], (height // 4, width // 4))
        return Features([maps[0], padded, *maps[2:]], list(self.strides), (height // 2, width // 2), (height, width))

    def maps(self, images: Tensor) -> list[Tensor]:
        """The maps as they come; pooling without padding leaves the second one a row and a column short."""
        maps = [self.root(images)]
        x = F.max_pool2d(maps[0], 3, stride=2)
        for block in self.body:
            x = block(x)
            maps.append(x)
        return maps


def fill(x: Tensor, size: Size) -> Tensor:
    """Zeros at the right and the bottom up to `size`."""
    return F.pad(x, (0, size[1] - x.shape[-1], 0, size[0] - x.shape[-2]))


class Sampled(NamedTuple):
    """One step of the sampler."""

    points: Tensor  # (B, N, 2) where it looked: row and column in cells of the map
    tokens: Tensor  # (B, N, d)
    offsets: Tensor | None  # (B, N, 2) how far the points move now; None after the last step


class Sampler(nn.Module):
    """CAT: tokens (B, N, d) from a map (B, d, h, w), sampled at points that each step moves."""

    def __init__(
        self, dim: int, *, grid: int, iterations: int, heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = False
    ) -> None:
        super().__init__()
        self.grid = grid
        self.position = nn.Linear(2, dim)
        self.layers = nn.ModuleList(
            Block(dim, heads, mlp_ratio, qkv_bias=qkv_bias, norm_layer=nn.LayerNorm) for _ in range(iterations)
        )
        self.offsets = nn.ModuleList(nn.Linear(dim, 2) for _ in range(iterations - 1))
        start_linear(self)
        for head in self.offsets:  # points start at the centres of a regular partition
            nn.init.zeros_(head.get_parameter("weight"))

    def forward(self, features: Tensor) -> Tensor:
        *_, last = self.steps(features)
        return last.tokens

    def steps(self, features: Tensor) -> Iterator[Sampled]:
        """Every step; an offset learns through the sampling that follows it alone."""
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        size = cells(features)
        centre = (torch.arange(self.grid, device=features.device, dtype=features.dtype) + 0.5) / self.grid
        points = torch.stack(torch.meshgrid(centre, centre, indexing="ij"), -1).flatten(0, 1) * size
        points, tokens = points.expand(features.shape[0], -1, -1), None
        for number, layer in enumerate(self.layers):
            seen = sample_points(features, points) + self.position(points.detach() / size)
            tokens = layer(seen if tokens is None else seen + tokens)
            if number == len(self.offsets):
                yield Sampled(points, tokens, None)
                return
            offsets = self.offsets[number](tokens).to(points.dtype)
            yield Sampled(points, tokens, offsets)
            points = points.detach() + offsets


def cells(features: Tensor) -> Tensor:
    """Height and width of a map (2,), as a tensor that a traced graph computes."""
    height, width = (torch.scalar_tensor(side) for side in features.shape[-2:])
    return torch.stack((height, width)).to(features)


def sample_points(features: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples (B, N, d) of a map at (row, column) in cells, whose centres are whole numbers; 0 outside."""
    places = (2 * points.flip(-1) + 1) / cells(features).flip(0) - 1
    return F.grid_sample(features, places[:, :, None], align_corners=False)[..., 0].mT


class Branch(nn.Module):
    """One level: projection, sampler and TEM; a map of any width -> (B, d, n, n)."""

    def __init__(
        self, inputs: int, dim: int, *, grid: int, iterations: int, depth: int, heads: int, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.project = nn.Conv2d(inputs, dim, 1)
        self.sampler = Sampler(dim, grid=grid, iterations=iterations, heads=heads)
        self.embed = nn.Linear(dim, dim)
        self.positions = nn.Parameter(torch.empty(1, grid**2, dim))
        self.blocks = nn.Sequential(*transformer(dim, depth=depth, heads=heads, drop_path=drop_path))
        self.norm = nn.LayerNorm(dim)
        nn.init.trunc_normal_(self.positions, std=0.02)
        start_linear(self.blocks)

    def forward(self, features: Tensor) -> Tensor:
        tokens = self.sampler(self.project(features))
        x = self.norm(self.blocks(self.embed(tokens) + self.positions))
        return x.mT.unflatten(2, (self.sampler.grid, self.sampler.grid))


def transformer(dim: int, *, depth: int, heads: int, drop_path: float = 0.0) -> list[nn.Module]:
    """Pre-norm blocks of a ViT, the rate of stochastic depth rising from 0."""
    return [
        Block(dim, heads, 4.0, qkv_bias=True, drop_path=drop_path * i / max(depth - 1, 1), norm_layer=nn.LayerNorm)
        for i in range(depth)
    ]


def start_linear(module: nn.Module) -> None:
    """Normal weights of deviation 0.02, cut at two units, and biases of 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


class CATformer(nn.Module):
    """The generator: encoder, a branch for each level and the all-MLP decoder; logits at 1/4."""

    def __init__(
        self, backbone: ResNetV2, branches: Sequence[Branch], *, dim: int, decoder_dim: int, num_classes: int,
        dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.backbone, self.branches = backbone, nn.ModuleList(branches)
        self.widen = nn.ModuleList(nn.Conv2d(dim, decoder_dim, 1) for _ in branches)
        self.fuse = nn.Sequential(
            nn.Conv2d(len(branches) * decoder_dim, decoder_dim, 1, bias=False), nn.BatchNorm2d(decoder_dim), nn.ReLU(),
            nn.Dropout2d(dropout),
        )  # fmt: skip
        self.classify = nn.Conv2d(decoder_dim, num_classes, 1)

    def forward(self, images: Tensor) -> Dense:
        features: Features = self.backbone(images)
        height, width = features.covers
        levels = zip(features.maps, self.branches, self.widen, strict=True)
        wide = [
            F.interpolate(widen(branch(x)), size=(height // 4, width // 4), mode="bilinear", align_corners=False)
            for x, branch, widen in levels
        ]
        return Dense(self.classify(self.fuse(torch.cat(wide, 1))), features.extras, features.covers)


class Critic(nn.Module):
    """ResNetV2 and a ViT: class-aware images (B, C, H, W) -> how real they look (B,), any real number.

    It has no BatchNorm, and attention is written out, so that the gradient penalty can be differentiated.
    """

    def __init__(
        self, *, image_size: Size, dim: int = 768, depth: int = 12, heads: int = 12, width: int = 64,
        units: Sequence[int] = (3, 4, 9), in_channels: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        check_widths(width, units, dim, heads)
        if depth < 1:
            raise UserError(f"the critic's depth is {depth}; give 1 or more")
        self.backbone = ResNetV2(width=width, units=units, in_channels=in_channels)
        self.grid = (max(LEAST, image_size[0]) + CELL - 1) // CELL, (max(LEAST, image_size[1]) + CELL - 1) // CELL
        self.embed = nn.Conv2d(self.backbone.dims[-1], dim, 1)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1], dim))
        self.blocks = nn.Sequential(*transformer(dim, depth=depth, heads=heads))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 1))
        nn.init.trunc_normal_(self.positions, std=0.02)
        start_linear(self)
        for block in self.blocks:
            block.get_submodule("attn").fused_attn = False  # type: ignore[assignment]  # its kernels have no 2nd derivative

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(self.backbone(images).maps[-1])
        grid = (x.shape[-2], x.shape[-1])
        tokens = map_tokens(x) + resize_positions(self.positions, old=self.grid, new=grid)
        x = self.norm(self.blocks(torch.cat([self.cls_token.expand(x.shape[0], -1, -1), tokens], 1)))
        return self.head(x[:, 0])[:, 0]


READOUT = Readout(logit_rows)
normalisers = pixel_counts


def criterion(
    out: Dense, masks: Tensor, totals: dict[str, Tensor], *, ignore_index: int = 255,
    class_weights: Tensor | None = None, cross_entropy: float = 0.5, dice: float = 0.5,
) -> dict[str, Tensor]:  # fmt: skip
    """The supervised terms of the generator: cross entropy of the valid pixels and Dice of all classes."""
    if min(cross_entropy, dice) < 0 or not cross_entropy + dice:
        raise UserError(f"loss: cross_entropy {cross_entropy} and dice {dice} must not be negative, nor both 0")
    if class_weights is not None and not cross_entropy:
        raise UserError("class_balance acts on cross_entropy, whose weight is 0; set class_balance: none")
    logits, terms = logits_at(out, masks), {}
    if cross_entropy:
        terms["loss_ce"] = cross_entropy * pixel_cross_entropy(
            logits, masks, total=totals["valid"], ignore_index=ignore_index, class_weights=class_weights
        )
    if dice:
        each = dice_of_images(logits, masks, ignore_index=ignore_index)
        terms["loss_dice"] = dice * each.sum() / totals["images"]
    return terms


def dice_of_images(logits: Tensor, masks: Tensor, *, ignore_index: int) -> Tensor:
    """1 - (2 sum(p g) + s) / (sum(p^2) + sum(g^2) + s) of every class of each image, averaged over classes: (B,)."""
    valid = (masks != ignore_index)[:, None]
    p = torch.where(valid, logits.softmax(1), 0)
    g = one_hot(masks, logits.shape[1], ignore_index=ignore_index).to(p.dtype)
    overlap, sizes = (p * g).sum((2, 3)), p.square().sum((2, 3)) + g.sum((2, 3))
    return (1 - (2 * overlap + SMOOTH) / (sizes + SMOOTH)).mean(1)


def check_widths(width: int, units: Sequence[int], dim: int, heads: int) -> None:
    """Raises UserError for an encoder or a transformer that cannot be built."""
    if width < GROUPS or width % GROUPS:
        raise UserError(f"width is {width}; its norms have {GROUPS} groups, so give a multiple of that, such as 64")
    if len(units) != 3 or min(units) < 1:
        raise UserError(f"units is {list(units)}; give three numbers of 1 or more, such as [3, 4, 6]")
    if heads < 1 or dim < heads or dim % heads:
        raise UserError(f"dim {dim} does not divide into {heads} heads; change one of them")


def castformer(
    *, num_classes: int, width: int = 64, units: Sequence[int] = (3, 4, 6), dim: int = 256, heads: int = 8,
    depth: int = 12, iterations: int = 4, grid: Sequence[int] = (16, 16, 16, 16), decoder_dim: int = 256,
    dropout: float = 0.1, drop_path: float = 0.0, weights: str | None = None, in_channels: int = 3,
) -> CATformer:  # fmt: skip
    """The generator; `grid` has n for each level, `depth` 0 leaves TEM's blocks out.

    `weights` is a local npz file of Google's R50+ViT-B_16, of which the encoder is taken; it needs units 3, 4, 9.
    """
    check_widths(width, units, dim, heads)
    if len(grid) != 4 or min(grid) < 1 or iterations < 1 or depth < 0 or decoder_dim < 1:
        raise UserError(
            f"grid {list(grid)} must be four numbers of 1 or more, iterations {iterations} and decoder_dim "
            f"{decoder_dim} 1 or more, depth {depth} 0 or more"
        )
    encoder = ResNetV2(width=width, units=units, in_channels=in_channels)
    if weights is not None:
        load_npz(encoder, weights)
    levels: dict[str, int] = {"iterations": iterations, "depth": depth, "heads": heads}
    branches = [
        Branch(inputs, dim, grid=n, drop_path=drop_path, **levels) for inputs, n in zip(encoder.dims, grid, strict=True)
    ]
    return CATformer(encoder, branches, dim=dim, decoder_dim=decoder_dim, num_classes=num_classes, dropout=dropout)


castformer_r50 = castformer
castformer_r50_vit_base = partial(castformer, units=(3, 4, 9), dim=768, heads=12)


def load_npz(encoder: ResNetV2, weights: str) -> None:
    """Load the encoder of a JAX R50+ViT file, in place. Raises UserError when it cannot be read or does not fit."""
    path = Path(weights).expanduser()
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {key: torch.from_numpy(np.array(file[key])) for key in file.files if "root" in key or "unit" in key}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{weights} cannot be read as an npz file of R50+ViT weights ({error}); copy it again"
        ) from None
    names = {"conv_proj/kernel": "downsample.weight", "kernel": "weight", "scale": "weight", "/": "."}
    state = {}
    for key, value in found.items():
        new = key.replace("conv_root", "root.conv").replace("gn_root", "root.gn")
        for theirs, ours in names.items():
            new = new.replace(theirs, ours)
        new = f"body.{new}" if new.startswith("block") else new
        state[new] = value.permute(3, 2, 0, 1) if value.ndim == 4 and key.endswith("kernel") else value.flatten()
    try:
        encoder.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"{weights} does not fit the encoder ({str(error)[:200]}); it needs units [3, 4, 9] and RGB"
        ) from None


PARTS: Rules = (
    (r"^(?:transformer\.embeddings\.hybrid_model\.)?(root|body)\.", r"backbone.\1."),
    (r"^pos_layer\.", "sampler.position."),
    (r"^ps_layers\.(\d+)\.offset_layer\.", r"sampler.offsets.\1."),
    (r"^ps_layers\.(\d+)\.transformer_layer\.", r"sampler.layers.\1."),
)
UNUSED = r"^point_coord$|^ps_layers\.\d+\.position_layer\."  # the fixed start, and another name of pos_layer


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What TransUNet's encoder and PS-ViT's sampler share with this system; CASTformer has no official weights."""
    return rename(state, PARTS, unused=UNUSED)
