"""Pro-tuning: a prompt block at each stage of a frozen backbone adds a prompt made from the map it sees.

Paper     X. Nie et al., "Pro-tuning: Unified Prompt Tuning for Vision Tasks", IEEE TCSVT 2024, arXiv 2207.14381.
Found     in abstracts and summaries: light stage-wise prompt blocks in frozen CNNs and transformers, whose output is
          added to the map; only they and the head train. In an implementation by others: 1 x 1 convolution in 4 groups,
          5 x 5 depthwise, 1 x 1, squeeze and excitation (ratio 16), 1 x 1 in 4 groups, times a learned number that is
          0 at first, before each of four stages. No code of the authors was at hand.
Proposed  that this is the paper's block; the gate multiplies the map (there the gate itself is the prompt, a slip);
          the variants `plain` and `bottleneck`; four groups of blocks as the stages of a plain ViT.
Checked   tests/adapters/test_pro_tuning.py by behaviour and parameter counts.

Shapes    B images, C channels on an h w grid.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from timm.layers import SqueezeExcite
from timm.models import FeatureListNet
from timm.models.pvt_v2 import PyramidVisionTransformerStage
from timm.models.swin_transformer import SwinTransformerStage
from torch import Tensor, nn

from segvit.adapters.handle import Handle
from segvit.adapters.stages import borrow, gaps_behind_stages, group_ends
from segvit.backbones.clip import ClipResNet
from segvit.backbones.pvt import PVT
from segvit.backbones.pyramid import Pyramid
from segvit.backbones.vit import PlainViT
from segvit.contracts import Size, UserError
from segvit.nn.tokens import Step, map_tokens, patch_map

Kind = Literal["grouped", "plain", "bottleneck"]


class PromptBlock(nn.Module):
    """x + beta * prompt(x) on maps (B, C, h, w), with beta 0 at first."""

    def __init__(self, dim: int, *, kind: Kind, gelu: bool) -> None:
        super().__init__()
        inner, groups = (dim // 4, 1) if kind == "bottleneck" else (dim, 4 if kind == "grouped" else 1)
        if dim % 4 and kind != "plain":
            raise UserError(f"{dim} channels do not divide by 4, as {kind} needs; choose plain")
        parts: list[nn.Module] = [
            nn.Conv2d(dim, inner, 1, groups=groups), nn.Conv2d(inner, inner, 5, padding=2, groups=inner)
        ]  # fmt: skip
        parts += [nn.GELU()] if gelu else []
        parts += [nn.Conv2d(inner, dim, 1)]
        if kind == "grouped":
            parts += [SqueezeExcite(dim, rd_channels=max(1, dim // 16)), nn.Conv2d(dim, dim, 1, groups=groups)]
        self.prompt = nn.Sequential(*parts)
        self.beta = nn.Parameter(torch.zeros(()))
        for module in self.prompt.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(cast(Tensor, module.bias))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, x + self.beta * self.prompt(x))


class PromptGap(nn.Module):
    """A gap: the patch tokens are prompted as a map; class and register tokens pass by."""

    def __init__(self, block: PromptBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, step: Step) -> Step:
        patches = map_tokens(self.block(patch_map(step)))
        return step._replace(tokens=torch.cat([step.tokens[:, : step.prefix], patches], dim=1))


class PromptedPart(nn.Module):
    """A part of timm's network with a prompt block before or behind it; its own parts keep their names."""

    def __init__(self, part: nn.Module, block: PromptBlock, *, behind: bool, channels_last: bool) -> None:
        super().__init__()
        borrow(self, part)
        self.part = (part,)  # in a tuple: its parts are registered here
        self.block, self.behind, self.channels_last = block, behind, channels_last

    def forward(self, x: Tensor) -> Tensor:
        if self.behind:
            return self.prompted(self.part[0](x))
        return cast(Tensor, self.part[0](self.prompted(x)))

    def prompted(self, x: Tensor) -> Tensor:
        """Of a map (B, C, h, w), or (B, h, w, C) where the network has it so."""
        if self.channels_last:
            return cast(Tensor, self.block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return cast(Tensor, self.block(x))


class PromptedEmbedding(nn.Module):
    """The patch embedding of a PVT stage with a prompt block behind it, before the positions are added."""

    def __init__(self, base_layer: nn.Module, block: PromptBlock) -> None:
        super().__init__()
        self.base_layer, self.block = base_layer, block

    def forward(self, x: Tensor) -> tuple[Tensor, Size]:
        tokens, grid = self.base_layer(x)
        return map_tokens(self.block(tokens.mT.unflatten(2, grid))), grid


def pro_tuning(
    backbone: nn.Module, *, block: Kind = "grouped", position: Literal["input", "output"] = "input", gelu: bool = False
) -> Handle:
    """A prompt block at each stage; the first output is the frozen network's.

    `position="input"` is before the blocks of each stage, behind a merging of patches that belongs to it; the head sees
    its effect from the stage's own map on. `"output"` is behind each stage, where the head sees it at once (but of the
    groups of a plain ViT only the last; others end maps before the prompt). `gelu` puts one behind the depthwise
    convolution. Raises UserError for a backbone without stages.
    """
    handle, like = Handle(backbone), next(backbone.parameters())

    def fresh(dim: int) -> PromptBlock:
        return PromptBlock(dim, kind=block, gelu=gelu).to(like.device, like.dtype)

    gaps = gaps_behind_stages(backbone)
    if position == "output":
        for path, dim in gaps:
            handle.add(path, PromptGap(fresh(dim)))
    elif isinstance(backbone, PlainViT):
        for start in [0, *group_ends(backbone)[:-1]]:
            handle.add(f"gaps.{start}", PromptGap(fresh(backbone.dim)))
    elif isinstance(backbone, PVT):
        for stage, dim in enumerate(backbone.dims, start=1):
            path = f"patch_embed{stage}"
            handle.replace(path, PromptedEmbedding(backbone.get_submodule(path), fresh(dim)))
    elif isinstance(backbone, ClipResNet):
        raise UserError('the stages of CLIP\'s ResNet have no place for a prompt at their input; use position="output"')
    else:
        pyramid = cast(Pyramid, backbone)
        for name, dim in zip(cast(FeatureListNet, pyramid.network).return_layers, pyramid.dims, strict=True):
            path, behind, channels, last = stage_input(pyramid, f"network.{name}", dim)
            part = PromptedPart(pyramid.get_submodule(path), fresh(channels), behind=behind, channels_last=last)
            handle.replace(path, part)
    return handle


def stage_input(pyramid: Pyramid, stage: str, dim: int) -> tuple[str, bool, int, bool]:
    """The part of a stage at whose end its blocks begin, or the stage itself; whether the prompt goes behind it.

    Also the channels there, and whether they come last. `dim` is the stage's number of channels.
    """
    module = pyramid.get_submodule(stage)
    last = isinstance(module, SwinTransformerStage | PyramidVisionTransformerStage)
    if "downsample" in dict(module.named_children()):
        return f"{stage}.downsample", True, dim, last
    if last:  # PVT v2's first stage, whose patches are embedded outside
        return stage, False, dim, True
    first = next(part for part in module.modules() if isinstance(part, nn.Conv2d))
    return stage, False, first.in_channels, False
