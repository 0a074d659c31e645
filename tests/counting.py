"""Costs as the model cards of the papers count them: multiply-adds of convolutions and matrix products alone."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def gmacs(module: nn.Module, size: tuple[int, int]) -> float:
    """Billions of multiply-adds for one image; the module must be on the meta device."""
    counter = FlopCounterMode(display=False)
    with counter:
        module.eval()(torch.empty(1, 3, *size, device="meta"))
    return counter.get_total_flops() / 2e9
