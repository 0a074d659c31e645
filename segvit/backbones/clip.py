"""CLIP's image towers as backbones: feature maps, dense embeddings and the global embedding, for images of any size.

Paper     A. Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.
ViT       a `PlainViT` whose `embedding` is ln_post and the projection, so that every adapter works on it.
ResNet    `ClipResNet`: a stem of three convolutions, pooling in the place of strides, an attention pool over all cells.
Outputs   `maps`: raw blocks or stages. `pooled`: (B, E) the image's vector. `extras["dense"]`: (B, E, h, w) each
          cell's vector. None is normalised.
Differs   The attention pool asks for every cell, as DenseCLIP's does; the image's vector is CLIP's all the same.
Checked   tests/golden/clip__{vit,resnet}_towers, zegclip__plain_encoder, denseclip__clip_resnet; open_clip's towers.

Shapes    B images, C channels, h w grid, E joint channels.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from segvit.backbones.vit import PlainViT
from segvit.contracts import Features, Size, UserError
from segvit.nn.attention import join_heads, split_heads
from segvit.nn.rename import Rules, rename
from segvit.nn.tokens import map_step, map_tokens, pad_to_patches, patch_map, resize_positions
from segvit.text.architecture import CELL, VisionConfig
from segvit.text.checkpoint import Checkpoint, find_clip
from segvit.text.tower import TextTower, build_text

Mode = Literal["bicubic", "bilinear"]


class JointEmbedding(nn.Module):
    """Tokens to the joint space: the last LayerNorm, then the projection."""

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(width), nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.proj.weight, std=width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.proj(self.norm(tokens)))


class Bottleneck(nn.Module):
    """1x1, 3x3, average pooling instead of a stride, 1x1 to four times `planes`."""

    def __init__(self, channels: int, planes: int, *, stride: int) -> None:
        super().__init__()
        out = 4 * planes
        self.conv1, self.bn1 = nn.Conv2d(channels, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(planes, out, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or channels != out:
            shortcut = {
                "-1": nn.AvgPool2d(stride),
                "0": nn.Conv2d(channels, out, 1, bias=False),
                "1": nn.BatchNorm2d(out),
            }
            self.downsample = nn.Sequential(OrderedDict(shortcut))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.avgpool(F.relu(self.bn2(self.conv2(y))))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class AttentionPool(nn.Module):
    """Self-attention of all cells and their mean: (B, C, h, w) -> the image's (B, E) and each cell's (B, E, h, w).

    Positions are stored for `grid` and resized to the map's.
    """

    def __init__(self, dim: int, embed_dim: int, *, heads: int, grid: Size, position_mode: Mode) -> None:
        super().__init__()
        self.heads, self.grid, self.position_mode = heads, grid, position_mode
        self.positional_embedding = nn.Parameter(torch.randn(1 + grid[0] * grid[1], dim) / dim**0.5)
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.c_proj = nn.Linear(dim, embed_dim)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(layer.weight, std=dim**-0.5)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        size: Size = (maps.shape[-2], maps.shape[-1])
        cells = map_tokens(maps)
        positions = self.positional_embedding[None]
        places = resize_positions(positions[:, 1:], old=self.grid, new=size, mode=self.position_mode)
        tokens = torch.cat([cells.mean(1, keepdim=True) + positions[:, :1], cells + places], dim=1)
        q, k, v = (split_heads(layer(tokens), self.heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        joint = self.c_proj(join_heads(F.scaled_dot_product_attention(q, k, v)))  # (B, 1 + h*w, E)
        return joint[:, 0], joint[:, 1:].mT.unflatten(2, size)


class ClipResNet(nn.Module):
    """CLIP's ResNet: four maps of strides 4, 8, 16, 32. Adapters put modules into `gaps` 1 to 4, behind the stages.

    Images are padded with zeros to whole cells of the last map; with `padded=False` rows and columns that fill no cell
    are lost on the way, as in the official code. Keys are the official ones without `visual.`.
    """

    def __init__(
        self, config: VisionConfig, *, image_size: Size, position_mode: Mode = "bilinear", padded: bool = True
    ) -> None:
        super().__init__()
        if isinstance(config.layers, int):
            raise UserError("a ResNet needs the depths of its four stages; use clip_vit for a ViT")
        width, self.padded = config.width, padded
        self.mean, self.std = config.mean, config.std
        self.dims, self.strides = tuple(width * 4 * 2**i for i in range(4)), [4, 8, 16, 32]
        self.conv1, self.bn1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv2, self.bn2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv3, self.bn3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        channels = width
        for number, depth in enumerate(config.layers, start=1):
            planes, blocks = width * 2 ** (number - 1), []
            for index in range(depth):
                blocks.append(Bottleneck(channels, planes, stride=2 if number > 1 and index == 0 else 1))
                channels = 4 * planes
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.gaps = nn.ModuleDict()
        grid = (image_size[0] // CELL, image_size[1] // CELL)
        self.attnpool = AttentionPool(
            channels, config.embed_dim, heads=config.heads, grid=grid, position_mode=position_mode
        )  # fmt: skip

    def forward(self, images: Tensor) -> Features:
        images = pad_to_patches(images, (CELL, CELL)) if self.padded else images
        x = images
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        x, maps, extras = self.avgpool(x), list[Tensor](), dict[str, Tensor]()
        for number in ("1", "2", "3", "4"):
            x = self.get_submodule(f"layer{number}")(x)
            if number in self.gaps:
                step = self.gaps[number](map_step(x, extras))
                x, extras = patch_map(step).contiguous(), step.extras
            maps.append(x)
        pooled, dense = self.attnpool(x)
        grid, covers = (maps[0].shape[-2], maps[0].shape[-1]), (images.shape[-2], images.shape[-1])
        return Features(maps, list(self.strides), grid, covers, pooled, {**extras, "dense": dense})


class Towers(NamedTuple):
    """Both towers of a CLIP; similarities are the cosine times exp(`logit_scale`)."""

    image: PlainViT | ClipResNet
    text: TextTower
    logit_scale: float


def clip_vit(
    config: VisionConfig, *, image_size: Size, out_indices: Sequence[int] = (-1,), position_mode: Mode = "bicubic",
    doubled_class: bool = False, drop_path: float = 0.0, checkpointing: bool = False,
) -> PlainViT:  # fmt: skip
    """CLIP's ViT without weights; see `clip_backbone`."""
    if not isinstance(config.layers, int) or config.patch_size is None:
        raise UserError("this is CLIP's ResNet, which has stages instead of blocks; use ClipResNet")
    trunk = VisionTransformer(
        img_size=image_size, patch_size=config.patch_size, embed_dim=config.width, depth=config.layers,
        num_heads=config.heads, mlp_ratio=config.mlp_ratio, num_classes=0, pre_norm=True, drop_path_rate=drop_path,
        norm_layer=partial(nn.LayerNorm, eps=1e-5), act_layer="quick_gelu" if config.quick_gelu else "gelu",
    )  # fmt: skip
    trunk.pretrained_cfg = {"mean": config.mean, "std": config.std}
    return PlainViT(
        trunk, out_indices=out_indices, position_mode=position_mode, checkpointing=checkpointing,
        embedding=JointEmbedding(config.width, config.embed_dim), doubled_class=doubled_class,
    )  # fmt: skip


def clip_backbone(
    model: str | None = None, *, weights: str | None = None, quick_gelu: bool | None = None,
    image_size: int | Size | None = None, out_indices: Sequence[int] | None = None, position_mode: Mode | None = None,
    doubled_class: bool = False, drop_path: float = 0.0, checkpointing: bool = False,
) -> PlainViT | ClipResNet:  # fmt: skip
    """The image tower of a CLIP, by a name of open_clip such as `ViT-B-16` or `RN50`, or by its weights alone.

    `weights` is a pretrained tag of open_clip (`openai`, `laion2b_s34b_b88k`), a local file, or None; see
    `segvit.text.checkpoint.find_clip`, also for `quick_gelu`. `image_size` is the one that positions are stored for,
    resized from the weights' own; other sizes work at any time. `position_mode` is bicubic for a ViT, bilinear for a
    ResNet unless given; ZegCLIP and DenseCLIP have bilinear in both. For a ViT only: `out_indices` are the blocks whose
    maps are returned (the last one by default); `doubled_class` adds the class embedding once more with its position, a
    quirk of ZegCLIP's and DenseCLIP's code that their weights need; `drop_path`; `checkpointing`.

    Raises UserError for unknown names, for weights that cannot be had or do not fit, and for options of a ViT on a
    ResNet.
    """
    found = find_clip(model, weights, quick_gelu=quick_gelu)
    return build_backbone(
        found, image_size=image_size, out_indices=out_indices, position_mode=position_mode,
        doubled_class=doubled_class, drop_path=drop_path, checkpointing=checkpointing,
    )  # fmt: skip


def clip_towers(
    model: str | None = None, *, weights: str | None = None, quick_gelu: bool | None = None,
    image_size: int | Size | None = None, out_indices: Sequence[int] | None = None, position_mode: Mode | None = None,
    doubled_class: bool = False, drop_path: float = 0.0, checkpointing: bool = False, context_length: int | None = None,
) -> Towers:  # fmt: skip
    """Both towers of a CLIP from one reading of its weights; options as for `clip_backbone` and `text_tower`."""
    found = find_clip(model, weights, quick_gelu=quick_gelu)
    image = build_backbone(
        found, image_size=image_size, out_indices=out_indices, position_mode=position_mode,
        doubled_class=doubled_class, drop_path=drop_path, checkpointing=checkpointing,
    )  # fmt: skip
    scale = math.log(1 / 0.07) if found.state is None else found.state["logit_scale"].item()
    return Towers(image, build_text(found, context_length=context_length), scale)


def build_backbone(
    found: Checkpoint, *, image_size: int | Size | None = None, out_indices: Sequence[int] | None = None,
    position_mode: Mode | None = None, doubled_class: bool = False, drop_path: float = 0.0, checkpointing: bool = False,
) -> PlainViT | ClipResNet:  # fmt: skip
    """The image tower of what `find_clip` found, with its weights where there are any."""
    config = found.vision
    side = config.image_size if image_size is None else image_size
    size = (side, side) if isinstance(side, int) else side
    backbone: PlainViT | ClipResNet
    if isinstance(config.layers, int):
        backbone = clip_vit(
            config, image_size=size, out_indices=(-1,) if out_indices is None else out_indices,
            position_mode=position_mode or "bicubic", doubled_class=doubled_class, drop_path=drop_path,
            checkpointing=checkpointing,
        )  # fmt: skip
    else:
        if out_indices is not None or doubled_class or drop_path or checkpointing:
            raise UserError(
                "out_indices, doubled_class, drop_path and checkpointing are for CLIP's ViTs, and this is a ResNet; "
                "leave them out"
            )
        backbone = ClipResNet(config, image_size=size, position_mode=position_mode or "bilinear")
    if found.state is not None:
        own = {key.removeprefix("visual."): value for key, value in found.state.items() if key.startswith("visual.")}
        found.load(backbone, convert_vision(own, backbone))
    return backbone


VIT_RULES: Rules = (
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^proj$", "embedding.proj.weight"),
    (r"^ln_post\.", "embedding.norm."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"^(blocks\.\d+\.)ln_([12])\.", r"\1norm\2."),
    (r"^(blocks\.\d+\.attn\.)in_proj_", r"\1qkv."),
    (r"^(blocks\.\d+\.attn\.)out_proj\.", r"\1proj."),
    (r"^(blocks\.\d+\.mlp\.)c_fc\.", r"\1fc1."),
    (r"^(blocks\.\d+\.mlp\.)c_proj\.", r"\1fc2."),
)


def convert_vision(state: dict[str, Tensor], backbone: PlainViT | ClipResNet) -> dict[str, Tensor]:
    """An official image tower (keys without `visual.`) for `backbone`, whose grid its positions are resized to.

    Keys of other things, such as prompts, stay as they are.
    """
    if isinstance(backbone, ClipResNet):
        pool, key = backbone.attnpool, "attnpool.positional_embedding"
        tables = (
            {key: resize_table(state[key][None], grid=pool.grid, mode=pool.position_mode)[0]} if key in state else {}
        )
        return {**state, **tables}
    renamed, key = rename_vit(state), "pos_embed"
    if key not in renamed:
        return renamed
    return renamed | {key: resize_table(renamed[key], grid=backbone.pretrained_grid, mode=backbone.position_mode)}


def rename_vit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An official ViT tower (keys without `visual.`) in our names and shapes, its positions as they are."""
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "cls_token": lambda token: token[None, None],
        "embedding.proj.weight": lambda weight: weight.T.contiguous(),
        "pos_embed": lambda table: table[None],
    }
    renamed = rename(state, VIT_RULES, unused="$^")
    return {key: changes[key](value) if key in changes else value for key, value in renamed.items()}


def resize_table(table: Tensor, *, grid: Size, mode: str) -> Tensor:
    """Positions (1, 1 + n*n, C) of a square grid behind the class's, for another grid."""
    side = math.isqrt(table.shape[1] - 1)
    if 1 + side * side != table.shape[1] and table.shape[1] != 1 + grid[0] * grid[1]:
        raise UserError(f"{table.shape[1] - 1} positions are no square grid; build for the image size they are for")
    old = (side, side) if 1 + side * side == table.shape[1] else grid
    return torch.cat([table[:, :1], resize_positions(table[:, 1:], old=old, new=grid, mode=mode)], dim=1)
