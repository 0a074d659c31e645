"""The one way from an image to the network's input, shared by training, evaluation, prediction and serving.

Order: resize the uint8 image, mirror it where asked, normalise, and only then pad - with 0, the mean of the
normalised values, as the published models were trained.

Shapes    H W image, h w target, C channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segvit.contracts import InputSpec, Size, UserError
from segvit.data.resize import resize_image, scaled_size


def target_size(size: Size, spec: InputSpec, ratio: float = 1.0) -> Size:
    """The size at which an image of `size` enters the network; `ratio` scales the rule for multi-scale testing."""
    if spec.exact:
        return max(1, int(spec.exact[0] * ratio)), max(1, int(spec.exact[1] * ratio))
    base = spec.scale or size
    return scaled_size(size, scale=(int(base[0] * ratio), int(base[1] * ratio)), min_side=spec.min_side)


def resize_for(image: NDArray[np.uint8], spec: InputSpec, ratio: float = 1.0) -> NDArray[np.uint8]:
    """The image (H, W, C) at the size that `spec` asks for."""
    return resize_image(image, target_size((image.shape[0], image.shape[1]), spec, ratio))


def normalise(image: NDArray[np.uint8], spec: InputSpec) -> Tensor:
    """(H, W, C) levels -> (C, H, W) float32 with the mean and deviation of `spec` taken out.

    Raises UserError when `spec` is for another number of channels.
    """
    if image.shape[2] != spec.channels:
        raise UserError(
            f"the image has {image.shape[2]} channels but the model reads {spec.channels}; use images of the kind it "
            "was trained on, or train a model for these"
        )
    values = image.transpose(2, 0, 1).astype(np.float32, order="C")
    # Mean and deviation are scaled, not the image: 0.5 then gives exactly the published 127.5.
    values -= (255 * np.array(spec.mean)).astype(np.float32)[:, None, None]
    values /= (255 * np.array(spec.std)).astype(np.float32)[:, None, None]
    return torch.from_numpy(values)


def prepare(image: NDArray[np.uint8], spec: InputSpec, *, ratio: float = 1.0, flip: bool = False) -> Tensor:
    """(H, W, C) levels -> (C, h, w) network input; `flip` mirrors the resized image."""
    resized = resize_for(image, spec, ratio)
    return normalise(resized[:, ::-1] if flip else resized, spec)


def pad(image: Tensor, mask: NDArray[Any], size: Size, ignore: int) -> tuple[Tensor, NDArray[Any]]:
    """A normalised image (C, H, W) and its mask (H, W), filled up at the right and bottom to at least `size`."""
    below, right = max(0, size[0] - mask.shape[0]), max(0, size[1] - mask.shape[1])
    if not below and not right:
        return image, mask
    filled = np.pad(mask, ((0, below), (0, right)), constant_values=ignore)
    return torch.nn.functional.pad(image, (0, right, 0, below)), filled
