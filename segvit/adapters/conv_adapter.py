"""Conv-Adapter: a small convolutional bottleneck beside or behind the convolutions of a frozen network.

Paper     H. Chen et al., "Conv-Adapter: Exploring Parameter Efficient Transfer Learning for ConvNets", CVPR Workshops
          2024, arXiv 2208.07463.
Idea      A(x) = scale * up(act(down(x))): `down` has the kernel of the convolution that it modulates and one output for
          each group of `reduction` channels, `up` is 1 x 1, `scale` one number a channel.
Found     in the official code: `conv_parallel` in ResNet (added behind norm and activation), ConvNeXt (before the norm,
          and beside the convolutions between stages) and Swin (7 x 7, reads norm1, added behind the attention).
Inferred  where the other three forms of the paper act: `conv_sequential` reads the convolution's output,
          `residual_parallel` the block's input, `residual_sequential` the output of the residual branch.
Ours      ResNet's basic blocks (the first convolution is modulated); PVT as Swin; plain ViTs, whose blocks do not know
          the grid: before a block, of its normalised patch tokens. Dilation is that of the convolution.
Checked   tests/golden/conv_adapter__* (official: Hhhhhhao/Conv-Adapter; inferred forms composed of its parts).

Shapes    B images, C channels, h w map, N tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, cast

import torch.nn.functional as F
from timm.models import pvt_v2
from timm.models.convnext import ConvNeXtBlock, ConvNeXtStage
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from segvit.adapters.handle import Handle
from segvit.adapters.stages import borrow
from segvit.backbones import pvt
from segvit.backbones.vit import PlainViT
from segvit.contracts import Size, UserError
from segvit.nn.tokens import Step, map_tokens, patch_map

Form = Literal["conv_parallel", "conv_sequential", "residual_parallel", "residual_sequential"]

TOKEN_KERNEL = (7, 7)  # where no convolution gives one: the official code's for Swin
# The parts of timm's ResNet blocks: before, of, and behind the modulated convolution.
PARTS = {
    Bottleneck: ("conv1 bn1 act1", "conv2 bn2 drop_block act2", "aa conv3 bn3 se", "act3"),
    BasicBlock: ("", "conv1 bn1 drop_block act1", "aa conv2 bn2 se", "act2"),
}


class ConvAdapter(nn.Module):
    """(B, inputs, h, w) -> (B, outputs, h', w'): grouped convolution, activation, 1 x 1 convolution, scale."""

    def __init__(
        self, inputs: int, outputs: int, *, reduction: int, kernel: Size, stride: Size = (1, 1),
        padding: Size | str | None = None, dilation: Size = (1, 1), activation: type[nn.Module],
    ) -> None:  # fmt: skip
        super().__init__()
        width = inputs // reduction
        if width < 1 or inputs % width:
            raise UserError(f"{inputs} channels do not split into groups of {reduction}; choose another reduction")
        if padding is None:
            padding = (kernel[0] // 2 * dilation[0], kernel[1] // 2 * dilation[1])
        self.down = nn.Conv2d(inputs, width, kernel, stride, padding, dilation, groups=width)
        self.act = activation()
        self.up = nn.Conv2d(width, outputs, 1)
        self.scale = nn.Parameter(self.up.weight.new_ones(1, outputs, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.scale * self.up(self.act(self.down(x))))

    def init(self, how: Literal["kaiming", "normal", "zero"]) -> None:
        """As the host network: `kaiming` ResNet's, `normal` that of ConvNeXt and transformers; `zero` adds nothing."""
        for layer in (self.down, self.up):
            if how == "kaiming":
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(cast(Tensor, layer.bias))
        if how == "zero":
            nn.init.zeros_(self.up.weight)

    def tokens(self, x: Tensor, grid: Size) -> Tensor:
        """Of a map in tokens, (B, h*w, C)."""
        return map_tokens(self(x.mT.unflatten(2, grid)))


class Parallel(nn.Module):
    """A convolution and an adapter of the same input."""

    def __init__(self, base_layer: nn.Module, adapter: ConvAdapter) -> None:
        super().__init__()
        self.base_layer, self.adapter = base_layer, adapter

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.base_layer(x) + self.adapter(x))


class ParallelAttention(nn.Module):
    """PVT's attention and an adapter of the same tokens (B, N, C)."""

    def __init__(self, base_layer: nn.Module, adapter: ConvAdapter) -> None:
        super().__init__()
        self.base_layer, self.adapter = base_layer, adapter

    def forward(self, x: Tensor, grid: Size) -> Tensor:
        return cast(Tensor, self.base_layer(x, grid) + self.adapter.tokens(x, grid))


class AdaptedResNetBlock(nn.Module):
    """timm's bottleneck or basic block with an adapter; its parts keep their names."""

    def __init__(self, block: Bottleneck | BasicBlock, adapter: ConvAdapter, form: Form) -> None:
        super().__init__()
        borrow(self, block)
        self.form, self.adapter = form, adapter
        self.before, self.spatial, self.behind, self.last = PARTS[type(block)]

    def forward(self, x: Tensor) -> Tensor:
        inner = self.run(self.before, x)
        out = self.run(self.spatial, inner)
        if self.form == "conv_parallel":
            out = out + self.adapter(inner)
        elif self.form == "conv_sequential":
            out = out + self.adapter(out)
        out = self.run(self.behind, out)
        if self.form == "residual_parallel":
            out = out + self.adapter(x)
        elif self.form == "residual_sequential":
            out = out + self.adapter(out)
        return self.run(self.last, self.run("drop_path", out) + self.run("downsample", x))

    def run(self, names: str, x: Tensor) -> Tensor:
        """Through those of the parts that the block has."""
        parts = dict(self.named_children())
        for name in names.split():
            x = parts[name](x) if name in parts else x
        return x


class AdaptedConvNeXtBlock(nn.Module):
    """timm's ConvNeXt block with an adapter; its parts keep their names."""

    def __init__(self, block: ConvNeXtBlock, adapter: ConvAdapter, form: Form) -> None:
        super().__init__()
        borrow(self, block)
        self.form, self.adapter = form, adapter
        self.channels_first, self.scaled = block.use_conv_mlp, block.gamma is not None

    def forward(self, x: Tensor) -> Tensor:
        parts = cast(Any, self)  # timm's, which are untyped
        out = parts.conv_dw(x)
        if self.form == "conv_parallel":
            out = out + self.adapter(x)
        elif self.form == "conv_sequential":
            out = out + self.adapter(out)
        if self.channels_first:
            out = parts.mlp(parts.norm(out))
        else:
            out = parts.mlp(parts.norm(out.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        if self.scaled:
            out = out * parts.gamma.view(-1, 1, 1)
        if self.form == "residual_parallel":
            out = out + self.adapter(x)
        elif self.form == "residual_sequential":
            out = out + self.adapter(out)
        return cast(Tensor, parts.drop_path(out) + parts.shortcut(x))


class AdaptedSwinBlock(nn.Module):
    """timm's Swin block on (B, h, w, C) with an adapter beside the attention; its parts keep their names."""

    def __init__(self, block: SwinTransformerBlock, adapter: ConvAdapter) -> None:
        super().__init__()
        borrow(self, block)
        self.block = (block,)  # in a tuple: its parts are registered here
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        block = self.block[0]
        normed = block.norm1(x)
        local = self.adapter(normed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + block.drop_path1(block._attn(normed)) + local
        return cast(Tensor, x + block.drop_path2(block.mlp(block.norm2(x))))


class TokenAdapter(nn.Module):
    """A gap of a plain ViT: adds what an adapter makes of the normalised patch tokens; the prefix stays."""

    def __init__(self, adapter: ConvAdapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, step: Step) -> Step:
        patches = F.layer_norm(patch_map(step).movedim(1, 3), (step.tokens.shape[-1],)).movedim(3, 1)
        local = map_tokens(self.adapter(patches))
        return step._replace(tokens=step.tokens + F.pad(local, (0, 0, step.prefix, 0)))


def resnet_block(block: Bottleneck | BasicBlock, form: Form, options: dict[str, Any]) -> AdaptedResNetBlock:
    """The adapter has the padding and dilation of the modulated convolution, and the stride of what it spans."""
    spatial = cast(nn.Conv2d, block.get_submodule(PARTS[type(block)][1].split()[0]))
    first = cast(nn.Conv2d, block.conv1)
    last = cast(nn.Conv2d, block.conv2 if isinstance(block, BasicBlock) else block.conv3)
    inputs, outputs = {
        "conv_parallel": (spatial.in_channels, spatial.out_channels),
        "conv_sequential": (spatial.out_channels, spatial.out_channels),
        "residual_parallel": (first.in_channels, last.out_channels),
        "residual_sequential": (last.out_channels, last.out_channels),
    }[form]
    options = {"kernel": spatial.kernel_size, "dilation": spatial.dilation} | options
    if form == "conv_parallel":
        options["stride"] = spatial.stride
    elif form == "residual_parallel":
        options["stride"] = (block.stride, block.stride)
    return AdaptedResNetBlock(block, ConvAdapter(inputs, outputs, activation=nn.ReLU, **options), form)


def convnext_block(block: ConvNeXtBlock, form: Form, options: dict[str, Any]) -> AdaptedConvNeXtBlock:
    """The adapter has the kernel and dilation of the depthwise convolution."""
    spatial = cast(nn.Conv2d, block.conv_dw)
    options = {"kernel": spatial.kernel_size, "dilation": spatial.dilation} | options
    if form.endswith("parallel"):
        options["stride"] = spatial.stride
    inputs = spatial.in_channels if form.endswith("parallel") else spatial.out_channels
    return AdaptedConvNeXtBlock(block, ConvAdapter(inputs, spatial.out_channels, activation=nn.GELU, **options), form)


def beside_downsample(conv: nn.Conv2d, options: dict[str, Any]) -> Parallel:
    """The convolution between two stages of ConvNeXt, with an adapter of its geometry."""
    same = {"kernel": conv.kernel_size, "stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    options = {"reduction": options["reduction"]} | same
    return Parallel(conv, ConvAdapter(conv.in_channels, conv.out_channels, activation=nn.GELU, **options))


def adapted(backbone: nn.Module, form: Form, options: dict[str, Any]) -> Iterator[tuple[str, nn.Module]]:
    """Where which module goes, block by block. Raises UserError for a form that a block has no place for."""
    only_parallel = False
    local: dict[str, Any] = {"kernel": TOKEN_KERNEL, "activation": nn.GELU} | options
    for name, module in list(backbone.named_modules()):
        if type(module) in PARTS:
            yield name, resnet_block(cast(Bottleneck, module), form, options)
        elif isinstance(module, ConvNeXtBlock):
            yield name, convnext_block(module, form, options)
        elif isinstance(module, ConvNeXtStage) and form == "conv_parallel":
            if isinstance(module.downsample, nn.Sequential):
                yield f"{name}.downsample.1", beside_downsample(cast(nn.Conv2d, module.downsample[1]), options)
        elif isinstance(module, SwinTransformerBlock):
            only_parallel = True
            yield name, AdaptedSwinBlock(module, ConvAdapter(module.dim, module.dim, **local))
        elif isinstance(module, pvt.Block | pvt_v2.Block):
            only_parallel = True
            dim = module.norm1.normalized_shape[0]
            yield f"{name}.attn", ParallelAttention(cast(nn.Module, module.attn), ConvAdapter(dim, dim, **local))
    if isinstance(backbone, PlainViT):
        only_parallel = True
        for index in range(backbone.out_indices[-1] + 1):  # later blocks do not run
            yield f"gaps.{index}", TokenAdapter(ConvAdapter(backbone.dim, backbone.dim, **local))
    if only_parallel and form != "conv_parallel":
        raise UserError(f"{form} is for ResNet and ConvNeXt; transformers have conv_parallel only")


def conv_adapter(
    backbone: nn.Module, *, form: Form = "conv_parallel", reduction: int = 8, kernel: int | None = None,
    zero_init: bool = False, train_norms: bool = False,
) -> Handle:  # fmt: skip
    """An adapter in every block; with `conv_parallel` in ConvNeXt also beside the convolutions between its stages.

    `form` other than `conv_parallel` is for ResNet and ConvNeXt. `kernel` replaces that of the modulated convolution,
    or of 7 where there is none. The official start is the host network's and changes the output; with `zero_init` the
    adapters add nothing at first. `train_norms` trains the norms of ConvNeXt and Swin blocks, as the official code.

    Raises UserError for a network without such blocks, and for a reduction that does not divide the channels.
    """
    if reduction < 1 or (kernel is not None and kernel % 2 == 0):
        raise UserError(f"reduction must be 1 or more and kernel odd, got {reduction} and {kernel}")
    handle = Handle(backbone)
    options = {"reduction": reduction} | ({} if kernel is None else {"kernel": (kernel, kernel)})
    like = next(backbone.parameters())
    for path, new in list(adapted(backbone, form, options)):
        adapter = cast(ConvAdapter, new.get_submodule("adapter"))
        adapter.to(like.device, like.dtype)
        adapter.init("zero" if zero_init else "kaiming" if isinstance(new, AdaptedResNetBlock) else "normal")
        (handle.add if isinstance(new, TokenAdapter) else handle.replace)(path, new)
    if not handle.changes:
        raise UserError(f"conv_adapter knows the blocks of ResNet, ConvNeXt, Swin, PVT and plain ViTs, none of which "
                        f"is in this {type(backbone).__name__}; use ssf or lora instead")  # fmt: skip
    norms = [name for name, _ in backbone.named_parameters() if re.search(r"(^|\.)norm\d?\.", name)]
    if train_norms and not norms:
        raise UserError(f"train_norms finds no layer called norm in this {type(backbone).__name__}; leave it out")
    for name in norms if train_norms else ():
        handle.tune(name)
    return handle
