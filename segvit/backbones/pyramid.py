"""Feature pyramids of timm (PVT v2, Swin, ConvNeXt, ResNet ...) behind the backbone contract.

Images are padded with zeros to whole cells of the coarsest map, so that every map covers the same area at any size.
Families that take images of one size only (MaxViT, CoaT, Hiera ...) stay so.
Adapters put modules Step -> Step into `gaps`: gap i stands behind the i-th map, counted from 1, which it changes for
the system and for the stage that follows.

Shapes    B images, stage i with C_i channels at stride s_i.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import FeatureListNet, adapt_input_conv
from torch import Tensor, nn

from segvit.backbones.weights import find_state
from segvit.contracts import Features, UserError
from segvit.nn.tokens import map_step, pad_to_patches, patch_map


class Pyramid(nn.Module):
    """A timm network that returns its stages; `dims` and `strides` tell their widths and pixels a cell."""

    def __init__(
        self, network: nn.Module, *, dims: list[int], strides: list[int], channels_last: bool, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.network, self.gaps = network, nn.ModuleDict()
        self.past: Sequence[Tensor] = ()  # of the first parts: what is known and not to be computed again
        self.dims, self.strides, self.channels_last = tuple(dims), list(strides), channels_last
        known = vars(network).get("pretrained_cfg") or {}
        rgb = in_channels == 3
        self.mean = tuple(known.get("mean", IMAGENET_DEFAULT_MEAN)) if rgb else (0.5,) * in_channels
        self.std = tuple(known.get("std", IMAGENET_DEFAULT_STD)) if rgb else (0.5,) * in_channels

    def forward(self, images: Tensor) -> Features:
        cell = self.strides[-1]
        padded = pad_to_patches(images, (cell, cell))
        maps, extras = self.gapped_stages(padded) if self.gaps or self.past else (self.stages(padded), {})
        grid = (maps[0].shape[-2], maps[0].shape[-1])
        return Features(maps, list(self.strides), grid, (padded.shape[-2], padded.shape[-1]), extras=extras)

    def stages(self, images: Tensor) -> list[Tensor]:
        """The maps (B, C_i, h_i, w_i) of images whose sides are whole cells."""
        maps = self.network(images)
        return [x.permute(0, 3, 1, 2).contiguous() if self.channels_last else x for x in maps]

    def gapped_stages(self, images: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
        """As `stages`, part by part with the gaps between; and what they hand on."""
        network = cast(FeatureListNet, self.network)
        x, maps = images, list[Tensor]()
        extras: dict[str, Tensor] = {}
        for index, (name, part) in enumerate(network.items()):
            x = self.past[index] if index < len(self.past) else part(x)
            if name not in network.return_layers:
                continue
            number = str(len(maps) + 1)
            maps.append(x.permute(0, 3, 1, 2).contiguous() if self.channels_last else x)
            if number in self.gaps:
                step = self.gaps[number](map_step(maps[-1], extras))
                extras, maps[-1] = step.extras, patch_map(step).contiguous()
                x = maps[-1].permute(0, 2, 3, 1) if self.channels_last else maps[-1]
        return maps, extras


def pyramid(
    name: str, *, out_indices: tuple[int, ...] = (-4, -3, -2, -1), weights: str | None = None, drop_path: float = 0.0,
    in_channels: int = 3, image_size: int | None = None,
) -> Pyramid:  # fmt: skip
    """Any feature pyramid of timm by name, such as `pvt_v2_b2`, `swin_tiny_patch4_window7_224` or `resnet50`.

    `out_indices` count the stages of the network; by default the last four. `weights` is a hub name (a timm tag such as
    `pvt_v2_b2.in1k`, or `org/repo`) or a local file, in timm's layout or one that timm knows. `image_size` is for
    families whose windows or embeddings need one.

    Raises UserError for a name that timm lacks or that has no stages, and for weights that cannot be had or do not fit.
    """
    if in_channels < 1:
        raise UserError(f"in_channels is {in_channels}; images have 1 channel or more")
    if not timm.is_model(name.partition(".")[0]):
        raise UserError(f"timm has no model {name!r}; see timm.list_models, such as pvt_v2_b2 or resnet50")
    options: dict[str, Any] = {"in_chans": in_channels}
    options |= {"drop_path_rate": drop_path} if drop_path else {}
    options |= {"img_size": image_size} if image_size is not None else {}
    options |= {"strict_img_size": False} if name.startswith("swin_") else {}
    try:
        network = timm.create_model(name, features_only=True, out_indices=out_indices, **options)
    except (TypeError, RuntimeError, AssertionError, IndexError) as error:
        raise UserError(f"{name} gives no feature pyramid with these options ({error}); change one of them") from error
    with torch.device("meta"):  # as a classifier, which knows what the wrapper that collects stages does not tell
        whole = timm.create_model(name, **options)
    if weights is not None:
        load_pyramid(network, whole, weights)
    info = cast(Any, network).feature_info
    last = vars(whole).get("output_fmt") == "NHWC"
    return Pyramid(
        network, dims=list(info.channels()), strides=list(info.reduction()), channels_last=last, in_channels=in_channels
    )


def load_pyramid(network: nn.Module, whole: nn.Module, weights: str) -> None:
    """Load a classifier's weights into its stages, in place; `whole` is the classifier on the meta device.

    Raises UserError when they cannot be had, or a part of a stage is missing, unknown or of another shape.
    """
    state: dict[str, Tensor] = dict(known_layout(whole)(find_state(weights)))
    config = vars(whole)["pretrained_cfg"]
    first: str | tuple[str, ...] = config.get("first_conv") or ()
    for place in (first,) if isinstance(first, str) else first:
        kernel = state.get(f"{place}.weight")
        channels = whole.get_parameter(f"{place}.weight").shape[1]
        if kernel is not None and kernel.shape[1] == 3:
            state[f"{place}.weight"] = adapt_input_conv(channels, kernel)
    own, known = network.state_dict(), whole.state_dict()
    # The wrappers rename: what stands in a list becomes its own child, or the whole becomes one.
    names = {key: (key, key.replace(".", "_", 1), f"model.{key}") for key in state}
    used = {name: state[key] for key in state for name in names[key] if name in own}
    missing = [key for key in own if key not in used and not key.endswith(("num_batches_tracked", "attn_mask"))]
    unknown = [key for key in state if key not in known]
    wrong = [key for key, value in used.items() if value.shape != own[key].shape]
    if missing or unknown or wrong:
        raise UserError(
            f"{weights} does not fit: {len(missing)} keys missing {missing[:2]}, {len(unknown)} unknown {unknown[:2]}, "
            f"{len(wrong)} of another shape {wrong[:2]}; choose the matching backbone"
        )
    network.load_state_dict(used, strict=False)


def known_layout(whole: nn.Module) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """timm's own filter for the layouts that the family's weights come in; nothing is changed where it has none."""
    function = vars(sys.modules[type(whole).__module__]).get("checkpoint_filter_fn")
    return (lambda state: state) if function is None else (lambda state: dict(function(state, whole)))
