"""LoRA: a trainable update of low rank beside frozen linear layers and convolutions, zero at the start.

Paper     E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685.
Idea      W x + (alpha / r) B A x with A (r, in) random and B (out, r) zero; B A is added to W after training.
Checked   tests/adapters/test_lora.py against the definition. Parameter names are those of peft.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from segvit.adapters.handle import Handle
from segvit.adapters.places import used_layers
from segvit.contracts import Size, UserError

ATTENTION = ("qkv", "q", "kv", "q_proj", "k_proj", "v_proj")  # what timm calls the inputs of attention


class LowRank(nn.Module):
    """A frozen layer and its update; a convolution's A keeps the kernel, B is 1 x 1."""

    def __init__(self, base_layer: nn.Linear | nn.Conv2d, *, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base_layer, self.scaling = base_layer, alpha / rank
        options: dict[str, Any] = {
            "bias": False, "device": base_layer.weight.device, "dtype": base_layer.weight.dtype
        }  # fmt: skip
        self.lora_dropout = nn.Dropout(dropout)
        if isinstance(base_layer, nn.Linear):
            self.lora_A: nn.Module = nn.Linear(base_layer.in_features, rank, **options)
            self.lora_B: nn.Module = nn.Linear(rank, base_layer.out_features, **options)
        else:
            same: dict[str, Any] = {name: vars(base_layer)[name] for name in ("stride", "padding", "dilation")}
            self.lora_A = nn.Conv2d(base_layer.in_channels, rank, cast(Size, base_layer.kernel_size), **same, **options)
            self.lora_B = nn.Conv2d(rank, base_layer.out_channels, 1, **options)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        update: Tensor = self.lora_B(self.lora_A(self.lora_dropout(x)))
        return cast(Tensor, self.base_layer(x)) + self.scaling * update


def lora(
    backbone: nn.Module, *, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0,
    target_modules: Sequence[str] = ATTENTION,
) -> Handle:  # fmt: skip
    """Updates of rank `rank` for the layers whose names end in one of `target_modules`, such as qkv, proj, fc1, fc2.

    Raises UserError when no linear layer or (ungrouped) convolution has such a name.
    """
    if rank < 1:
        raise UserError(f"rank must be positive, got {rank}")
    endings = tuple(f".{target}" for target in target_modules)
    handle = Handle(backbone, merged=merged)
    for name, layer in used_layers(backbone):
        plain = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
        if plain and f".{name}".endswith(endings):
            handle.replace(name, LowRank(cast(nn.Linear, layer), rank=rank, alpha=alpha, dropout=dropout))
    if not handle.changes:
        leaves = {name.rpartition(".")[2] for name, layer in used_layers(backbone) if isinstance(layer, nn.Linear)}
        raise UserError(
            f"no layer is called {', '.join(target_modules)}; set target_modules to some of "
            f"{', '.join(sorted(leaves)) or 'the names of its convolutions'}"
        )
    return handle


def merged(low_rank: nn.Module) -> nn.Module:
    """The plain layer with the update added to its weights."""
    assert isinstance(low_rank, LowRank)
    layer = copy.deepcopy(low_rank.base_layer)
    down, up = cast(Tensor, low_rank.lora_A.weight), cast(Tensor, low_rank.lora_B.weight)
    update = torch.einsum("or,r...->o...", up.flatten(1), down)
    layer.weight = nn.Parameter(layer.weight.detach() + low_rank.scaling * update.detach())
    return layer
