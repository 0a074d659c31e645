"""SSF: a scale and a shift for every channel after each operation of a frozen backbone, folded away after training.

Paper     D. Lian et al., "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", NeurIPS 2022,
          arXiv 2210.08823.
Idea      y = scale * x + shift after the patch embedding, every norm, linear layer and convolution. All are affine, so
          that the weights before them take both in.
Differs   Channels are found by the layer's type; the released code guesses from shapes and scales along the width where
          that equals the number of channels. Its network-level pair on a map after a residual sum, which cannot
          be folded, is left out: the last norm has one where the system uses that norm.
Checked   tests/golden/ssf__* (official: dongzelian/SSF models/{vision_transformer,convnext}.py).
"""

from __future__ import annotations

import copy
import re
from typing import Any, cast

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from segvit.adapters.handle import Handle
from segvit.adapters.places import used_layers
from segvit.contracts import UserError
from segvit.nn.rename import Rules, rename

# No pair of their own: norms of queries and keys, tables of position, reductions (Swin), shortcuts (ConvNeXt)
SKIPPED = re.compile(r"(^|\.)(q_norm|k_norm|cpb_mlp|rel_pos\w*|rope|reduction|downsample\.\d+)(\.|$)")
LAST = (nn.Linear, nn.LayerNorm)  # channels in the last dimension
SECOND = (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, LayerNorm2d)  # channels in dimension 1


class Scaled(nn.Module):
    """A frozen layer, then scale and shift of its C channels."""

    def __init__(self, base_layer: nn.Module, channels: int, *, channels_last: bool, like: Tensor) -> None:
        super().__init__()
        self.base_layer, self.channels_last = base_layer, channels_last
        options: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.ssf_scale = nn.Parameter(torch.empty(channels, **options).normal_(1.0, 0.02))
        self.ssf_shift = nn.Parameter(torch.empty(channels, **options).normal_(0.0, 0.02))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        if self.channels_last:
            return y * self.ssf_scale + self.ssf_shift
        return y * self.ssf_scale[:, None, None] + self.ssf_shift[:, None, None]


def ssf(backbone: nn.Module) -> Handle:
    """Scale and shift after every operation; about 0.2 M parameters for a ViT-B.

    Raises UserError for a backbone without any layer that it knows.
    """
    handle = Handle(backbone, merged=merged)
    for name, layer in used_layers(backbone):
        kind = type(layer)
        second = issubclass(kind, LayerNorm2d) or kind in SECOND
        if SKIPPED.search(name) or not (second or issubclass(kind, LAST)):
            continue
        weight = next(iter(layer.parameters()), None)
        channels = out_channels(layer)
        like = next(backbone.parameters()) if weight is None else weight
        handle.replace(name, Scaled(layer, channels, channels_last=not second, like=like))
    if not handle.changes:
        raise UserError(f"{type(backbone).__name__} has no linear layer, convolution or norm to scale; choose another")
    return handle


def out_channels(layer: nn.Module) -> int:
    """The number of channels that come out of a layer of a known type."""
    match layer:
        case nn.Linear():
            return layer.out_features
        case nn.Conv2d():
            return layer.out_channels
        case nn.LayerNorm():
            return int(layer.normalized_shape[-1])
        case nn.GroupNorm():
            return layer.num_channels
    return int(cast(Any, layer).num_features)


def merged(scaled: nn.Module) -> nn.Module:
    """The plain layer with scale and shift in its weights; one without a bias gets one."""
    assert isinstance(scaled, Scaled)
    layer = cast(Any, copy.deepcopy(scaled.base_layer))
    scale, shift = scaled.ssf_scale.detach(), scaled.ssf_shift.detach()
    if layer.weight is None:  # a norm without weights of its own
        layer.weight = nn.Parameter(scale.clone())
    else:
        layer.weight = nn.Parameter(layer.weight * scale.reshape(-1, *[1] * (layer.weight.ndim - 1)))
    layer.bias = nn.Parameter(shift.clone() if layer.bias is None else layer.bias * scale + shift)
    return cast(nn.Module, layer)


# Official name of a pair's owner and number -> our layer; numbers count the operations inside the owner.
OFFICIAL: Rules = (
    (r"^(patch_embed|stem)\.(ssf_\w+)_1$", r"\1.proj.\2"),
    (r"^(patch_embed|stem)\.(ssf_\w+)_2$", r"\1.norm.\2"),
    (r"^(blocks\.\d+)\.(ssf_\w+)_([12])$", r"\1.norm\3.\2"),
    (r"^(stages\.\d+\.blocks\.\d+)\.(ssf_\w+)_1$", r"\1.conv_dw.\2"),
    (r"^(stages\.\d+\.blocks\.\d+)\.(ssf_\w+)_2$", r"\1.norm.\2"),
    (r"\.attn\.(ssf_\w+)_1$", r".attn.qkv.\1"),
    (r"\.attn\.(ssf_\w+)_2$", r".attn.proj.\1"),
    (r"\.mlp\.(ssf_\w+)_([12])$", r".mlp.fc\2.\1"),
    (r"^(ssf_\w+)_1$", r"norm.\1"),
)
UNUSED = r"^(head|fc_norm)\."  # the image classifier
CONVNEXT: Rules = (  # to the names of timm's pyramid
    (r"^stem\.proj\.", "network.stem_0."),
    (r"^stem\.norm\.", "network.stem_1."),
    (r"^(stages\.\d+\.downsample\.)norm\.", r"\g<1>0."),
    (r"^(stages\.\d+\.downsample\.)proj\.", r"\g<1>1."),
    (r"^stages\.(\d+)\.", r"network.stages_\1."),
)
UNUSED_CONVNEXT = r"^norm\."  # the pair after the last residual sum, which nothing can take in


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official checkpoints (dongzelian/SSF), ViT or ConvNeXt, into a backbone of ours with scales and shifts."""
    renamed = rename(state, OFFICIAL, unused=UNUSED)
    scaled = {key.removesuffix("ssf_scale") for key in renamed if key.endswith("ssf_scale")}
    for key in list(renamed):
        owner, _, leaf = key.rpartition(".")
        if f"{owner}." in scaled and not leaf.startswith("ssf_"):
            renamed[f"{owner}.base_layer.{leaf}"] = renamed.pop(key)
    return rename(renamed, CONVNEXT, unused=UNUSED_CONVNEXT) if any("stages." in key for key in state) else renamed
