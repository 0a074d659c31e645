"""Freezing parameters by patterns on their names, and keeping what is frozen still while the rest trains."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from torch import nn

from segvit.contracts import UserError

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
SHOWN = 4  # names in a message


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Switch the gradient off for every parameter in whose name a regular expression is found.

    Raises UserError for a pattern that is no expression or that matches nothing, and where nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        try:
            matched = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise UserError(f"optim.freeze: {pattern!r} is not a regular expression ({error})") from None
        if not matched:
            known = ", ".join(near(pattern, names))
            raise UserError(f"optim.freeze: {pattern!r} matches no parameter; there are {known}")
        for name in matched:
            model.get_parameter(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("optim.freeze leaves nothing to train; freeze less")


def near(pattern: str, names: Sequence[str]) -> list[str]:
    """The modules and parameters that look most like a pattern, else the outermost modules."""
    paths = [name.split(".") for name in names]
    prefixes = {".".join(path[:end]) for path in paths for end in range(1, len(path) + 1)}
    plain = re.sub(r"[\\^$()]", "", pattern)
    found = difflib.get_close_matches(plain, sorted(prefixes), n=SHOWN, cutoff=0.6)
    return found or sorted({name.split(".")[0] for name in names})


def train_mode(model: nn.Module) -> None:
    """`model.train()`, except for normalisation layers that are frozen: their statistics stay too."""
    model.train()
    for module in model.modules():
        own = list(module.parameters(recurse=False)) if isinstance(module, NORMS) else []
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()


def frozen_parts(model: nn.Module) -> str:
    """The outermost modules, or single parameters, that do not train; "" where all do."""
    parts: list[str] = []
    for name, module in model.named_modules():
        parameters = list(module.parameters())
        inside = any(name.startswith(f"{part}.") for part in parts)
        if name and parameters and not inside and not any(parameter.requires_grad for parameter in parameters):
            parts.append(name)
    singles = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    parts += [name for name in singles if not any(name.startswith(f"{part}.") for part in parts)]
    more = f" and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
    return ", ".join(parts[:SHOWN]) + more
