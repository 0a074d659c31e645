"""Weights held in half precision, for inference under autocast without casting them anew in every pass."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)
KINDS = (nn.Linear, nn.Conv2d)  # exactly these: what derives from them may compute with its weights first


def cast_layers(model: M, dtype: torch.dtype) -> M:
    """The model itself, its linear layers and convolutions now with weights and biases of that type.

    Under autocast of the same type it gives what it gave, since autocast casts these very tensors in each pass. What
    the rounding took does not come back: do so to a model that is not needed in fp32.
    """
    for module in model.modules():
        if type(module) in KINDS:
            module.to(dtype)
    return model
