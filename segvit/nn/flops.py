"""Parameters and GFLOPs of a model without its weights, by the convention that reproduces the papers' figures.

One multiply-add counts as one FLOP. Counted: linear layers, convolutions, matrix products (also both of every
attention), LayerNorm as 5 and bilinear resizing as 4 for each output element. Not counted: softmax, activations,
additions, biases, position embeddings. For a dense system the count covers the forward pass, the readout of the whole
input, and the segmentor's resize of the class scores to the input (which the originals do even where it changes
nothing).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from segvit.contracts import Size

if TYPE_CHECKING:
    from segvit.contracts import Model

aten = torch.ops.aten
RESIZE, NORM = 4, 5  # per output element


def _elements(shape: Any) -> int:
    count = 1
    for side in shape:
        count *= int(side)
    return count


def _norm(input_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * NORM * _elements(input_shape)  # the counter counts a multiply-add as two


def _resize(input_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * RESIZE * _elements(out_shape)


FORMULAS: dict[Any, Callable[..., int]] = {aten.native_layer_norm: _norm, aten.upsample_bilinear2d: _resize}


def count_gflops(model: Model, size: Size, *, readout: bool = True) -> float:
    """GFLOPs of image -> class scores at batch 1 and `size`. Nothing is computed: the count runs on the meta device.

    Without `readout` only those of the network: what has to be computed however the scores are read.
    """
    shadow = copy.deepcopy(model).to("meta").eval()
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with counter:
        out = shadow(torch.empty(1, model.spec.channels, *size, device="meta"))
        if readout:
            model.readout(out, size, range(size[0]))
    scores_resize = readout * RESIZE * len(model.classes) * size[0] * size[1]
    return (counter.get_total_flops() / 2 + scores_resize) / 1e9


def count_parameters(model: torch.nn.Module) -> int:
    """All parameters, trained or not, used or not."""
    return sum(parameter.numel() for parameter in model.parameters())
