"""The catalogue of tuning methods: one literal dict, and the way to apply one to a model.

Adding a method touches this dict, the method's file and its test.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from segvit.adapters import class_prompts, conv_adapter, lora, lv_adapter, pro_tuning, spm, ssf, svf, tuning, vpt
from segvit.adapters.handle import Handle
from segvit.adapters.places import backbone_of
from segvit.contracts import UserError

Method = Callable[..., Handle]  # (backbone, *, options) -> Handle

ADAPTERS: dict[str, Method] = {
    "vpt_deep": vpt.vpt_deep,
    "vpt_shallow": vpt.vpt_shallow,
    "ssf": ssf.ssf,
    "svf": svf.svf,
    "lora": lora.lora,
    "conv_adapter": conv_adapter.conv_adapter,
    "spm": spm.spm,
    "pro_tuning": pro_tuning.pro_tuning,
    "lv_adapter": lv_adapter.lv_adapter,
    "cavpt": class_prompts.cavpt,
    "head_only": tuning.head_only,
    "bitfit": tuning.bitfit,
    "norm_only": tuning.norm_only,
    "full": tuning.full,
}


class AdapterLoss(NamedTuple):
    """What a method adds to the system's loss."""

    losses: Callable[..., dict[str, Tensor]]  # (out, masks, totals, *, ignore_index) -> weighted terms
    normalisers: Callable[..., dict[str, Tensor]]  # (masks, *, ignore_index) -> sums over the batch


LOSSES: dict[str, AdapterLoss] = {
    "spm": AdapterLoss(spm.losses, spm.normalisers),
    "lv_adapter": AdapterLoss(lv_adapter.losses, lv_adapter.normalisers),
    "cavpt": AdapterLoss(class_prompts.losses, class_prompts.normalisers),
}


def find_adapter(name: str) -> Method:
    """The method of that name. Raises UserError with the nearest names for an unknown one."""
    if name not in ADAPTERS:
        near = difflib.get_close_matches(name, ADAPTERS, n=3, cutoff=0.4) or sorted(ADAPTERS)
        raise UserError(f"unknown adapter {name!r}; did you mean {', '.join(near)}?")
    return ADAPTERS[name]


def attach(model: nn.Module, name: str, **options: Any) -> Handle:
    """Freeze the backbone of a system and apply a tuning method to it, in place; the rest of the system trains fully.

    Raises UserError for an unknown method or option, and for a backbone that the method does not fit.
    """
    method = find_adapter(name)
    accepted = [parameter for parameter in inspect.signature(method).parameters if parameter != "backbone"]
    for option in options:
        if option not in accepted:
            raise UserError(f"{name} has no option {option!r}; it has {', '.join(accepted) or 'none'}")
    for option, hint in get_type_hints(method).items():
        if get_origin(hint) is Literal and option in options and options[option] not in get_args(hint):
            raise UserError(f"{option} is {options[option]!r}; choose from {', '.join(map(str, get_args(hint)))}")
    known = vars(model)
    own = {"num_classes": len(known["classes"]), "class_names": known["classes"].names} if "classes" in known else {}
    options = {option: value for option, value in own.items() if option in accepted} | options
    _, backbone = backbone_of(model)
    backbone.requires_grad_(False)
    return method(backbone, **options)
