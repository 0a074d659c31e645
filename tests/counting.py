"""Costs as the model cards of the papers count them, without a network's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from segvit.nn.flops import FORMULAS


def gmacs(module: nn.Module, size: tuple[int, int]) -> float:
    """Billions of multiply-adds of convolutions and matrix products alone; the module must be on the meta device."""
    return _count(module, size, {})


def fvcore_gmacs(module: nn.Module, size: tuple[int, int]) -> float:
    """The same as fvcore counts: by output element 5 for LayerNorm, 4 and 1 for resizing, and 2 for BatchNorm."""
    elements: list[int] = []
    hooks = [
        norm.register_forward_hook(lambda module, args, out: elements.append(out.numel()))
        for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)
    ]  # fmt: skip
    total = _count(module, size, FORMULAS | {torch.ops.aten.upsample_nearest2d: _nearest})
    for hook in hooks:
        hook.remove()
    return total + 2 * sum(elements) / 1e9


def _nearest(*args: Any, out_shape: torch.Size, **kwargs: Any) -> int:
    return 2 * out_shape.numel()  # the counter counts a multiply-add as two


def _count(module: nn.Module, size: tuple[int, int], formulas: dict[Any, Any]) -> float:
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with counter:
        module.eval()(torch.empty(1, 3, *size, device="meta"))
    return counter.get_total_flops() / 2e9
