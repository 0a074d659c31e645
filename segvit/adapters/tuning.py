"""The baselines of adapter papers: train the head alone, the biases, the norms, or everything.

Paper     Bias tuning: E. Ben Zaken et al., "BitFit", ACL 2022, arXiv 2106.10199. The others are folklore.
Idea      No new parameters; a subset of the backbone's own trains beside the head.
"""

from __future__ import annotations

from timm.layers import RmsNorm
from torch import nn

from segvit.adapters.handle import Handle
from segvit.contracts import UserError

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, RmsNorm)
BIASES = (".bias", ".q_bias", ".v_bias")  # the last two are BEiT's and EVA's


def head_only(backbone: nn.Module) -> Handle:
    """The backbone stays as it is."""
    return Handle(backbone)


def bitfit(backbone: nn.Module) -> Handle:
    """Every bias of the backbone trains. Raises UserError where it has none."""
    handle = Handle(backbone)
    for path in biases(backbone):
        handle.tune(path)
    return handle


def norm_only(backbone: nn.Module) -> Handle:
    """Scale and shift of every normalisation train, and its statistics move. Raises UserError where it has none."""
    handle = Handle(backbone)
    for name, module in backbone.named_modules():
        for leaf, _ in module.named_parameters() if isinstance(module, NORMS) else ():
            handle.tune(f"{name}.{leaf}")
    if not handle.tuned:
        raise UserError("the backbone has no normalisation with weights to train; use head_only, ssf or lora")
    return handle


def full(backbone: nn.Module) -> Handle:
    """Everything trains."""
    handle = Handle(backbone)
    for name, _ in backbone.named_parameters():
        handle.tune(name)
    return handle


def biases(backbone: nn.Module) -> list[str]:
    """The names of all biases. Raises UserError where there are none."""
    found = [name for name, _ in backbone.named_parameters() if name.endswith(BIASES)]
    if not found:
        raise UserError("the backbone has no bias to train; use head_only, ssf or lora")
    return found
