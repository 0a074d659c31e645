"""Where an adapter may act: the backbone of a system, and the layers of it that run."""

from __future__ import annotations

from torch import nn

from segvit.backbones.vit import PlainViT
from segvit.contracts import UserError


def backbone_of(model: nn.Module) -> tuple[str, nn.Module]:
    """The name and the module of a system's backbone. Raises UserError where it has none."""
    modules = dict(model.named_modules())
    for name in ("backbone", "encoder", "network.encoder", "network.backbone"):  # the last two of other libraries
        if name in modules:
            return name, modules[name]
    raise UserError(f"{type(model).__name__} has no backbone of its own that could stay frozen; train it as a whole")


def used_layers(backbone: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers without parts, by name; not those of blocks after the last map, which never run."""
    unused: tuple[str, ...] = ()
    if isinstance(backbone, PlainViT):
        unused = tuple(f"blocks.{i}." for i in range(backbone.out_indices[-1] + 1, len(backbone.blocks)))
    layers = [(name, module) for name, module in backbone.named_modules() if not any(module.children())]
    return [(name, layer) for name, layer in layers if name and not name.startswith(unused)]
