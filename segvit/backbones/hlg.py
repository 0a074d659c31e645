"""HLG transformers: four stages whose blocks join 7 x 7 windows with global attention to one token a window.

Paper     L. Zhang et al., "Vision Transformers: From Semantic Segmentation to Dense Prediction", IJCV 2024,
          arXiv 2207.09339.
Idea      Attention inside windows (contiguous in even blocks, dilated over the whole map in odd ones), then attention
          of every cell to the means of all windows. The last stage is plain global attention. Position biases are an
          MLP of the offset, so that weights fit every image size.
Differs   from the official code, which runs only where every stage is a multiple of 7 wide: images are padded to whole
          cells of stride 32, maps to whole windows, and padding is neither attended to nor part of a window's mean.
Checked   tests/golden/hlg__backbone (fudan-zvg/SETR hlg.py, which needs small repairs to run at all).

Shapes    B images, C channels, h w grid of a stage, n windows of 49 cells, M heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d
from timm.models import adapt_input_conv
from torch import Tensor, nn

from segvit.backbones.weights import read_state, unwrap
from segvit.contracts import Features, Size, UserError
from segvit.nn.attention import join_heads, split_heads
from segvit.nn.rename import Rules, rename
from segvit.nn.tokens import map_tokens, pad_to_patches

WINDOW = 7
STRIDES = (4, 8, 16, 32)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def to_windows(maps: Tensor, *, dilated: bool) -> Tensor:
    """(B, C, h, w) -> (B, n, 49, C), padded with zeros below and right to whole windows, windows row by row.

    A dilated window takes every (h / 7)-th row and (w / 7)-th column.
    """
    padded = pad_to_patches(maps, (WINDOW, WINDOW))
    down, across = padded.shape[-2] // WINDOW, padded.shape[-1] // WINDOW
    if dilated:
        parts = padded.unflatten(3, (WINDOW, across)).unflatten(2, (WINDOW, down)).permute(0, 3, 5, 2, 4, 1)
    else:
        parts = padded.unflatten(3, (across, WINDOW)).unflatten(2, (down, WINDOW)).permute(0, 2, 4, 3, 5, 1)
    return parts.flatten(3, 4).flatten(1, 2)


def from_windows(windows: Tensor, size: Size, *, dilated: bool) -> Tensor:
    """The inverse of `to_windows`: (B, n, 49, C) -> (B, C, h, w) without the padding."""
    down, across = -(-size[0] // WINDOW), -(-size[1] // WINDOW)
    parts = windows.unflatten(1, (down, across)).unflatten(3, (WINDOW, WINDOW))  # (B, down, across, 7, 7, C)
    order = (0, 5, 3, 1, 4, 2) if dilated else (0, 5, 1, 3, 2, 4)
    return parts.permute(order).flatten(4, 5).flatten(2, 3)[:, :, : size[0], : size[1]]


def window_mask(maps: Tensor, *, dilated: bool) -> Tensor | None:
    """Which cells of the windows of (B, C, h, w) lie on the map: (n, 49) bool, or None if all do."""
    size = maps.shape[-2:]
    if size[0] % WINDOW == 0 and size[1] % WINDOW == 0:
        return None
    return to_windows(maps.new_ones(1, 1, *size), dilated=dilated)[0, :, :, 0] > 0


class PositionBias(nn.Module):
    """Attention bias by head as an MLP of the offset between two cells."""

    def __init__(self, dim: int, *, heads: int) -> None:
        super().__init__()
        width = dim // 16
        layers: list[nn.Module] = [nn.Linear(2, width)]
        for out in (width, width, heads):
            layers += [nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, out)]
        self.mlp = nn.Sequential(*layers)

    def forward(self, grid: Size, keys: int) -> Tensor:
        """(M, h * w, keys): the bias of every cell of the grid towards its first `keys` cells, row by row."""
        (rows, columns), weight = grid, next(self.parameters())
        offsets = [torch.arange(1 - side, side, device=weight.device, dtype=weight.dtype) for side in grid]
        table = self.mlp(torch.stack(torch.meshgrid(*offsets, indexing="ij"), dim=-1))  # (2h - 1, 2w - 1, M)
        y = torch.arange(rows, device=weight.device).repeat_interleave(columns)
        x = torch.arange(columns, device=weight.device).repeat(rows)
        among = table[y[:, None] - y[:keys] + rows - 1, x[:, None] - x[:keys] + columns - 1]
        return among.permute(2, 0, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, heads: int) -> Tensor:
    """Attention of (B, Q, C) to (B, N, C) with a bias that broadcasts to (B, M, Q, N)."""
    q, k, v = (split_heads(x, heads) for x in (q, k, v))
    return join_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype)))


class WindowAttention(nn.Module):
    """Attention inside every window, without projections of its own."""

    def __init__(self, dim: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.position = PositionBias(dim, heads=heads)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B, n, 49, C) each and which cells count, (n, 49) -> (B, n, 49, C)."""
        bias = self.position((WINDOW, WINDOW), WINDOW**2)[None]  # (1, M, 49, 49)
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None, :], -torch.inf).repeat(q.shape[0], 1, 1, 1)
        mixed = attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bias, heads=self.heads)
        return mixed.unflatten(0, q.shape[:2])


class GlobalAttention(nn.Module):
    """Attention of every cell to a few tokens (or to all cells), and the output projection."""

    def __init__(self, dim: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.position = PositionBias(dim, heads=heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, query: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, C, h, w) and two of (B, N, C) -> (B, C, h, w)."""
        grid: Size = (query.shape[-2], query.shape[-1])
        # Token j is given the place of the j-th cell, not that of its window: so the official networks are trained.
        bias = self.position(grid, k.shape[1])[None]
        mixed = self.proj(attend(map_tokens(query), k, v, bias, heads=self.heads))
        return mixed.mT.unflatten(2, grid)


class LocalGlobalMixer(nn.Module):
    """Smoothing, attention inside windows, then attention of every cell to the window means."""

    def __init__(self, dim: int, *, heads: int, dilated: bool, qkv_bias: bool, drop_path: float, eps: float) -> None:
        super().__init__()
        self.dilated = dilated
        self.smooth = nn.Sequential(
            nn.Conv2d(dim, dim // 4, 1), nn.BatchNorm2d(dim // 4), nn.GELU(),
            nn.Conv2d(dim // 4, dim // 4, 3, padding=1), nn.BatchNorm2d(dim // 4), nn.GELU(),
            nn.Conv2d(dim // 4, dim, 1), nn.BatchNorm2d(dim),
        )  # fmt: skip
        self.norm_window, self.norm_token, self.norm = (nn.LayerNorm(dim, eps=eps) for _ in range(3))
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.local = WindowAttention(dim, heads=heads)
        self.query_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.globally = GlobalAttention(dim, heads=heads)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        size: Size = (x.shape[-2], x.shape[-1])
        x = F.gelu(x + self.smooth(x))
        mask = window_mask(x, dilated=self.dilated)
        windows = to_windows(x, dilated=self.dilated)
        normed = self.norm_window(windows)
        q = self.q(normed)
        update = self.local(q, q, self.v(normed), mask)  # queries serve as keys
        windows = windows + update
        tokens = self.norm_token(window_means(windows, mask))  # (B, n, C)
        x, q, update = (from_windows(part, size, dilated=self.dilated) for part in (windows, q, self.norm(update)))
        query = q + self.query_conv(update)
        return x + self.drop_path(self.globally(query, self.k(tokens), self.v(tokens)))


def window_means(windows: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of the cells of each window that count: (B, n, 49, C) -> (B, n, C)."""
    if mask is None:
        return windows.mean(2)
    return (windows * mask[..., None]).sum(2) / mask.sum(1, keepdim=True)


class GlobalMixer(nn.Module):
    """Plain attention among all cells, normalised after it."""

    def __init__(self, dim: int, *, heads: int, qkv_bias: bool, drop_path: float, eps: float) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.globally = GlobalAttention(dim, heads=heads)
        self.norm = LayerNorm2d(dim, eps=eps)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        tokens = map_tokens(x)
        query = self.q(tokens).mT.unflatten(2, x.shape[-2:])
        return x + self.drop_path(self.norm(self.globally(query, self.k(tokens), self.v(tokens))))


class ConvMlp(nn.Module):
    """A 1 x 1 expansion of the input's width, a depthwise 3 x 3 convolution and a 1 x 1 projection."""

    def __init__(self, in_dim: int, dim: int, *, ratio: int, stride: int) -> None:
        super().__init__()
        hidden = ratio * in_dim
        self.fc1, self.norm1 = nn.Conv2d(in_dim, hidden, 1), nn.BatchNorm2d(hidden)
        self.fc2 = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden)
        self.norm2, self.fc3 = nn.BatchNorm2d(hidden), nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.fc1(x)))
        return self.fc3(F.gelu(self.norm2(self.fc2(x))))


class Block(nn.Module):
    """The feed-forward part, which comes first and may halve the map, then the mixer."""

    def __init__(
        self, in_dim: int, dim: int, mixer: nn.Module, *, halve: bool, ratio: int, drop_path: float, eps: float
    ) -> None:
        super().__init__()
        halving = [nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, groups=in_dim), nn.BatchNorm2d(dim), nn.GELU()]
        self.down = nn.Sequential(*halving) if halve else nn.Identity()
        self.mlp = ConvMlp(in_dim, dim, ratio=ratio, stride=2 if halve else 1)
        self.norm = LayerNorm2d(dim, eps=eps)
        self.drop_path = DropPath(drop_path)
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x) + self.drop_path(self.norm(self.mlp(x)))
        return self.mixer(x)


class HLG(nn.Module):
    """Image -> Features with four maps, strides 4 to 32.

    `local` says for each stage whether it has windows; stochastic depth rises linearly with the depth to `drop_path`.
    `mean` and `std` are those of ImageNet, or 0.5 for each channel where the images are not RGB.
    """

    def __init__(
        self, *, dims: Sequence[int], heads: Sequence[int], depths: Sequence[int], drop_path: float = 0.0,
        in_channels: int = 3, mlp_ratio: int = 4, qkv_bias: bool = True,
        local: Sequence[bool] = (True, True, True, False), stage_eps: float = 1e-6, block_eps: float = 1e-6,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dims = tuple(dims)
        check_sizes(dims, heads, depths)
        self.mean: tuple[float, ...] = IMAGENET_MEAN if in_channels == 3 else (0.5,) * in_channels
        self.std: tuple[float, ...] = IMAGENET_STD if in_channels == 3 else (0.5,) * in_channels
        self.stem = nn.Sequential(stem_conv(in_channels, dims[0], stride=2), stem_conv(dims[0], dims[0], stride=1))
        self.stages, self.norms = nn.ModuleList(), nn.ModuleList()
        number, last, before = 0, max(sum(depths) - 1, 1), dims[0]
        for dim, head_count, depth, windowed in zip(dims, heads, depths, local, strict=True):
            blocks = []
            for index in range(depth):
                rates: dict[str, float] = {"drop_path": drop_path * number / last, "eps": block_eps}
                mixer: nn.Module
                if windowed:
                    mixer = LocalGlobalMixer(dim, heads=head_count, dilated=index % 2 == 1, qkv_bias=qkv_bias, **rates)
                else:
                    mixer = GlobalMixer(dim, heads=head_count, qkv_bias=qkv_bias, **rates)
                blocks.append(Block(before, dim, mixer, halve=index == 0, ratio=mlp_ratio, **rates))
                number, before = number + 1, dim
            self.stages.append(nn.Sequential(*blocks))
            self.norms.append(LayerNorm2d(dim, eps=stage_eps))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Features:
        padded = pad_to_patches(images, (STRIDES[-1], STRIDES[-1]))
        x, maps = self.stem(padded), []
        for stage, norm in zip(self.stages, self.norms, strict=True):
            x = norm(stage(x))  # the next stage reads the normalised map too
            maps.append(x)
        grid: Size = (maps[0].shape[-2], maps[0].shape[-1])
        return Features(maps, list(STRIDES), grid, (padded.shape[-2], padded.shape[-1]))


def stem_conv(in_dim: int, dim: int, *, stride: int) -> nn.Sequential:
    """A 3 x 3 convolution without bias, BatchNorm, GELU."""
    conv = nn.Conv2d(in_dim, dim, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(dim), nn.GELU())


def check_sizes(dims: Sequence[int], heads: Sequence[int], depths: Sequence[int]) -> None:
    """Raise UserError unless the sizes of the four stages fit together."""
    if not len(dims) == len(heads) == len(depths) == len(STRIDES) or min(depths) < 1:
        raise UserError(
            f"dims {list(dims)}, heads {list(heads)} and depths {list(depths)} must have 4 values each; depths from 1"
        )
    for before, dim, count in zip([dims[0], *dims], dims, heads, strict=False):
        if dim < 32 or dim % 4 or dim % before or dim % count:
            raise UserError(
                f"dims {list(dims)} must be multiples of 4 from 32 on, of the dim before and of heads {list(heads)}"
            )


class Variant(NamedTuple):
    """The sizes of a named network, stage by stage."""

    dims: Sequence[int]
    heads: Sequence[int]
    depths: Sequence[int]


# Section "Variants" of the official configurations; Large has 18 blocks where the segmentation models use it.
VARIANTS = {
    "hlg_tiny": Variant((64, 128, 256, 512), (2, 4, 8, 16), (2, 2, 6, 2)),
    "hlg_small": Variant((96, 192, 384, 768), (3, 6, 12, 24), (2, 2, 6, 2)),
    "hlg_medium": Variant((96, 192, 384, 768), (3, 6, 12, 24), (2, 2, 14, 2)),
    "hlg_large": Variant((128, 256, 512, 1024), (4, 8, 16, 32), (2, 2, 18, 2)),
}


def hlg(
    name: str,
    *,
    weights: str | None = None,
    drop_path: float = 0.0,
    in_channels: int = 3,
    dims: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
) -> HLG:
    """An HLG transformer by name: hlg_tiny, hlg_small, hlg_medium or hlg_large.

    `weights` is a local file in the official layout: a classifier or a segmentation model. `dims`, `heads` and `depths`
    change the named architecture, for training from nothing. Raises UserError for an unknown name and for weights that
    cannot be had or do not fit.
    """
    if name not in VARIANTS:
        raise UserError(f"there is no backbone {name!r}; choose from {', '.join(VARIANTS)}")
    if in_channels < 1:
        raise UserError(f"in_channels is {in_channels}; images have 1 channel or more")
    sizes = VARIANTS[name]
    network = HLG(
        dims=dims or sizes.dims, heads=heads or sizes.heads, depths=depths or sizes.depths, drop_path=drop_path,
        in_channels=in_channels,
    )  # fmt: skip
    if weights is not None:
        load_hlg(network, weights)
    return network


def load_hlg(network: HLG, weights: str) -> None:
    """Load an official classifier, or a segmentation model's backbone, from a local file.

    Raises UserError when it does not fit.
    """
    state, own = convert(unwrap(read_state(Path(weights).expanduser()))), network.state_dict()
    first = "stem.0.0.weight"
    if first in state and state[first].shape[1] == 3:  # RGB weights for images of other channels, as for plain ViTs
        state[first] = adapt_input_conv(own[first].shape[1], state[first])
    wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
    wrong += [key for key in state if key not in own]
    if wrong:
        raise UserError(f"{weights} does not fit the backbone: {len(wrong)} keys, {wrong[:2]}; choose the matching one")
    network.load_state_dict(state)


UNUSED = r"^head\."  # the image classifier
MIXER = r"^(stages\.\d+\.\d+\.)"
OFFICIAL: Rules = (
    (r"^s0_conv\.", "stem."),
    *((rf"^block{s}\.", f"stages.{s - 1}.") for s in range(1, 5)),
    *((rf"^norm_out_{s}\.", f"norms.{s}.") for s in range(3)),
    (r"^norm\.", "norms.3."),
    (MIXER + r"(spatial_smooth\.0|aux_q|norm0|h0_norm|q|k|v|norm1)\.", r"\1mixer.\2."),
    (MIXER + r"pos_local\.", r"\1mixer.local.position."),
    (MIXER + r"pos_global\.", r"\1mixer.globally.position."),
    (MIXER + r"global_attn\.proj\.", r"\1mixer.globally.proj."),
    (MIXER + r"down_proj\.proj\.", r"\1down."),
    (MIXER + r"norm2\.", r"\1norm."),
    (r"\.position\.pos_proj\.", ".position.mlp.0."),
    *((rf"\.position\.pos{i}\.{part}\.", f".position.mlp.{3 * i - 2 + part}.") for i in (1, 2, 3) for part in (0, 2)),
    (r"\.mixer\.spatial_smooth\.0\.", ".mixer.smooth."),
    (r"\.mixer\.aux_q\.", ".mixer.query_conv."),
    (r"\.mixer\.norm0\.", ".mixer.norm_window."),
    (r"\.mixer\.h0_norm\.", ".mixer.norm_token."),
    (r"\.mixer\.norm1\.", ".mixer.norm."),
)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official classifiers (fudan-zvg/SETR hlg.py) and the backbones of official segmentation models into ours."""
    prefix = "backbone."
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return rename(inside or state, OFFICIAL, unused=UNUSED)
