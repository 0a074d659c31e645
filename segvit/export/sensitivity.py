"""Which layers lose most in lower precision: each alone is rounded in the PyTorch model, and labels compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from segvit.export.graph import layers
from segvit.export.record import Precision
from segvit.inference.predictor import TorchRuntime

if TYPE_CHECKING:
    from segvit.contracts import Model

LEVELS = 127  # of a signed byte


class Loss(NamedTuple):
    """What rounding one layer costs."""

    layer: str
    differing: float  # share of output cells whose best class changes
    error: float  # mean absolute change of the logits


def rank_layers(model: Model, images: Sequence[Tensor], precision: Precision) -> list[Loss]:
    """Every layer's cost over prepared images (C, H, W), the dearest first: a forward pass a layer and image."""
    run = TorchRuntime(model)
    batches = [image[None] for image in images]
    wanted = [run(batch).logits for batch in batches]
    found = []
    for name, layer in layers(model).items():
        weight = layer.get_parameter("weight")
        kept = weight.detach().clone()
        handle = layer.register_forward_pre_hook(_rounding_input(precision))
        weight.data.copy_(round_to(kept, precision, by_row=True))
        try:
            got = [run(batch).logits for batch in batches]
        finally:
            weight.data.copy_(kept)
            handle.remove()
        pairs = list(zip(wanted, got, strict=True))
        differing = sum(float((a.argmax(1) != b.argmax(1)).float().mean()) for a, b in pairs) / len(pairs)
        found.append(Loss(name, differing, sum(float((a - b).abs().mean()) for a, b in pairs) / len(pairs)))
    return sorted(found, key=lambda loss: (-loss.differing, -loss.error))


def round_to(values: Tensor, precision: Precision, *, by_row: bool = False) -> Tensor:
    """Values as that precision can hold them; int8 has one scale, or one a row (first axis)."""
    if precision == "fp32":
        return values
    if precision == "bf16":
        return values.bfloat16().to(values.dtype)
    largest = values.abs().flatten(1).amax(1) if by_row else values.abs().amax()[None]
    scale = (largest / LEVELS).clamp(min=torch.finfo(values.dtype).tiny)
    scale = scale.view(-1, *[1] * (values.dim() - 1)) if by_row else scale
    return (values / scale).round().clamp(-LEVELS, LEVELS) * scale


def _rounding_input(precision: Precision) -> Any:
    def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (round_to(inputs[0], precision), *inputs[1:])

    return hook
