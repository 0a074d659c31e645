"""Feature pyramids of timm (PVT v2, Swin, ConvNeXt, ResNet ...) behind the backbone contract.

Images are padded with zeros to whole cells of the coarsest map, so that every map covers the same area at any size.

Shapes    B images, stage i with C_i channels at stride s_i.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from segvit.backbones.weights import read_state, unwrap
from segvit.contracts import Features, UserError


class Pyramid(nn.Module):
    """A timm network that returns its stages; `dims` and `strides` tell their widths and pixels a cell."""

    def __init__(
        self, network: nn.Module, *, dims: list[int], strides: list[int], channels_last: bool, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.network = network
        self.dims, self.strides, self.channels_last = tuple(dims), list(strides), channels_last
        known = vars(network).get("pretrained_cfg") or {}
        rgb = in_channels == 3
        self.mean = tuple(known.get("mean", IMAGENET_DEFAULT_MEAN)) if rgb else (0.5,) * in_channels
        self.std = tuple(known.get("std", IMAGENET_DEFAULT_STD)) if rgb else (0.5,) * in_channels

    def forward(self, images: Tensor) -> Features:
        height, width = images.shape[-2:]
        cell = self.strides[-1]
        below, right = -height % cell, -width % cell
        maps = self.stages(F.pad(images, (0, right, 0, below)))
        grid = (maps[0].shape[-2], maps[0].shape[-1])
        return Features(maps, list(self.strides), grid, (height + below, width + right))

    def stages(self, images: Tensor) -> list[Tensor]:
        """The maps (B, C_i, h_i, w_i) of images whose sides are whole cells."""
        maps = self.network(images)
        return [x.permute(0, 3, 1, 2).contiguous() if self.channels_last else x for x in maps]


def pyramid(
    name: str, *, out_indices: tuple[int, ...] = (-4, -3, -2, -1), weights: str | None = None, drop_path: float = 0.0,
    in_channels: int = 3, image_size: int | None = None,
) -> Pyramid:  # fmt: skip
    """Any feature pyramid of timm by name, such as `pvt_v2_b2`, `swin_tiny_patch4_window7_224` or `resnet50`.

    `out_indices` count the stages of the network; by default the last four. `weights` is "timm" for the hub's tag of that name, or a local file in
    timm's layout. `image_size` is for families whose windows or embeddings need one.

    Raises UserError for a name that timm lacks or that has no stages, and for weights that cannot be had.
    """
    options: dict[str, Any] = {"in_chans": in_channels, "features_only": True, "out_indices": out_indices}
    options |= {"drop_path_rate": drop_path} if drop_path else {}
    options |= {"img_size": image_size} if image_size is not None else {}
    if name.startswith("swin"):
        options |= {"strict_img_size": False}
    if not timm.is_model(name.partition(".")[0]):
        raise UserError(f"timm has no model {name!r}; see timm.list_models, such as pvt_v2_b2 or resnet50")
    try:
        network = timm.create_model(name, pretrained=weights == "timm", **options)
    except (TypeError, RuntimeError, AssertionError, IndexError) as error:
        raise UserError(f"{name} gives no feature pyramid with these options ({error}); choose another") from error
    except OSError as error:
        raise UserError(f"weights of {name} are not to be had from the hub ({error}); give a local file") from error
    info = cast(Any, network).feature_info
    if weights is not None and weights != "timm":
        load_local(network, weights)
    return Pyramid(
        network,
        dims=list(info.channels()),
        strides=list(info.reduction()),
        channels_last=is_channels_last(name),
        in_channels=in_channels,
    )


def is_channels_last(name: str) -> bool:
    """Whether the family's stages are (B, h, w, C), which the wrapper that collects stages does not tell."""
    with torch.device("meta"):
        return vars(timm.create_model(name)).get("output_fmt") == "NHWC"


def load_local(network: nn.Module, weights: str) -> None:
    """Weights in timm's layout from a file, in place; parts of the classifier are left out."""
    state = unwrap(read_state(Path(weights).expanduser()))
    own = network.state_dict()
    flat = {key.replace(".", "_", 1) if key.replace(".", "_", 1) in own else key: value for key, value in state.items()}
    used = {key: value for key, value in flat.items() if key in own}
    missing = [key for key in own if key not in used and not key.endswith(("num_batches_tracked", "attn_mask"))]
    if missing:
        raise UserError(f"{weights} does not fit: {len(missing)} keys missing, such as {missing[:2]}; choose its name")
    network.load_state_dict(used, strict=False)
