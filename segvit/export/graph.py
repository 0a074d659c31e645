"""The network as one traced graph: normalised images of any number and size in, the tensors of the readout out.

Shapes    B images, K classes, H W pixels, h w map grid.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from segvit.contracts import Dense, Readout, Size, UserError
from segvit.inference.casting import cast_layers

if TYPE_CHECKING:
    from segvit.contracts import Model

EXAMPLE = (2, 256, 320)  # images and their size while tracing; nothing is computed, every map has several cells


class AllRows(NamedTuple):
    """Stands for `range(0, stop)` where the height is not known yet, which a range cannot hold."""

    start: int
    stop: int


class Graph(nn.Module):
    """A model whose output is a tuple of tensors in the order of `Record.outputs`."""

    def __init__(self, model: Model, *, inside: bool, bf16: bool = False) -> None:
        super().__init__()
        self.model = cast_layers(copy.deepcopy(model), torch.bfloat16) if bf16 else model
        self.readout, self.inside, self.bf16 = model.readout, inside, bf16
        self.dtype = torch.uint8 if len(model.classes) <= 255 else torch.int32

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        half = torch.autocast(images.device.type, torch.bfloat16) if self.bf16 else nullcontext()
        with half:
            out: Dense = self.readout.trim(self.model(images))
        out = out._replace(logits=out.logits.float(), extras={k: v.float() for k, v in out.extras.items()})
        if self.inside:
            scores = whole_scores(self.readout, out, (images.shape[-2], images.shape[-1]))
            return scores, scores.argmax(1).to(self.dtype)
        covers = torch.stack([torch.scalar_tensor(side, dtype=torch.int64) for side in out.covers])
        return (out.logits, *out.extras.values(), covers)


def whole_scores(readout: Readout, out: Dense, size: Size) -> Tensor:
    """Class scores (B, K, H, W): what the readout's bands are parts of, with sizes that may be unknown yet."""

    def full(maps: Tensor) -> Tensor:
        maps = F.interpolate(maps, size=out.covers, mode="bilinear", align_corners=False)
        for axis, side in zip((-2, -1), size, strict=True):  # not a slice, or the graph holds only where this cuts
            maps = maps.index_select(axis, torch.arange(side, device=maps.device))
        return maps

    extras = {name: full(value) if value.dim() == 4 else value for name, value in out.extras.items()}
    logits = out.logits if extras else full(out.logits)
    rows = cast(range, AllRows(0, size[0]))
    return readout.scores(Dense(logits, extras, size), size, rows)


def trace(model: Model, *, inside: bool, bf16: bool = False) -> ExportedProgram:
    """The graph of a model for any number, height and width of images.

    `bf16` computes matrix products in that type. Raises UserError where the network depends on the images' values.
    """
    graph = Graph(model.eval(), inside=inside, bf16=bf16)
    count, height, width = EXAMPLE
    images = torch.zeros(count, model.spec.channels, height, width, device=next(model.parameters()).device)
    free = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    try:
        with torch.no_grad(), quiet():
            program = torch.export.export(graph, (images,), dynamic_shapes={"images": free}, strict=False)
    except Exception as error:  # the tracer raises many kinds
        line = str(error).strip().partition("\n")[0]
        raise UserError(f"{model.config.name} cannot be traced as a graph for any image size ({line})") from error
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths of this machine are nobody's business
    return program


def kept_extras(model: Model) -> tuple[str, ...]:
    """The extras that the model's readout reads, in order."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        out = model.eval()(torch.zeros(1, model.spec.channels, 128, 128, device=device))
    return tuple(model.readout.trim(out).extras)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The matrix products of a model by name: what runs in lower precision, and what `keep_fp32` may name."""
    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def chosen(model: nn.Module, keep: tuple[str, ...]) -> tuple[str, ...]:
    """`keep` with every name completed to the layers below it. Raises UserError for a name without layers."""
    known = layers(model)
    found: list[str] = []
    for wanted in keep:
        inside = [name for name in known if name == wanted or name.startswith(f"{wanted}.")]
        if not inside:
            raise UserError(f"keep_fp32 names {wanted!r}, which is no layer; their names are like {next(iter(known))}")
        found += inside
    return tuple(dict.fromkeys(found))


@contextmanager
def quiet() -> Iterator[Any]:
    """Without the exporters' warnings about themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield None
